"""A comparison in this process, in processes started here, or as one of those that were started.

Where the recipe or a variant needs several processes, the same command line is run once more in each of them:
so torchrun can start them as well. Rank 0 owns the terminal and writes the results.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

from petractl import build
from petractl.bench.comparison import Checked, Options, Tell, measure
from petractl.bench.summary import Measurement
from petractl.engine.world import Alone, Launch, connect, join
from petractl.interrupts import Interrupts
from petractl.processes import die_with_launcher, redirect_output, reported, run_workers
from petractl.session import prepare_process

_LOGS_VARIABLE = "PETRACTL_BENCH_LOGS"


def launch() -> Launch | None:
    """Return what was started already, None where this process stands alone."""
    found = Launch.from_environment()
    return found if found is not None and found.world_size > 1 else None


def is_speaker() -> bool:
    """Tell whether this process is the one that tells what was found before the start."""
    started = launch()
    return started is None or (started.rank == 0 and _LOGS_VARIABLE not in os.environ)


def compare(
    checked: Sequence[Checked], *, options: Options, tell: Tell, arguments: Sequence[str]
) -> tuple[Measurement, ...]:
    """Measure the variants; `arguments` are those of the command line, for processes of its own.

    Returns nothing where another process has the results and writes them.

    Raises:
        UserError: the data or the starting weights are not what they should be.
        RunError: a process failed.
        KeyboardInterrupt: the processes were interrupted.
    """
    plan = checked[0].plan
    if plan.layout.mode == build.IN_PROCESS:
        prepare_process(plan)
        return measure(checked, Alone(), device=plan.device, options=options, tell=tell)
    started = launch()
    if started is None:
        _start(plan, arguments)
        return ()
    return _take_part(checked, started, options=options, tell=tell)


def _start(plan: build.CheckedPlan, arguments: Sequence[str]) -> None:
    layout = plan.layout
    logs = Path(mkdtemp(prefix="petractl-bench-"))
    code = run_workers(
        [sys.executable, "-m", "petractl", "bench", *arguments],
        titles=[layout.seat(rank).title for rank in range(layout.num_processes)],
        log_dir=logs,
        environment={_LOGS_VARIABLE: str(logs)},
    )
    shutil.rmtree(logs, ignore_errors=True)  # not after a failure, whose message names one of them
    if code:
        raise KeyboardInterrupt


def _take_part(
    checked: Sequence[Checked], started: Launch, *, options: Options, tell: Tell
) -> tuple[Measurement, ...]:
    plan, rank = checked[0].plan, started.rank
    seat = plan.layout.seat(rank)
    logs = os.environ.get(_LOGS_VARIABLE)
    die_with_launcher()
    with reported(seat.title, rank), Interrupts(announce=False).handled():
        if logs:
            redirect_output(Path(logs), rank, seat.title)
        prepare_process(plan, processes=started.local_world_size)
        device = build.process_device(plan, started)
        engine = plan.recipe.engine
        world = join(
            started,
            seat,
            store=connect(started),
            device=device,
            backend=engine.backend,
            timeout_s=engine.stall_timeout,
        )
        quiet: Tell = lambda line: None  # noqa: E731
        measured = measure(checked, world, device=device, options=options, tell=quiet if rank else tell)
        world.close()
    return measured
