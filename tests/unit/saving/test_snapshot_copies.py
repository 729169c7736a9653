"""Copies for a checkpoint do not take the memory that training needs."""

import pytest
import torch

from petractl.saving.snapshot import copy_of, fits_beside

GIB = 2**30


@pytest.mark.parametrize(
    ("needed", "left", "allocated", "peak", "fits"),
    [
        (2 * GIB, 10 * GIB, 5 * GIB, 5 * GIB, True),
        (2 * GIB, 10 * GIB, 5 * GIB, 13 * GIB, True),
        (2 * GIB, 10 * GIB, 5 * GIB, 13 * GIB + 1, False),
        (11 * GIB, 10 * GIB, 5 * GIB, 5 * GIB, False),
        (2 * GIB, 10 * GIB, 6 * GIB, 5 * GIB, True),
    ],
)
def test_training_may_get_to_its_peak_again(
    needed: int, left: int, allocated: int, peak: int, fits: bool
) -> None:
    assert fits_beside(needed, left=left, allocated=allocated, peak=peak) is fits


@pytest.mark.parametrize("stays", [True, False])
def test_a_copy_is_a_copy(stays: bool) -> None:
    x = torch.ones(3, requires_grad=True)
    copy = copy_of(x, stays=stays)
    with torch.no_grad():
        x += 1
    assert copy.tolist() == [1, 1, 1]
    assert not copy.requires_grad


def test_where_the_device_has_no_room_after_all_the_host_has(monkeypatch) -> None:
    def refuse(self: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "clone", refuse)
    assert copy_of(torch.ones(3), stays=True).tolist() == [1, 1, 1]
