"""Preparing batches ahead of their use in processes of their own: decoding holds Python's interpreter lock.

torch's `DataLoader` does it, told which jobs to do in which order; what is added here are its ends. Workers
come from a fork server, which has torch imported but neither threads nor a CUDA context. They take no Ctrl-C
(the process that trains decides what that means), and they are gone when it is gone, however it went. An
error that is the data's is raised as it was; a worker that is killed is an error that says so.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from types import FrameType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from petractl.data.prefetch import JOBS_PER_WORKER, prepared
from petractl.errors import RunError, UserError

if TYPE_CHECKING:
    from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

J = TypeVar("J")
R = TypeVar("R")

MOST_WORKERS = 8
_PRELOADED = "petractl.data.preloaded"
_END_NOTICE_S = 2.0
"""How long a worker whose message broke off may take to be dead."""


def automatic_workers(*, on_cpu: bool, processes: int) -> int:
    """Return how many workers suit one of `processes` on this machine: none where the CPU trains."""
    return 0 if on_cpu else min(MOST_WORKERS, max(1, usable_cores() // processes))


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def prepared_by_processes(
    jobs: Iterable[J], prepare: Callable[[J], R], *, workers: int, pin: bool = False
) -> Generator[R, None, None]:
    """Yield `prepare(job)` for each job in order, by `workers` processes (0: by the caller's own).

    `jobs` is only ever advanced here; `prepare` and its results must pickle. `pin`: results with a
    `pin_memory` method come from pinned memory. An error of `prepare` is raised in its job's turn. Closing or
    dropping the iterator ends the processes. Raises `RunError` where one of them is killed.
    """
    if workers == 0:
        yield from prepared(jobs, prepare, workers=0)
        return
    results = _started(jobs, prepare, workers=workers, pin=pin)
    try:
        while True:
            try:
                result = next(results)
            except StopIteration:
                return
            except _SIGNS_OF_AN_END as error:
                lost = _lost_worker(error, results)
                if lost is None:
                    raise
                raise lost from error
            if isinstance(result, _Failure):
                raise result.error
            yield result
    finally:
        # Its own end would come when nothing refers to it any more: a traceback can make that late.
        results._shutdown_workers()


@dataclass(frozen=True, slots=True)
class _Failure:
    """The user's error that a worker met, as it was: torch would put a traceback in its message."""

    error: UserError


class _Jobs(Generic[J, R]):
    """What a worker does, as the data set that torch takes it for."""

    def __init__(self, prepare: Callable[[J], R]) -> None:
        self._prepare = prepare

    def __getitem__(self, job: J) -> R | _Failure:
        try:
            return self._prepare(job)
        except UserError as error:
            return _Failure(error)


def _started(
    jobs: Iterable[J], prepare: Callable[[J], R], *, workers: int, pin: bool
) -> _MultiProcessingDataLoaderIter:
    # Imported here because torch takes seconds.
    import torch
    from torch.utils.data import DataLoader

    start_server()
    loader: DataLoader[Any] = DataLoader(
        cast(Any, _Jobs(prepare)),
        batch_size=None,
        sampler=jobs,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        prefetch_factor=JOBS_PER_WORKER,
        multiprocessing_context="forkserver",
        worker_init_fn=_begin_worker,
        # Its own, or it would draw from the one that dropout draws from.
        generator=torch.Generator(),
    )
    results: _BaseDataLoaderIter = iter(loader)
    return cast("_MultiProcessingDataLoaderIter", results)


def _as_it_is(result: R) -> R:
    return result


def start_server() -> None:
    """Start the fork server, once; it imports what workers need while this process goes on.

    Ctrl-C is blocked in it: its children inherit that.
    """
    # A worker imports what the main module of this process imports, and the server can do that for all.
    ours = sorted(name for name in sys.modules if name.startswith("petractl."))
    multiprocessing.set_forkserver_preload([_PRELOADED, *ours])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(_number: int) -> None:
    """Bind this worker's life to that of the process that it works for.

    torch watches this process's parent, which is the fork server; and that lives as long as its children.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _outlive_first)
    threading.Thread(target=_end_with_parent, name="petractl-parent", daemon=True).start()


def _outlive_first(number: int, frame: FrameType | None) -> None:
    """Outlive one signal: systemd and Slurm tell all processes of a run to stop, and it saves first."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# A worker that is killed is noticed by torch, or by the breaking off of what it was sending.
_SIGNS_OF_AN_END = (RuntimeError, EOFError, OSError)


def _lost_worker(error: Exception, results: _MultiProcessingDataLoaderIter) -> RunError | None:
    """Return what to raise where an error means that a worker is gone; None where it means something else."""
    workers = cast(Sequence[Any], results._workers)
    is_told = re.search(r"DataLoader worker \(pid", str(error)) is not None
    end = time.monotonic() + (0.0 if is_told else _END_NOTICE_S)
    while not (gone := [worker for worker in workers if worker.exitcode]) and time.monotonic() < end:
        time.sleep(0.01)
    if not gone and not is_told:
        return None
    how = "; ".join(f"pid {worker.pid}: {_end(worker.exitcode)}" for worker in gone) or str(error)
    return RunError(
        f"a process that prepares data is gone ({how})",
        where="data.workers",
        hint="out of memory is the usual cause: set fewer data.workers or a smaller data.batch_size; where "
        "/dev/shm is small (SIGBUS), give the container more (docker run --shm-size=8g)",
    )


def _end(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
