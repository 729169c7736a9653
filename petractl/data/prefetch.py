"""Preparing batches ahead of their use, in order, without leaving anything behind.

Threads, not processes: the work is NumPy copying, which releases the interpreter lock, and threads share the
set in memory. Results are yielded in the order of the jobs, so that their number changes the speed and
nothing else. A bounded number of jobs is under way; closing or dropping the iterator ends its threads.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from petractl.one_thread import compute_alone

J = TypeVar("J")
R = TypeVar("R")

JOBS_PER_WORKER = 2
"""Jobs under way or done ahead of the consumer, per worker."""


def prepared(jobs: Iterable[J], prepare: Callable[[J], R], *, workers: int) -> Generator[R, None, None]:
    """Yield `prepare(job)` for each job in order, by `workers` background threads (0: by the caller's).

    `jobs` is only ever advanced in the caller's thread. An error of `prepare` is raised in its job's turn.
    """
    if workers == 0:
        yield from map(prepare, jobs)
        return
    queue = iter(jobs)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="petractl-data", initializer=compute_alone)
    try:
        first = islice(queue, workers * JOBS_PER_WORKER)
        pending: deque[Future[R]] = deque(pool.submit(prepare, job) for job in first)
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(prepare, job) for job in islice(queue, 1))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
