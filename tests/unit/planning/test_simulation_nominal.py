import pytest

from petractl.methods.family import keepings, method_spec
from petractl.planning.flops import UnitCost
from petractl.planning.nominal import nominal_times
from petractl.planning.times import StageTimes

COSTS = [UnitCost(flops, 0, ((2, 3), (4,))) for flops in (1_000, 2_000, 3_000, 4_000)]
REVERSIBLE = [False, True, True, False]


def times(method: str) -> tuple[StageTimes, ...]:
    kept = keepings(method_spec(method), REVERSIBLE)
    return nominal_times(COSTS, kept=kept, cuts=(2, 3), batch_size=10)


def test_a_backward_recomputes_what_was_not_kept() -> None:
    petra, backprop = times("petra"), times("backprop")
    assert [1e9 * t.forward_s for t in petra] == pytest.approx([30, 30, 40])
    # The head keeps its graph.
    assert [1e9 * t.backward_s for t in petra] == pytest.approx([90, 90, 80])
    assert [1e9 * t.backward_s for t in backprop] == pytest.approx([60, 60, 80])


def test_streams_go_down_with_the_gradient_where_they_are_rebuilt() -> None:
    size = 10 * 10 * 4
    assert [t.message_up_bytes for t in times("petra")] == [size, size, 0]
    assert [t.message_down_bytes for t in times("petra")] == [0, 2 * size, 2 * size]
    assert [t.message_down_bytes for t in times("backprop")] == [0, size, size]
