"""What `build` makes of a recipe; the names in the recipe's schema are those of the registries."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from petractl import build
from petractl.build.parts import data_request, num_workers
from petractl.data import list_datasets
from petractl.errors import RecipeError
from petractl.methods.family import METHODS, method_names, method_spec
from petractl.models.registry import list_models
from petractl.optim import DECAYS, OPTIMIZERS
from petractl.planning.message_cost import MessageCost
from petractl.planning.times import Link
from petractl.recipe import schema
from petractl.recipe.find import list_recipes
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
    assert plan.recipe.engine.schedule == "least"
    assert plan.recipe.engine.lookahead == plan.lookahead
    assert len(plan.lookahead) == 3
    assert plan.lookahead[-1] == 0
    assert list(plan.lookahead) == sorted(plan.lookahead, reverse=True)


def test_lookaheads_once_chosen_are_kept() -> None:
    chosen = ("partition.cuts=[4, 7]", "engine.schedule=least", "engine.lookahead=[7, 3, 0]")
    assert build.check(load(*chosen)).lookahead == (7, 3, 0)
    with pytest.raises(RecipeError, match="3 entries for 2 stages"):
        build.check(load(*chosen[1:], "partition.cuts=[4]"))


def test_least_counts_the_way_of_messages_between_processes(monkeypatch) -> None:
    slow = MessageCost(link=Link(latency_s=0.1))
    monkeypatch.setattr("petractl.planning.costing.measure_messages", lambda _: slow)
    settings = ("partition.stages=3", "engine.schedule=least")
    alone = build.check(load(*settings, "engine.mode=in-process")).lookahead
    apart = build.check(load(*settings, "engine.mode=processes")).lookahead
    assert alone[0] <= 2 < apart[1] < apart[0]


@pytest.mark.parametrize("balance", ["time", "memory"])
def test_cuts_for_a_run_are_those_of_the_planner(balance: str) -> None:
    settings = ("partition.stages=4", f"partition.balance={balance}", "engine.mode=processes")
    plan = build.check(load(*settings, "method.accumulation=2"))
    assert len(plan.cuts) == 3
    assert build.check(load(*settings, "method.accumulation=2")).cuts == plan.cuts, "times are cached"


def test_no_stage_gets_more_than_its_gpu_holds(monkeypatch) -> None:
    monkeypatch.setattr("petractl.build.measured._memory_bytes", lambda _: 2**20)
    with pytest.raises(RecipeError) as raised:
        build.check(load("partition.stages=4", "partition.balance=time", "engine.mode=processes"))
    (problem,) = raised.value.problems
    assert problem.what.startswith("no cut into 4 stages fits in the memory of cpu")


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


def test_a_set_is_asked_only_for_what_it_has_a_use_for() -> None:
    asked = data_request(load("data.image_size=99", "data.max_skipped=3", "data.resident=true").recipe)
    assert asked == {"train": "", "val": "", "resident": True}
    overrides = ["data.name=shards", "data.image_size=99", "data.on_error=skip", "data.max_skipped=3"]
    asked = data_request(load(*overrides).recipe)
    assert (asked["image_size"], asked["max_skipped"]) == (99, 3)
    assert asked["image_entries"] == ("jpg", "jpeg", "png")
    assert "fake_samples" not in asked


@pytest.mark.parametrize(
    ("workers", "decodes", "device", "expected"),
    [("3", True, "cpu", 3), ("0", True, "cuda", 0), ("auto", True, "cpu", 0), ("auto", False, "cuda", 0)],
)
def test_how_many_workers(workers: str, decodes: bool, device: str, expected: int) -> None:
    recipe = load(f"data.workers={workers}").recipe
    assert num_workers(recipe, decodes=decodes, device=torch.device(device)) == expected


def test_a_gpu_is_fed_by_the_cores_of_its_process() -> None:
    recipe = load().recipe
    alone = num_workers(recipe, decodes=True, device=torch.device("cuda"))
    shared = num_workers(recipe, decodes=True, device=torch.device("cuda"), processes=1000)
    assert 1 == shared <= alone <= 8


@pytest.mark.parametrize(
    "name", [each.name for each in list_recipes() if "_fg" in each.name or each.name.endswith("_local")]
)
def test_recipes_that_train_block_by_block_make_a_block_of_each_unit(name: str) -> None:
    plan = build.check(load_recipe(name, overrides=["data.name=digits", "model.width=4"]))
    assert plan.method.blocks
    assert plan.num_stages == len(plan.names)
    assert plan.lookahead == (0,) * plan.num_stages
    assert plan.warnings == ()


@pytest.mark.parametrize("method", ["local", "forward-gradient"])
def test_a_block_is_a_unit_unless_told_otherwise(method: str) -> None:
    overrides = ["method.name=" + method, "partition.stages=auto"]
    assert build.check(load(*overrides)).num_stages == 10
    assert build.check(load(*overrides[:1], "partition.stages=4")).num_stages == 4
    (warning,) = build.check(load(*overrides[:1], "partition.stages=1")).warnings
    assert "is plain backpropagation" in warning.what


def test_derivatives_go_down_as_they_are() -> None:
    """Those of all blocks travel together: with one scale for int8 the small ones would arrive as 0."""
    petra = load_recipe("digits_revnet18", overrides=["engine.wire_dtype=int8"]).recipe
    assert build.wire_formats(petra) == ("int8", "int8")
    forward = load_recipe("digits_fg", overrides=["engine.wire_dtype=int8"]).recipe
    assert build.wire_formats(forward) == ("int8", "float32")
    reverse = load_recipe("digits_fg", overrides=["engine.wire_dtype=int8", "method.guess=above"]).recipe
    assert build.wire_formats(reverse) == ("int8", "int8")


def test_one_block_with_one_direction_of_the_net_is_no_backprop() -> None:
    net = ("method.space=batch-weight", "method.guess=random-gaussian", "method.granularity=net")
    for overrides, warned in (((), True), (net, False)):
        loaded = load_recipe("digits_fg", overrides=["partition.stages=1", *overrides])
        found = [warning.what for warning in build.check(loaded).warnings]
        assert any("plain backpropagation" in what for what in found) == warned
