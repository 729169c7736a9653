import threading
import time
from collections.abc import Iterator

import pytest

from petractl.data.prefetch import JOBS_PER_WORKER, prepared


def _data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("petractl-data")]


def _slow_for_even(job: int) -> int:
    time.sleep(0.002 if job % 2 == 0 else 0.0)
    return job * job


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_results_come_in_the_order_of_the_jobs(workers: int) -> None:
    assert list(prepared(range(20), _slow_for_even, workers=workers)) == [job * job for job in range(20)]
    assert _data_threads() == []


@pytest.mark.parametrize("workers", [0, 3])
def test_no_jobs_no_results(workers: int) -> None:
    assert list(prepared([], _slow_for_even, workers=workers)) == []


def test_no_more_jobs_are_taken_than_the_queue_may_hold() -> None:
    taken: list[int] = []

    def jobs() -> Iterator[int]:
        for job in range(100):
            taken.append(job)
            assert threading.current_thread() is threading.main_thread()
            yield job

    results = prepared(jobs(), _slow_for_even, workers=2)
    next(results)
    next(results)
    assert len(taken) <= 2 + 2 * JOBS_PER_WORKER
    results.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_in_its_turn_and_ends_the_threads(workers: int) -> None:
    def prepare(job: int) -> int:
        if job == 3:
            raise ValueError("job 3")
        return job

    results = prepared(range(10), prepare, workers=workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="job 3"):
        next(results)
    assert _data_threads() == []


def test_closing_leaves_no_thread() -> None:
    results = prepared(range(100), _slow_for_even, workers=3)
    next(results)
    assert len(_data_threads()) == 3
    results.close()
    assert _data_threads() == []


def test_dropping_the_iterator_leaves_no_thread() -> None:
    for result in prepared(range(100), _slow_for_even, workers=3):
        if result == 16:
            break
    assert _data_threads() == []
