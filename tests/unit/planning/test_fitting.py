"""The bytes of every stage at once: those of the memory model, and soon there."""

import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from petractl.methods.family import keepings, method_spec
from petractl.models.registry import BuiltModel, build_model
from petractl.models.units import is_reversible
from petractl.planning.fitting import StageBytes, fitting
from petractl.planning.footprint import Footprint, trace_footprints
from petractl.planning.memory import MemoryModel, cuts_by_memory
from petractl.planning.optimal import optimal_cuts


@pytest.fixture(scope="module")
def built() -> BuiltModel:
    with torch.device("meta"):
        return build_model("revnet18", classes=10, stem="cifar", width=16)


def traced(built: BuiltModel, method: str, keep: str = "") -> tuple[Footprint, ...]:
    kept = keepings(method_spec(method, keep=keep), [is_reversible(unit) for unit in built.units])
    return trace_footprints(built.units, kept, input_shape=(3, 32, 32), samples=8)


@pytest.mark.parametrize(
    ("method", "keep"), [("petra", ""), ("backprop", ""), ("delayed", "inputs+parameters")]
)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("formats", [("float32", "float32"), ("bfloat16", "int8")])
def test_they_are_the_models(
    built: BuiltModel, method: str, keep: str, accumulation: int, formats: tuple[str, str]
) -> None:
    model = MemoryModel(
        traced(built, method, keep), samples=8, accumulation=accumulation, number_formats=formats
    )
    lists: list[Sequence[int]] = [(3, 2, 1, 0), (6, 4, 2, 0), (9, 9, 3, 0), (0, 0, 0), (5, 0), (0,)]
    lists += [(20, 15, 11, 8, 6, 5, 0)]  # more kinds of neighbours than are remembered
    for lookahead in lists:
        sizes = StageBytes(model)
        last = len(lookahead) - 1
        for stage in (*range(last + 1), *range(last + 1)):
            found, wanted = sizes.of(lookahead, stage), model.bytes_of(lookahead, stage)
            rows = slice(model.num_units if stage == last else 0, None)
            columns = slice(0, None if stage else 1)
            assert np.array_equal(found[rows, columns], wanted[rows, columns]), (lookahead, stage)


def test_without_limits_there_is_nothing_to_fit(built: BuiltModel) -> None:
    model = MemoryModel(traced(built, "petra"), samples=8)
    assert fitting(model, (1, 0), (None, None)) is None
    fits = fitting(model, (1, 0), (None, 1))
    assert fits is not None
    assert fits(0).all()
    assert not fits(1).any()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_thousand_units_on_64_devices_in_a_second(built: BuiltModel, accumulation: int) -> None:
    first, *inner, head = traced(built, "delayed", "inputs+parameters")
    footprints = [first, *(inner * 200)[:998], head]
    model = MemoryModel(footprints, samples=8, accumulation=accumulation)
    lookahead = tuple(range(63, -1, -1))
    times = np.random.default_rng(0).uniform(0.5, 1.5, 1000)

    def most(cuts: Sequence[int]) -> int:
        return max(int(stage.total) for stage in model.stages(cuts, lookahead=lookahead))

    free = optimal_cuts(times, num_stages=64)
    assert free is not None
    limit = most(free) * 9 // 10
    seconds = []
    for _ in range(2):
        started = time.process_time()
        cuts = optimal_cuts(times, num_stages=64, fits=fitting(model, lookahead, [limit] * 64))
        seconds.append(time.process_time() - started)
        assert cuts is not None
        assert most(cuts) <= limit
    assert min(seconds) < 1.0
    started = time.process_time()
    by_memory = cuts_by_memory(model, lookahead)
    assert time.process_time() - started < 1.0
    assert most(by_memory) <= most(cuts)
