"""Whether numbers are finite: at once, or by flags that stay on the device for a while."""

import math

import pytest
import torch

from petractl.engine.finiteness import FlagsOnDevice, are_finite, look_finite

CPU = torch.device("cpu")
BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_one_bad_element_is_found(bad: float, dtype: torch.dtype) -> None:
    x = torch.ones(3, 5, 7, dtype=dtype)
    assert look_finite([x])
    assert are_finite([x])
    x[1, 2, 3] = bad
    assert not look_finite([x])
    assert not are_finite([x])


def test_infinities_that_cancel_are_found() -> None:
    assert not look_finite([torch.tensor([math.inf, -math.inf])])
    assert not look_finite([torch.tensor([math.inf]), torch.tensor([-math.inf])])


def test_a_sum_that_overflows_is_not_a_bad_number() -> None:
    assert look_finite([torch.full((4,), 3e38)])
    assert look_finite([torch.full((70_000,), 1.0, dtype=torch.float16)])


def test_what_a_unit_passes_on_is_not_looked_at_again() -> None:
    passed, made = torch.tensor([math.nan]), torch.ones(2)
    assert look_finite([made, passed], [passed])
    assert not look_finite([made, passed], [made])


def test_other_numbers_and_nothing_are_finite() -> None:
    assert look_finite(
        [None, torch.tensor([1, 2]), torch.tensor([True]), torch.ones(2, dtype=torch.complex64)]
    )
    assert not look_finite([torch.tensor([complex(0, math.inf)])])
    assert look_finite([])
    assert look_finite([torch.empty(0)])


@pytest.mark.parametrize("bad", BAD)
def test_flags_tell_which_note_was_bad_once_they_are_read(bad: float) -> None:
    flags: FlagsOnDevice[str] = FlagsOnDevice(CPU)
    flags.note("good", [torch.full((9,), 3e38), None])
    flags.note("bad", [torch.ones(2), torch.tensor([1.0, bad, -1.0])])
    assert flags.read(wait=True) == []
    flags.note("bad too", [torch.tensor([bad], dtype=torch.float64)])
    flags.note("whole numbers", [torch.tensor([3])])
    flags.send()
    assert flags.read() == ["bad", "bad too"]
    flags.send()
    assert flags.read(wait=True) == []


def test_a_double_that_no_float_can_hold_is_finite() -> None:
    flags: FlagsOnDevice[str] = FlagsOnDevice(CPU)
    flags.note("double", [torch.tensor([1e300], dtype=torch.float64)])
    flags.note("float", [torch.ones(1)])
    flags.note("complex", [torch.tensor([complex(0, math.nan)])])
    flags.send()
    assert flags.read() == ["complex"]
