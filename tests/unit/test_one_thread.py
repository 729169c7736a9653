"""What runs beside the training takes no pool of threads of its own, and leaves the training's alone."""

import threading
from collections.abc import Iterator

import pytest
import torch

from petractl.data.prefetch import prepared
from petractl.engine import links
from petractl.saving.writer import BackgroundWriter


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_the_writer() -> None:
    found: list[int] = []
    writer = BackgroundWriter("test")
    writer.submit(lambda: found.append(torch.get_num_threads()))
    writer.wait()
    assert found == [1]


def test_links() -> None:
    found: list[int] = []
    thread: threading.Thread = links._start(lambda: found.append(torch.get_num_threads()), "test")
    thread.join()
    assert found == [1]


def test_prefetching() -> None:
    assert list(prepared(range(3), lambda _: torch.get_num_threads(), workers=1)) == [1, 1, 1]
