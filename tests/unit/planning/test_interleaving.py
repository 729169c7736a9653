"""Interleaved pipelines of real stages, two per process."""

import pytest
import torch

from petractl.methods.family import method_spec
from petractl.models.registry import build_model
from petractl.planning.costing import Clock, cost_net
from petractl.planning.exact_schedules import kept_by_stage
from petractl.planning.interleaving import interleaved_cuts
from petractl.planning.net import Net
from petractl.planning.simulation import simulate, timeline
from petractl.planning.times import StageTimes

NAME = "interleaved-1f1b"
TIMES = (StageTimes(0.02, 0.04), StageTimes(0.04, 0.08))
HALVES = (StageTimes(0.01, 0.02), StageTimes(0.02, 0.04)) * 2


@pytest.fixture(scope="module")
def net() -> Net:
    with torch.device("meta"):
        built = build_model("revnet34", classes=10, stem="cifar", width=8)
    return cost_net(
        built.units,
        built.names,
        method=method_spec("backprop"),
        input_shape=(3, 32, 32),
        batch_size=16,
        clock=Clock(),
    )


def test_halves_given_are_halves_made() -> None:
    made = simulate(NAME, TIMES, accumulation=4)
    assert simulate(NAME, TIMES, accumulation=4, chunks=HALVES) == made
    spans = timeline(NAME, TIMES, num_microbatches=4, accumulation=4)
    assert timeline(NAME, TIMES, num_microbatches=4, accumulation=4, chunks=HALVES) == spans


def test_unequal_stages_are_slower_and_the_limit_is_of_processes() -> None:
    uneven = (
        StageTimes(0.015, 0.03),
        StageTimes(0.03, 0.06),
        StageTimes(0.005, 0.01),
        StageTimes(0.01, 0.02),
    )
    found = simulate(NAME, TIMES, accumulation=4, chunks=uneven)
    even = simulate(NAME, TIMES, accumulation=4)
    assert found.limit_per_s == pytest.approx(even.limit_per_s)
    assert found.microbatches_per_s < even.microbatches_per_s


def test_chunks_are_two_for_each_process_and_for_nothing_else() -> None:
    with pytest.raises(ValueError, match="3 stages for 2 processes"):
        simulate(NAME, TIMES, accumulation=4, chunks=HALVES[:3])
    assert simulate("tight", TIMES, chunks=HALVES) == simulate("tight", TIMES)


def test_cuts(net: Net) -> None:
    cuts = interleaved_cuts(net, accumulation=4, speeds=(1.0,) * 4)
    assert cuts is not None
    assert len(cuts) == 7
    assert interleaved_cuts(net, accumulation=4, speeds=(1.0,) * 10) is None
    quick = interleaved_cuts(net, accumulation=4, speeds=(1.0, 4.0))
    assert quick is not None
    sizes = [b - a for a, b in zip((0, *quick), (*quick, net.num_units), strict=True)]
    assert sizes[1] + sizes[3] > sizes[0] + sizes[2]


def test_what_each_stage_keeps() -> None:
    assert kept_by_stage("gpipe", num_places=3, accumulation=5) == (5, 5, 5)
    assert kept_by_stage("1f1b", num_places=3, accumulation=5) == (3, 2, 1)
    # Weight gradients come p backwards late, and hold their microbatch until then.
    assert kept_by_stage("zero-bubble", num_places=3, accumulation=6) == (3, 3, 3)
    lower, upper = kept_by_stage(NAME, num_places=2, accumulation=4)[::2]
    assert lower > upper >= 1
