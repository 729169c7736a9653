"""What exact pipelines send, counted from shapes."""

import pytest

from petractl import build
from petractl.bench.usage import exact_bytes
from petractl.recipe.load import load_recipe


@pytest.fixture(scope="module")
def plan() -> build.CheckedPlan:
    overrides = ["model.width=4", "partition.cuts=[1,9]", "data.batch_size=3", "engine.device=cpu"]
    return build.check(load_recipe("digits_revnet18", overrides=overrides))


def test_outputs_go_up_and_gradients_down(plan: build.CheckedPlan) -> None:
    stem, last = 2 * 4 * 8 * 8 * 4, 2 * 32 * 1 * 1 * 4  # two streams, 8x8 and 1x1, float32
    assert [cost.output_shapes for cost in (plan.costs[0], plan.costs[8])] == [
        ((4, 8, 8), (4, 8, 8)),
        ((32, 1, 1), (32, 1, 1)),
    ]
    assert exact_bytes(plan, [0]) == 3 * stem
    assert exact_bytes(plan, [1]) == 3 * (stem + last)
    assert exact_bytes(plan, [2]) == 3 * last
    assert exact_bytes(plan, [0, 2]) == 3 * (stem + last)
