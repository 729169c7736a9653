"""What `build` makes of a recipe; the names in the recipe's schema are those of the registries."""

from itertools import pairwise
from pathlib import Path

import pytest

from petractl import build
from petractl.data import list_datasets
from petractl.errors import RecipeError
from petractl.methods.family import METHODS, method_names, method_spec
from petractl.models.registry import list_models
from petractl.optim import DECAYS, OPTIMIZERS
from petractl.recipe import schema
from petractl.recipe.load import LoadedRecipe, load_recipe


def load(*overrides: str) -> LoadedRecipe:
    return load_recipe("digits_revnet18", overrides=["model.width=4", *overrides])


def test_the_schema_lists_the_registries_names() -> None:
    assert set(schema.MODEL_NAMES) == set(list_models())
    assert set(schema.DATASET_NAMES) == set(list_datasets())
    assert method_names() == schema.METHOD_NAMES
    assert set(schema.LOCKED_METHODS) == {spec.name for spec in METHODS if spec.locked}
    assert schema.OPTIMIZER_NAMES == OPTIMIZERS
    assert set(schema.TrainingSection.model_fields["lr_decay"].annotation.__args__) == set(DECAYS)
    keeps = set(schema.MethodSection.model_fields["keep"].annotation.__args__)
    assert keeps == {spec.keep for spec in METHODS if spec.name == "delayed"}


@pytest.mark.parametrize(
    ("overrides", "cuts", "lookahead"),
    [
        ([], tuple(range(1, 10)), tuple(range(9, -1, -1))),
        (["engine.schedule=paper"], tuple(range(1, 10)), tuple(range(18, -1, -2))),
        (["method.name=backprop", "partition.stages=auto"], (), (0,)),
        (["partition.stages=auto"], tuple(range(1, 10)), tuple(range(9, -1, -1))),
        (["partition.cuts=[3,7]"], (3, 7), (2, 1, 0)),
        (["partition.cuts=[3,7]", "engine.schedule=[5,1,0]"], (3, 7), (5, 1, 0)),
        (["partition.stages=3", "engine.slack=1"], None, (3, 2, 0)),
        (["partition.stages=5", "partition.balance=uniform"], (2, 4, 6, 8), (4, 3, 2, 1, 0)),
        (["partition.stages=2", "partition.balance=parameters"], (8,), (1, 0)),
    ],
)
def test_stages_and_lookahead(overrides: list[str], cuts: tuple[int, ...] | None, lookahead) -> None:
    plan = build.check(load(*overrides))
    assert cuts is None or plan.cuts == cuts
    assert len(plan.cuts) + 1 == len(plan.lookahead)
    assert plan.lookahead == lookahead


def test_the_chosen_cuts_are_in_the_resolved_recipe() -> None:
    plan = build.check(load("partition.stages=3"))
    assert plan.recipe.partition.cuts == plan.cuts
    assert len(plan.cuts) == 2


def test_flops_balance_the_stages() -> None:
    plan = build.check(load("partition.stages=4"))
    bounds = [0, *plan.cuts, 10]
    sums = [sum(c.flops for c in plan.costs[a:b]) for a, b in pairwise(bounds)]
    assert max(sums) <= 1.5 * sum(sums) / 4


def test_cuts_and_lookaheads_by_measured_times_are_written_down() -> None:
    plan = build.check(load("partition.stages=3", "partition.balance=time", "engine.schedule=least"))
    assert len(plan.cuts) == 2
    assert plan.recipe.partition.cuts == plan.cuts
    assert plan.recipe.engine.schedule == plan.lookahead
    assert len(plan.lookahead) == 3
    assert plan.lookahead[-1] == 0
    assert list(plan.lookahead) == sorted(plan.lookahead, reverse=True)


def test_the_plan_says_what_each_stage_keeps() -> None:
    stages = build.build(build.check(load())).plan.stages
    assert [stage.keeps for stage in stages] == [
        "input" if stage.index in (0, 3, 5, 7) else "nothing" for stage in stages
    ]
    two = build.build(build.check(load("partition.cuts=[4]"))).plan.stages
    assert [stage.keeps for stage in two] == ["input of 2 of 4 units", "nothing"]
    stashed = build.build(build.check(load("method.name=delayed", "method.keep=parameters"))).plan.stages
    assert stashed[0].keeps == "input + parameters"
    assert stashed[1].keeps == "parameters"


def test_every_problem_is_told_at_once() -> None:
    loaded = load("partition.stages=99", "engine.device=cuda:77", "method.name=reversible")
    with pytest.raises(RecipeError) as raised:
        build.check(loaded)
    assert {problem.key for problem in raised.value.problems} >= {"engine.device", "partition.stages"}


@pytest.mark.parametrize("keep", ["", "graph", "inputs", "parameters", "inputs+parameters"])
def test_rows_of_the_table_are_found(keep: str) -> None:
    assert method_spec("delayed", keep=keep).keep == (keep or "graph")


def test_unknown_rows_are_told() -> None:
    with pytest.raises(ValueError, match="known: petra"):
        method_spec("petr")
    with pytest.raises(ValueError, match="known: graph"):
        method_spec("delayed", keep="grph")


def test_weights_depend_on_the_seed_alone() -> None:
    def first(*overrides: str) -> bytes:
        network = build.build_network(build.check(load(*overrides)))
        return b"".join(p.detach().numpy().tobytes() for p in network.parameters())

    assert first() == first("partition.stages=2", "method.name=backprop")
    assert first() != first("run.seed=1")


def test_starting_weights_of_another_class_count_leave_the_head(tmp_path) -> None:
    from petractl.models.weights import save_weights

    save_weights(build.build_network(build.check(load("model.classes=12"))), tmp_path / "w.safetensors")
    built = build.build(build.check(load(f"model.weights={Path(tmp_path) / 'w.safetensors'}")))
    assert built.left_weights
    assert all(name.startswith("units.9.") for name in built.left_weights)
