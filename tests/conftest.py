"""One thread for every test, tests beside each other on a machine's cores, and those that measure time alone.

One thread gives the same bits everywhere, and no fight for the cores. A run of all tests takes up to four
cores, one test on each; a run of named files starts no workers, which would cost seconds. Tests that share
what one has made, a run that was trained say, stay on one worker, so that it is made once. A test that
measures time is marked `alone`: while it runs the other workers wait.
"""

import fcntl
import os
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

# For the processes that tests start, and for what sets the threads anew in this one.
os.environ["OMP_NUM_THREADS"] = "1"

# A job in the background of a script, or under nohup, starts with signals ignored; so would what tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

_MOST_WORKERS = 4
_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return how many workers run the tests; 0 for none but this process."""
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return 0
    cores = len(os.sched_getaffinity(0))
    return min(cores, _MOST_WORKERS) if cores > 1 else 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests that share a fixture on one worker."""
    for item in items:
        if _shares(item):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


def _shares(item: pytest.Item) -> bool:
    info = getattr(item, "_fixtureinfo", None)  # pytest has no public name for what a test is given
    found = info.name2fixturedefs if info is not None else {}
    return any(each.scope in ("module", "class") for defined in found.values() for each in defined)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let a test that is marked `alone` run while no other does."""
    if not _IS_WORKER:
        return (yield)
    with _room(_folder_of_all_workers(item.config), alone=item.get_closest_marker("alone") is not None):
        return (yield)


def _folder_of_all_workers(config: pytest.Config) -> Path:
    factory = config._tmp_path_factory  # type: ignore[attr-defined]  # of pytest itself, before any fixture
    return Path(factory.getbasetemp().parent)


@contextmanager
def _room(folder: Path, *, alone: bool) -> Iterator[None]:
    """Hold a lock that many tests share, or one has alone; who waits for it lets no other one in."""
    with (folder / "door.lock").open("a") as door, (folder / "room.lock").open("a") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)  # also where a process that a test left has the file


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
