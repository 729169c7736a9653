"""Processes that prepare data: in order, the same bits, and gone when they should be."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from photograph_cases import photograph_data

from petractl.data.values import Batch
from petractl.data.worker_processes import automatic_workers, prepared_by_processes, usable_cores
from petractl.errors import DataError, RunError

HERE = Path(__file__).parent


def _pid(job: int) -> tuple[int, int]:
    return job, os.getpid()


def _workers_of(pid: int) -> list[int]:
    """Return the workers of a process: the children of its fork server."""
    return _children_of(set(_children_of({pid})))


def _children_of(parents: set[int]) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) in parents and state not in "ZX":
                found.append(int(entry.name))
    return sorted(found)


def _wait_until_gone(pids: list[int], *, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while any(map(_is_alive, pids)):
        assert time.monotonic() < end, f"still there: {pids}"
        time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _same(left: Iterator[Batch], right: Iterator[Batch]) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.index == other.index
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_results_come_in_order_from_processes_of_their_own() -> None:
    results = list(prepared_by_processes(range(12), _pid, workers=2))
    assert [job for job, _ in results] == list(range(12))
    pids = {pid for _, pid in results}
    assert len(pids) == 2
    assert os.getpid() not in pids
    _wait_until_gone(list(pids))


def test_no_workers_are_the_process_itself() -> None:
    assert list(prepared_by_processes(range(2), _pid, workers=0)) == [(0, os.getpid()), (1, os.getpid())]


def test_workers_change_no_bit_and_draw_no_random_number() -> None:
    data = photograph_data(15, 12, 7, shuffle_buffer=8)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for epoch, workers in ((0, 1), (1, 3)):
        alone, helped = (data.train_loader(batch_size=4, workers=n) for n in (0, workers))
        _same(alone.epoch(epoch), helped.epoch(epoch))
        _same(alone.epoch(epoch, start=5), helped.epoch(epoch, start=5))
    _same(iter(data.eval_loader(batch_size=4)), iter(data.eval_loader(batch_size=4, workers=2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_closing_or_dropping_an_epoch_leaves_no_worker() -> None:
    loader = photograph_data(200).train_loader(batch_size=4, workers=2)
    epoch = loader.epoch(0)
    next(epoch)
    workers = _workers_of(os.getpid())
    assert len(workers) == 2
    epoch.close()
    _wait_until_gone(workers)
    for _ in loader.epoch(1):
        workers = _workers_of(os.getpid())
        assert len(workers) == 2
        break
    _wait_until_gone(workers)


def test_an_epoch_that_is_never_begun_starts_no_process() -> None:
    epoch = photograph_data(20).train_loader(batch_size=4, workers=2).epoch(0)
    assert _workers_of(os.getpid()) == []
    epoch.close()


def test_an_error_of_the_data_comes_in_its_turn_and_ends_the_workers() -> None:
    data = photograph_data(20, bad={7: "image"})
    epoch = data.eval_loader(batch_size=4, split="train", workers=2).__iter__()
    assert [next(epoch).index for _ in range(1)] == [0]
    workers = _workers_of(os.getpid())
    with pytest.raises(DataError, match="sample '0007'") as caught:
        next(epoch)
    assert caught.value.where == "train-0.tar"
    assert "data.on_error" in caught.value.hint
    _wait_until_gone(workers)


def test_skipped_samples_come_with_their_batch() -> None:
    data = photograph_data(20, bad={7: "image"}, on_error="skip")
    loader = data.eval_loader(batch_size=4, split="train", workers=2)
    assert [len(batch.labels) for batch in loader] == [4, 3, 4, 4, 4]
    assert [(bad.place, bad.key) for bad in loader.skipped] == [("train-0.tar", "0007")]


def test_a_bug_keeps_its_traceback() -> None:
    loader = photograph_data(20, bad={7: "bug"}).eval_loader(batch_size=4, split="train", workers=1)
    with pytest.raises(KeyError, match="a bug of ours"):
        list(loader)


def test_a_worker_that_is_killed_is_told_and_nothing_hangs() -> None:
    loader = photograph_data(40, bad={13: "killed"}).eval_loader(batch_size=4, split="train", workers=2)
    with pytest.raises(RunError, match=r"is gone \(pid \d+: killed by SIGKILL\)") as caught:
        list(loader)
    assert caught.value.where == "data.workers"
    assert "out of memory" in caught.value.hint
    _wait_until_gone(_workers_of(os.getpid()))


_PARENT = """
import sys
sys.path.insert(0, {here!r})
from photograph_cases import photograph_data
if __name__ == "__main__":
    loader = photograph_data(100, slow_s=0.01).train_loader(batch_size=4, workers=2, steps_per_epoch={steps})
    for batch in loader.epoch(0):
        print(batch.index, flush=True)
    print("done", flush=True)
"""


@pytest.fixture
def parent(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """Start a process that reads so many batches, and wait for the first."""
    script = tmp_path / "parent.py"
    script.write_text(_PARENT.format(here=str(HERE), steps=request.param))
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("parent", [100_000], indirect=True)
def test_no_worker_outlives_a_parent_that_is_killed(parent: subprocess.Popen[str]) -> None:
    workers, servers = _workers_of(parent.pid), _children_of({parent.pid})
    assert len(workers) == 2
    assert len(servers) == 2, "the fork server and the resource tracker"
    parent.kill()
    parent.wait()
    _wait_until_gone([*workers, *servers])


@pytest.mark.parametrize("parent", [100], indirect=True)
def test_ctrl_c_is_the_parents_to_take(parent: subprocess.Popen[str]) -> None:
    workers = _workers_of(parent.pid)
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.kill(pid, signal.SIGINT)
    assert parent.stdout is not None
    assert parent.stdout.read().endswith("done\n")
    assert parent.wait() == 0
    _wait_until_gone(workers)


@pytest.mark.parametrize("parent", [100_000], indirect=True)
def test_workers_outlive_a_signal_to_the_whole_run(parent: subprocess.Popen[str]) -> None:
    """systemd and Slurm send SIGTERM to every process; the run must still save, and its end ends them."""
    workers = _workers_of(parent.pid)
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.5)
    assert all(map(_is_alive, workers))
    os.kill(workers[0], signal.SIGTERM)
    _wait_until_gone(workers[:1])


def test_the_automatic_number_leaves_a_cpu_to_the_training() -> None:
    assert automatic_workers(on_cpu=True, processes=1) == 0
    assert automatic_workers(on_cpu=False, processes=1) == min(8, usable_cores())
    assert automatic_workers(on_cpu=False, processes=10**6) == 1
