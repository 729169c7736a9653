import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petractl.errors import RecipeError
from petractl.recipe import Recipe, load_recipe, parse_overrides
from petractl.recipe.render import toml_value

RECIPE = """
[model]
name = "revnet18"
[data]
[method]
[partition]
cuts = [2, 5]
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "small.toml"
    file.write_text(RECIPE)
    return file


def load(path, *overrides: str) -> Recipe:
    return load_recipe(path, overrides=overrides).recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("training.epochs=3", 3),
        ("optimizer.lr=1e-3", 1e-3),
        ("data.augment=false", False),
        ("method.name=backprop", "backprop"),
        ('method.name="backprop"', "backprop"),
        ("engine.device=cuda:0", "cuda:0"),
        ("engine.schedule=[2, 1, 0]", [2, 1, 0]),
        ("data.train=data/train-{00..04}.tar", "data/train-{00..04}.tar"),
        ("tracking.uri=http://host:5000/?a=b", "http://host:5000/?a=b"),
        ("model.weights=", ""),
        ("data.augment=True", "True"),
        ("tracking.run_name=1\nepochs = 2", "1\nepochs = 2"),
        (" training.epochs = 3 ", 3),
    ],
)
def test_a_value_is_toml_or_else_a_string(text: str, value: object) -> None:
    (override,) = parse_overrides([text])
    assert override.value == value
    assert type(override.value) is type(value)


@given(st.one_of(st.booleans(), st.integers(-(2**40), 2**40), st.floats(allow_nan=False), st.text()))
def test_every_toml_value_is_read_back(value: bool | int | float | str) -> None:
    (override,) = parse_overrides([f"training.epochs={toml_value(value)}"])
    assert override.value == value
    assert type(override.value) is type(value)
    assert not isinstance(value, float) or math.copysign(1, override.value) == math.copysign(1, value)


def test_the_command_line_wins_and_its_last_word_too(path) -> None:
    recipe = load(
        path, "model.name=resnet18", "training.epochs=3", "training.epochs=4", "method.name=backprop"
    )
    assert (recipe.model.name, recipe.training.epochs, recipe.method.name) == ("resnet18", 4, "backprop")


def test_stages_on_the_command_line_replace_the_cuts_of_the_file(path) -> None:
    assert load(path).partition.cuts == (2, 5)
    recipe = load(path, "partition.stages=4")
    assert (recipe.partition.stages, recipe.partition.cuts) == (4, ())


def test_cuts_on_the_command_line_replace_the_stages_of_the_file(tmp_path) -> None:
    file = tmp_path / "stages.toml"
    file.write_text(RECIPE.replace("cuts = [2, 5]", "stages = 4"))
    recipe = load(file, "partition.cuts=[3]")
    assert (recipe.partition.stages, recipe.partition.cuts) == ("auto", (3,))


def test_stages_and_cuts_both_on_the_command_line_are_an_error(path) -> None:
    with pytest.raises(RecipeError, match=r"partition\.cuts: cannot be given together with"):
        load(path, "partition.cuts=[3]", "partition.stages=2")


def test_a_table_can_be_set_deeper_where_it_is_one(path) -> None:
    recipe = load(path, "optimizer.name=torch.optim:RMSprop", "optimizer.arguments.alpha=0.9")
    assert recipe.optimizer.arguments == {"alpha": 0.9}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs=3", "is not of the form section.key=value"),
        ("training.epochs", "is not of the form section.key=value"),
        (".epochs=3", "is not of the form section.key=value"),
        ("trainin.epochs=3", "did you mean training?"),
        ("training.epoch=3", "did you mean training.epochs?"),
        ("data.lr=3", "did you mean optimizer.lr?"),
        ("training.epochs.x=3", "training.epochs is not a table"),
        ("tracking.run_name=\udcff", "not UTF-8"),
        ("tracking.\udcff=1", "not UTF-8"),
    ],
)
def test_what_names_no_key_is_told(text: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_overrides([text])
    assert words in str(caught.value)
    str(caught.value).encode()


def test_all_problems_of_overrides_and_file_are_told_together(path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(path, "training.epoch=3", "nonsense", "data.batch_size=0", "model.width=true")
    keys = [problem.key for problem in caught.value.problems]
    assert sorted(keys) == ["--set nonsense", "data.batch_size", "model.width", "training.epoch"]


def test_a_value_from_the_command_line_is_named_as_such(path) -> None:
    with pytest.raises(RecipeError, match=r"data\.batch_size: must be at least 1, not 0 \(from --set\)"):
        load(path, "data.batch_size=0")
