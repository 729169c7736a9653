"""Starts runs and continues them: in this process, in processes of its own, or as one of torchrun's.

`run` and `resume` return the exit code: 0 done, 130 interrupted after the last checkpoint. What goes before
is in `preparing`; what comes after a failure, without a person, in `restarts`.
"""

import itertools
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from petractl import build, worker
from petractl.engine.world import (
    Launch,
    connect,
    is_kept_by_torchrun,
    restarts_of_torchrun,
    tell_later_starts,
    told_by_earlier_start,
    wait_for_told,
)
from petractl.errors import PeerLost, RunError, UserError, refusal
from petractl.interrupts import Interrupts
from petractl.preparing import Ready, discard_unstarted, prepare_auto, prepare_resume, prepare_run
from petractl.processes import (
    WorkersFailed,
    die_with_launcher,
    local_network,
    redirect_output,
    reported,
    run_workers,
)
from petractl.restarts import note_failure, restarted, tell_restart_by_torchrun
from petractl.run_folder import RESOLVED, RunFolder
from petractl.session import EXIT_INTERRUPTED, STOPPED_KEY, Session, state_of
from petractl.tracking.journal import JOURNAL_NAME
from petractl.worker import LOGS, START_VARIABLE, Start

_START_KEY = "petractl/start"
_NO_START = "no start"
_NOTHING_TO_DO = "nothing to do"
_LAST_S = 1.0
_RUN_DIR_KEY = "run_dir"
_SHUTDOWN_S = 10.0
_SHUTDOWN_MARGIN_S = 15.0  # rank 0 may wait 10 s for MLflow after it has saved

Preparation = Callable[[Launch | None, str], AbstractContextManager[Ready | None]]
"""Checks everything and makes the folder, within a lock on it; None where nothing is left to do.

It is given what was started already, and the run folder that an earlier start by the same torchrun has made.
"""


def run(
    recipe: str,
    *,
    directory: Path | None,
    overrides: Sequence[str],
    trace: bool = False,
    goes_on: bool = False,
) -> int:
    """Train by a recipe in a new run folder; with `trace` it records what each stage does when.

    With `goes_on` it continues what the same command has begun before, if there is such a run.

    Raises:
        UserError: the recipe, the data or the folder are wrong; nothing was started.
        RunError: the run failed.
    """

    def prepare(launch: Launch | None, begun: str) -> AbstractContextManager[Ready | None]:
        if not goes_on and not restarts_of_torchrun()[0]:
            return prepare_run(recipe, directory, overrides, launch, trace)
        here = directory or (Path(begun) if begun else None)
        if not goes_on and here is None:
            _check_memory_of_torchrun()
            return prepare_run(recipe, directory, overrides, launch, trace)
        return prepare_auto(recipe, here, overrides, launch, trace)

    return _as_started(prepare)


def resume(run: Path, *, overrides: Sequence[str]) -> int:
    """Continue a run from its last checkpoint, or from the start if there is none.

    Raises:
        UserError: no such run, a key that may not change, or another process is at it.
        RunError: the run failed.
    """
    return _as_started(lambda launch, _: prepare_resume(run, overrides, launch))


def _check_memory_of_torchrun() -> None:
    """Refuse to begin a run again where nobody can tell whether an earlier start has begun it."""
    if not is_kept_by_torchrun():
        raise UserError(
            "torchrun has started the processes again, and it is not known in which folder the run is",
            hint="give the folder: torchrun ... -m petractl run RECIPE --dir DIR --resume auto",
        )


def _as_started(prepare: Preparation) -> int:
    """Train in this process, in processes started here, or as one of those that torchrun started."""
    launch = Launch.from_environment()
    if launch is not None and launch.world_size > 1:
        return _join(prepare, launch)
    store = connect(launch) if launch is not None and is_kept_by_torchrun() else None
    if store is not None:
        _stay_stopped(store, rank=0)
    with Interrupts().handled() as interrupts, _prepared(prepare, None, store) as ready:
        code = _train(ready, interrupts) if ready is not None else 0
        if store is not None and ready is not None and code == EXIT_INTERRUPTED:
            command = shlex.join(["petractl", "resume", str(ready.folder.path)])
            tell_later_starts(store, STOPPED_KEY, f"what it was told\n{command}")
    return code


@contextmanager
def _prepared(prepare: Preparation, launch: Launch | None, store: Any) -> Iterator[Ready | None]:
    """Make a run ready; where torchrun has started it before, that is told.

    `store` is that of the processes, None for one alone.
    """
    begun = told_by_earlier_start(store, _RUN_DIR_KEY) if store is not None else ""
    with prepare(launch, begun) as ready:
        if ready is not None:
            if store is not None:
                tell_later_starts(store, _RUN_DIR_KEY, str(ready.folder.path.absolute()))
            restart, most = restarts_of_torchrun()
            if restart and not ready.is_new:
                tell_restart_by_torchrun(ready.folder, state_of(ready.saved), restart=restart, of=most)
        yield ready


def _train(ready: Ready, interrupts: Interrupts) -> int:
    """Train; what fails before or after a session is journalled here."""
    try:
        if ready.built is not None:
            return _train_alone(ready, ready.built, interrupts)
        return _start_processes(ready)
    except KeyboardInterrupt:
        if (ready.folder.path / JOURNAL_NAME).exists():
            command = shlex.join(["petractl", "resume", str(ready.folder.path)])
            sys.stderr.write(f"hint: continue with: {command}\n")
        raise
    except RunError as error:
        note_failure(ready.folder, error)
        raise
    except OSError as error:
        words = refusal(error)
        note_failure(ready.folder, words or error)
        if not words:
            raise
        raise RunError(words, hint="make room, or let it be written; checkpoints are intact") from error


def _train_alone(ready: Ready, built: build.Built, interrupts: Interrupts) -> int:
    session = Session(
        ready.folder,
        ready.plan,
        built,
        interrupts=interrupts,
        recipe_name=ready.recipe_name,
        trace=ready.trace,
    )
    session.warn(ready.warnings)
    if ready.saved is not None:
        session.restore(ready.saved)
    if ready.resolved != RESOLVED:
        ready.folder.adopt_resolved()
    return session.train(state_of(ready.saved))


def _start_processes(ready: Ready) -> int:
    """Train in processes, and start all of them again after a failure, as often as the recipe allows."""
    most, start = ready.plan.recipe.engine.max_restarts, ready.start
    for restart in itertools.count(1):
        try:
            return _run_processes(ready, start)
        except WorkersFailed as error:
            note_failure(ready.folder, error)
            if restart > most or not error.can_restart:
                raise
            start = restarted(start, reason=error.what, restart=restart, of=most)
    raise AssertionError("the count has no end")


def _run_processes(ready: Ready, start: Start) -> int:
    journal = ready.folder.path / JOURNAL_NAME
    before = _size(journal)
    code = run_workers(
        [sys.executable, "-m", "petractl.worker", str(ready.folder.path)],
        titles=start.titles,
        log_dir=ready.folder.path / LOGS,
        environment={START_VARIABLE: start.to_json()},
        shutdown_s=_shutdown_s(ready),
    )
    if code and _size(journal) == before:
        # Interrupted before the run has begun: no worker has said so.
        raise KeyboardInterrupt
    return code


def _shutdown_s(ready: Ready) -> float:
    """Return how long processes that were told to stop may take: they save first."""
    return max(_SHUTDOWN_S, ready.plan.recipe.run.stop_deadline + _SHUTDOWN_MARGIN_S)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _join(prepare: Preparation, launch: Launch) -> int:
    """Train as one of the processes that torchrun started; rank 0 prepares the run for all.

    Never returns where it fails: the process then ends with its report.
    """
    rank = launch.rank
    die_with_launcher()
    with reported("process", rank), ExitStack() as stack:
        if launch.world_size == launch.local_world_size:
            os.environ.update(local_network())
        store = connect(launch)
        _stay_stopped(store, rank=rank)
        if rank == 0:
            text = _NO_START
            try:
                with Interrupts().handled():
                    ready = stack.enter_context(_prepared(prepare, launch, store))
                text = ready.start.to_json() if ready else _NOTHING_TO_DO
            finally:
                store.set(_START_KEY, text)
        text = wait_for_told(store, _START_KEY)
        if text == _NOTHING_TO_DO:
            return 0
        if text == _NO_START:
            raise PeerLost("rank 0 has not started the run: its message says why")
        start = Start.from_json(text)
        _check_folder_is_here(start)
        with reported(start.title(rank), rank):
            _train_jointly(start, launch, store)
    return 0


def _stay_stopped(store: Any, *, rank: int) -> None:
    """End, with 130, where the processes before these have stopped the run as they were told to."""
    told = told_by_earlier_start(store, STOPPED_KEY)
    if told:
        cause, _, command = told.partition("\n")
        if rank:
            time.sleep(_LAST_S)  # the first to end has torchrun end the others
        else:
            sys.stderr.write(f"stopped by {cause}: not started again\nhint: continue with: {command}\n")
        sys.exit(EXIT_INTERRUPTED)


def _train_jointly(start: Start, launch: Launch, store: Any) -> None:
    """Train as one of several; ends the process where that does not come to its end."""
    folder = RunFolder(Path(start.run_dir))
    redirect_output(folder.path / LOGS, launch.rank, start.title(launch.rank))
    try:
        code = worker.train(start, launch, store)
    except BaseException as error:
        if launch.rank == 0:
            if start.is_new:
                discard_unstarted(folder.path)
            if isinstance(error, Exception) and not isinstance(error, UserError):
                note_failure(folder, error)
        raise
    if code:
        sys.exit(code)


def _check_folder_is_here(start: Start) -> None:
    if not RunFolder(Path(start.run_dir)).resolved.is_file():
        raise UserError(
            "this machine does not see the run folder",
            where=start.run_dir,
            hint="give a folder that all machines share, with --dir or run.directory",
        )
