"""What a list of methods means, and what a variant makes of a recipe."""

from pathlib import Path

import pytest

from petractl.bench.variants import Variant, joined, parse_variants, vary
from petractl.errors import Problem, RecipeError
from petractl.recipe.load import LoadedRecipe, load_recipe


def recipe(*overrides: str) -> LoadedRecipe:
    return load_recipe("digits_revnet18", overrides=overrides)


def varied(text: str, *overrides: str) -> LoadedRecipe:
    (variant,) = parse_variants(text)
    return vary(recipe(*overrides), variant)


def test_a_list_is_read() -> None:
    assert parse_variants("petra, delayed:graph,backprop/gpipe,delayed:inputs/paper,petra/[2,1,0],petra") == (
        Variant("petra", "petra"),
        Variant("delayed:graph", "delayed", keep="graph"),
        Variant("backprop/gpipe", "backprop", schedule="gpipe"),
        Variant("delayed:inputs/paper", "delayed", keep="inputs", schedule="paper"),
        Variant("petra/[2,1,0]", "petra", schedule="[2,1,0]"),
        Variant("petra", "petra"),
    )


@pytest.mark.parametrize("text", ["", "petra,", ":graph", "petra/", "delayed:", "a/b/c", "a/b:c", "a:b:c"])
def test_what_has_another_form_is_told(text: str) -> None:
    with pytest.raises(RecipeError, match="not of the form") as caught:
        parse_variants(text)
    assert caught.value.where == "--methods"


def test_every_wrong_entry_is_told() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_variants("petra/,backprop,:x")
    assert [problem.key for problem in caught.value.problems] == ["petra/", ":x"]


def test_method_and_schedule_are_the_variants() -> None:
    loaded = varied("delayed:inputs/paper")
    assert (loaded.recipe.method.name, loaded.recipe.method.keep) == ("delayed", "inputs")
    assert loaded.recipe.engine.schedule == "paper"
    assert loaded.recipe.optimizer == recipe().recipe.optimizer
    assert varied("petra/[9,8,7,6,5,4,3,2,1,0]").recipe.engine.schedule == tuple(range(9, -1, -1))


@pytest.mark.parametrize(
    ("base", "text", "schedule", "slack"),
    [
        ("engine.schedule=paper", "delayed", "paper", 0),
        ("engine.schedule=paper", "backprop", "auto", 0),
        ("engine.slack=2", "delayed", "auto", 2),
        ("engine.slack=2", "petra/tight", "tight", 2),
        ("engine.slack=2", "petra/paper", "paper", 0),
        ("engine.slack=2", "reversible", "auto", 0),
    ],
)
def test_what_is_not_named_is_the_recipes_where_it_fits(
    base: str, text: str, schedule: str, slack: int
) -> None:
    engine = varied(text, base).recipe.engine
    assert (engine.schedule, engine.slack) == (schedule, slack)


def test_a_schedule_of_a_locked_method_is_not_for_the_others() -> None:
    base = ("method.name=backprop", "engine.schedule=sequential")
    assert varied("reversible", *base).recipe.engine.schedule == "sequential"
    assert varied("petra", *base).recipe.engine.schedule == "auto"
    exact = ("method.name=backprop", "engine.schedule=gpipe")
    assert varied("backprop", *exact).recipe.engine.schedule == "gpipe"
    assert varied("reversible", *exact).recipe.engine.schedule == "auto"


def test_methods_that_train_block_by_block_keep_their_keys_to_themselves() -> None:
    forward = ("method.name=forward-gradient", "method.guess=ntk", "auxiliary.name=mlp")
    assert varied("forward-gradient/tight", *forward).recipe.method.guess == "ntk"
    for name in ("local", "petra"):
        loaded = varied(name, *forward)
        assert (loaded.recipe.method.name, loaded.warnings) == (name, ())
    assert varied("local", *forward).recipe.auxiliary.name == "mlp"
    assert varied("local", "engine.schedule=paper").recipe.engine.schedule == "auto"
    assert varied("forward-gradient", "engine.slack=2").recipe.engine.slack == 0
    late = (*forward, "engine.schedule=tight", "engine.slack=2")
    assert varied("forward-gradient", *late).recipe.engine.slack == 2
    with pytest.raises(RecipeError, match="nothing comes down to a block"):
        varied("local/tight", *forward)


def test_keep_is_the_recipes_where_the_method_is() -> None:
    base = ("method.name=delayed", "method.keep=inputs")
    assert varied("delayed", *base).recipe.method.keep == "inputs"
    assert varied("delayed:graph", *base).recipe.method.keep == "graph"
    assert varied("petra", *base).recipe.method.name == "petra"


def test_processes_stay_as_many_where_each_has_several_stages() -> None:
    base = ("partition.stages=4", "method.accumulation=4")
    assert varied("backprop/interleaved-1f1b", *base).recipe.partition.stages == 8
    interleaved = ("partition.stages=8", "method.name=backprop", "engine.schedule=interleaved-1f1b")
    assert varied("petra", *interleaved).recipe.partition.stages == 4
    assert varied("backprop/interleaved-1f1b", "partition.stages=units").recipe.partition.stages == "units"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("petr", "method.name"),
        ("delayed:nothing", "method.keep"),
        ("petra:graph", "method.keep"),
        ("petra/tihgt", "engine.schedule"),
        ("backprop/paper", "engine.schedule"),
        ("petra/[1,2]", "engine.schedule"),
        ("petra/[1;0]", "engine.schedule"),
    ],
)
def test_a_wrong_variant_is_told_with_its_key(text: str, key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        varied(text)
    assert [problem.key for problem in caught.value.problems] == [key]
    assert caught.value.problems[0].hint or "must" in caught.value.problems[0].what


def test_warnings_are_the_variants() -> None:
    assert [w.key for w in varied("delayed", "method.bn_statistics=forward").warnings] == [
        "method.bn_statistics"
    ]


def test_shared_problems_are_told_once() -> None:
    a, b, c = Problem("data", "missing"), Problem("method.name", "wrong"), Problem("", "odd")
    assert joined({"petra": [a, b], "backprop": [a], "delayed": [a, c]}) == [
        a,
        Problem("petra: method.name", "wrong"),
        Problem("delayed", "odd"),
    ]
    assert joined({"petra": [b], "backprop": []}) == [Problem("petra: method.name", "wrong")]
    assert joined({}) == []


def test_the_path_is_the_recipes(tmp_path: Path) -> None:
    assert varied("petra").path == recipe().path
