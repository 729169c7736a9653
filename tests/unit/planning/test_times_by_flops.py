"""Times by FLOPs alone: of units, and of the stages that they make."""

import pytest
import torch

from petractl.methods.family import keepings, method_spec
from petractl.models.registry import build_model
from petractl.planning.costing import Clock, cost_net
from petractl.planning.flops import UnitCost
from petractl.planning.net import Net, times_by_flops

COSTS = [UnitCost(flops, 0, ((2, 3), (4,))) for flops in (1_000, 2_000, 3_000, 4_000)]
REVERSIBLE = [False, True, True, False]
CUTS, SPEEDS = (2, 4, 7), (1.0,) * 4


def net_of(method: str) -> Net:
    with torch.device("meta"):
        built = build_model("revnet18", classes=10, stem="cifar", width=8)
    return cost_net(
        built.units,
        built.names,
        method=method_spec(method),
        input_shape=(3, 32, 32),
        batch_size=4,
        clock=Clock(),
    )


def test_a_backward_recomputes_what_was_not_kept() -> None:
    def passes(method: str) -> list[float]:
        kept = keepings(method_spec(method), REVERSIBLE)
        times = times_by_flops(COSTS, kept, batch_size=10)
        assert [1e12 * t.forward_s for t in times] == pytest.approx([1e4, 2e4, 3e4, 4e4])
        return [round(t.backward_s / t.forward_s, 9) for t in times]

    # The head keeps its graph.
    assert passes("petra") == [3, 3, 3, 2]
    assert passes("backprop") == [2, 2, 2, 2]


def test_streams_go_down_with_the_gradient_where_they_are_rebuilt() -> None:
    petra = net_of("petra").stage_times(CUTS, speeds=SPEEDS)
    backprop = net_of("backprop").stage_times(CUTS, speeds=SPEEDS)
    labels = 8 * 4
    for j in (1, 2, 3):
        sent = petra[j - 1].message_up_bytes - labels
        assert petra[j - 1].message_up_bytes == backprop[j - 1].message_up_bytes
        assert backprop[j].message_down_bytes == sent
        rebuilt = j != 2  # unit 3 below that cut halves the image, and keeps its input
        assert petra[j].message_down_bytes == (2 if rebuilt else 1) * sent
    assert petra[0].message_down_bytes == 0
    assert petra[-1].message_up_bytes == 0


def test_stages_are_sums_of_their_units() -> None:
    net = net_of("petra")
    stages = net.stage_times(CUTS, speeds=(1.0, 2.0, 1.0, 1.0))
    assert stages[1].forward_s == pytest.approx(sum(t.forward_s for t in net.times[2:4]) / 2)
    assert stages[1].backward_s == pytest.approx(sum(t.backward_s for t in net.times[2:4]) / 2)
