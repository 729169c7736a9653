"""torch's elastic agent, and what it lacks for a pipeline.

What is added, and why:

1. At the first failure the agent of torch stops all others at once. Ours waits a moment: who merely lost a
   neighbour says so and goes, and in a stall the one that says nothing is the one to blame.
2. Its patience with a worker that does not stop is 30 s, fixed; ours is bounded by what the caller asks for.
3. It knows whole seconds; who failed first is decided within milliseconds.
4. Its signal handlers raise wherever the program stands, also between two starts. Ours count.
5. Its rendezvous looks up the machine's full name, and listens on every network. Ours does neither.
"""

import contextlib
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.events.api import Event, EventSource
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from petractl.errors import RunError
from petractl.processes.launcher import StopSignals
from petractl.processes.output import log_name
from petractl.processes.report import (
    ERROR_FILE_VARIABLE,
    EXIT_INTERRUPTED,
    STACK_SUFFIX,
    read_report,
)
from petractl.processes.verdict import Ending

_ADDRESS = "127.0.0.1"
_POLL_S = 0.05
_STORE_TIMEOUT = timedelta(seconds=300)
_SIGNALS_VARIABLE = "TORCHELASTIC_SIGNALS_TO_HANDLE"
# From the first failure on: how long the others have to end by themselves, rank 0 (it closes the run folder),
# all others, and these where the input was wrong, when nobody's own words are needed.
_GRACE_OF_RANK_0_S = 5.0
_GRACE_S = 2.0
_GRACE_AFTER_USER_ERROR_S = 0.5
# From the first that ended because it was told to stop: rank 0 may wait 10 s for MLflow after all have saved.
_GRACE_TO_LEAVE_S = 12.0
_STACKS_BEFORE_STOP_S = 0.3
_STOP_TO_KILL_S = 4.0
_KILL_TO_GIVING_UP_S = 10.0
_SIGNALS_TO_KILL = 3


def watch_workers(
    command: Sequence[str],
    *,
    titles: Sequence[str],
    environment: Mapping[str, str],
    scratch: Path,
    log_dir: Path,
    signals: StopSignals,
    shutdown_s: float,
) -> list[Ending]:
    """Start the workers, wait for all of them, and return their ends by rank.

    Raises:
        RunError: a worker cannot be killed.
        OSError: the workers cannot be started.
    """
    rendezvous = _Rendezvous()
    spec = WorkerSpec(
        role="stage",
        local_world_size=len(titles),
        rdzv_handler=rendezvous,
        entrypoint=command[0],
        # The agent replaces ${local_rank} and the like in arguments; ours are meant as they stand.
        args=tuple(argument.replace("$", "$$") for argument in command[1:]),
        max_restarts=0,
        monitor_interval=_POLL_S,
    )
    files = _Files(scratch, environment)
    agent = _Agent(spec, files, titles=titles, log_dir=log_dir, signals=signals, shutdown_s=shutdown_s)
    with _signals_left_alone():
        agent.run()
    return agent.endings()


class _Agent(LocalElasticAgent):
    """The agent of torch, with patience of its own; see the module's docstring."""

    _pcontext: SubprocessContext | None

    def __init__(
        self,
        spec: WorkerSpec,
        files: "_Files",
        *,
        titles: Sequence[str],
        log_dir: Path,
        signals: StopSignals,
        shutdown_s: float,
    ) -> None:
        super().__init__(spec, files)
        self._files = files
        self._titles = titles
        self._log_dir = log_dir
        self._signals = signals
        self._shutdown_s = shutdown_s
        self._ended: dict[int, tuple[int, float]] = {}
        self._stopped: set[int] = set()
        self._forwarded = 0
        self._asked_for_stacks: set[int] = set()
        self._failed_at: float | None = None
        self._left_at: float | None = None
        self._grace_s = _GRACE_S
        self._kill_at: dict[int, float] = {}
        self._killed_at: dict[int, float] = {}

    def endings(self) -> list[Ending]:
        """Return the ends of all workers, by rank, once `run` has returned."""
        return [self._ending(rank) for rank in range(len(self._titles))]

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Look after the workers; torch's own agent gets its turn when all have ended."""
        now = time.monotonic()
        self._note_ends(now)
        if not self._running():
            result: RunResult = super()._monitor_workers(worker_group)
            return result
        self._forward_signals(now)
        self._stop_after_failure(now)
        self._stop_after_leaving(now)
        self._kill_who_stays(now)
        return RunResult(state=WorkerState.HEALTHY)

    def _construct_event(self, state: str, source: EventSource, *args: Any, **kwargs: Any) -> Event:
        """Return an event without the machine's full name, which a name server may be slow to tell."""
        return Event(f"torchelastic.worker.status.{state}", source=source)

    def _processes(self) -> dict[int, Any]:
        assert self._pcontext is not None
        return {rank: handler.proc for rank, handler in self._pcontext.subprocess_handlers.items()}

    def _running(self) -> dict[int, int]:
        """Return the process ids of those that still run, by rank."""
        return {rank: process.pid for rank, process in self._processes().items() if rank not in self._ended}

    def _note_ends(self, now: float) -> None:
        for rank, process in self._processes().items():
            if rank in self._ended or (code := process.poll()) is None:
                continue
            self._ended[rank] = (code, now)
            # What it started must not outlive it; it leads a group of its own.
            _send(process.pid, signal.SIGKILL, to_group=True)
            if code == EXIT_INTERRUPTED:
                self._left_at = now if self._left_at is None else self._left_at
            elif code != 0 and self._failed_at is None:
                report = read_report(self._files.error_file(rank))
                is_user_error = report is not None and report.kind == "user"
                self._grace_s = _GRACE_AFTER_USER_ERROR_S if is_user_error else _GRACE_S
                self._failed_at = now

    def _forward_signals(self, now: float) -> None:
        if self._signals.count == self._forwarded:
            return
        self._forwarded = self._signals.count
        if self._forwarded >= _SIGNALS_TO_KILL:
            self._kill_at |= dict.fromkeys(self._running(), now)
        else:
            self._stop_all(now, shutdown_s=self._shutdown_s, again=True)

    def _stop_after_failure(self, now: float) -> None:
        if self._failed_at is None:
            return
        waited_s = now - self._failed_at
        for rank in self._running():
            grace_s = max(self._grace_s, _GRACE_OF_RANK_0_S) if rank == 0 else self._grace_s
            if waited_s >= grace_s and rank not in self._asked_for_stacks:
                self._asked_for_stacks.add(rank)
                self._ask_for_stacks(rank)
            if waited_s >= grace_s + _STACKS_BEFORE_STOP_S:
                self._stop(rank, now, kill_after_s=min(self._shutdown_s, _STOP_TO_KILL_S))

    def _stop_after_leaving(self, now: float) -> None:
        """Stop who has not ended by itself, as those do whom another one has told of its own stop."""
        if self._left_at is not None and now - self._left_at >= _GRACE_TO_LEAVE_S:
            self._stop_all(now, shutdown_s=self._shutdown_s)

    def _ask_for_stacks(self, rank: int) -> None:
        # Who has not got as far as to write stacks would die of the question.
        if _text(self._files.stack_file(rank)):
            _send(self._running()[rank], signal.SIGUSR1)

    def _stop_all(self, now: float, *, shutdown_s: float, again: bool = False) -> None:
        for rank in self._running():
            self._stop(rank, now, kill_after_s=shutdown_s, again=again)

    def _stop(self, rank: int, now: float, *, kill_after_s: float, again: bool = False) -> None:
        """Tell a worker to stop: itself, not its group, for it decides on its own children."""
        if rank in self._stopped and not again:
            return
        self._stopped.add(rank)
        self._kill_at[rank] = min(self._kill_at.get(rank, math.inf), now + kill_after_s)
        _send(self._running()[rank], signal.SIGTERM)

    def _kill_who_stays(self, now: float) -> None:
        for rank, pid in self._running().items():
            if now < self._kill_at.get(rank, math.inf):
                continue
            # Counted from the first kill: this process itself may have been held in between.
            if now - self._killed_at.setdefault(rank, now) >= _KILL_TO_GIVING_UP_S:
                raise RunError(
                    f"{self._titles[rank]} (rank {rank}) cannot be killed: the system holds it",
                    hint=f"a device or a network disk hangs; its process is {pid}",
                )
            self._stopped.add(rank)
            _send(pid, signal.SIGKILL, to_group=True)

    def _ending(self, rank: int) -> Ending:
        code, seen_at = self._ended[rank]
        log = self._log_dir / log_name(self._titles[rank])
        return Ending(
            title=self._titles[rank],
            rank=rank,
            exit_code=code,
            seen_at=seen_at,
            report=read_report(self._files.error_file(rank)),
            was_stopped=rank in self._stopped,
            stacks=_text(self._files.stack_file(rank)),
            output=_text(self._files.output_file(rank)),
            log=log if log.exists() else None,
        )


class _Files(LogsSpecs):
    """Where torch's agent puts things: per rank a report, stacks, and output from before there is a log."""

    def __init__(self, scratch: Path, environment: Mapping[str, str]) -> None:
        super().__init__(str(scratch))
        self._scratch = scratch
        self._environment = environment

    @property
    def root_log_dir(self) -> str:
        """The folder, which goes when the run ends."""
        return str(self._scratch)

    def error_file(self, rank: int) -> Path:
        """The report of a rank."""
        return self._scratch / f"{rank}.json"

    def stack_file(self, rank: int) -> Path:
        """The stacks of a rank."""
        return self._scratch / f"{rank}.json{STACK_SUFFIX}"

    def output_file(self, rank: int) -> Path:
        """What a rank wrote to stderr before it had a log."""
        return self._scratch / f"{rank}.err"

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Add to every worker's environment, and say where its output goes; "" is the terminal."""
        for rank, env in envs.items():
            env.update(self._environment)
            env[ERROR_FILE_VARIABLE] = str(self.error_file(rank))
        others = {rank: "" if rank == 0 else str(self.output_file(rank)) for rank in envs}
        return LogsDest(
            stdouts={rank: path and os.devnull for rank, path in others.items()},
            stderrs=others,
            error_files={rank: str(self.error_file(rank)) for rank in envs},
        )


class _Rendezvous(RendezvousHandler):
    """One agent on one machine: a store that only this machine can reach, kept as long as the agent."""

    def __init__(self) -> None:
        self._store: TCPStore | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        """Return a new store, the workers' meeting point."""
        with socket.create_server((_ADDRESS, 0), backlog=socket.SOMAXCONN) as listener:
            port = listener.getsockname()[1]
            self._store = TCPStore(
                _ADDRESS,
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=_STORE_TIMEOUT,
                master_listen_fd=listener.detach(),
            )
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo(_ADDRESS, port))

    @property
    def use_agent_store(self) -> bool:
        """Yes: the store outlives any worker."""
        return True

    def get_backend(self) -> str:
        """Return a name."""
        return "petractl"

    def get_run_id(self) -> str:
        """Return a name for this launch."""
        return f"petractl-{os.getpid()}"

    def is_closed(self) -> bool:
        """No."""
        return False

    def set_closed(self) -> None:
        """Do nothing."""

    def num_nodes_waiting(self) -> int:
        """None: nobody joins later."""
        return 0

    def shutdown(self) -> bool:
        """Let the store go."""
        self._store = None
        return True


@contextlib.contextmanager
def _signals_left_alone() -> Iterator[None]:
    """Keep torch's agent from setting signal handlers: it needs one, and gets one that nobody sends."""
    before_variable = os.environ.get(_SIGNALS_VARIABLE)
    before = signal.getsignal(signal.SIGURG)
    os.environ[_SIGNALS_VARIABLE] = "SIGURG"
    try:
        yield
    finally:
        if before_variable is None:
            del os.environ[_SIGNALS_VARIABLE]
        else:
            os.environ[_SIGNALS_VARIABLE] = before_variable
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGURG, before)


def _send(pid: int, number: signal.Signals, *, to_group: bool = False) -> None:
    send: Callable[[int, int], None] = os.killpg if to_group else os.kill
    with contextlib.suppress(ProcessLookupError, PermissionError):
        send(pid, number)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
