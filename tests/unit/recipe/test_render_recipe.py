from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import pytest
import tomli
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from petractl.errors import RecipeError
from petractl.recipe import Recipe, list_recipes, load_recipe, render
from petractl.recipe.render import toml_value
from petractl.recipe.schema import (
    DATASET_NAMES,
    DATASETS_WITHOUT_FILES,
    EXACT_SCHEDULE_NAMES,
    MODEL_NAMES,
    OPTIMIZER_NAMES,
    SCHEDULE_NAMES,
    SECTIONS,
)

TEXT = st.text(max_size=8)
TABLE = st.dictionaries(
    TEXT, st.one_of(st.booleans(), st.integers(-9, 9), TEXT, st.lists(st.integers(0, 9))), max_size=3
)
FRACTION = st.floats(0.01, 0.99)
BALANCE = st.sampled_from(["flops", "parameters", "uniform"])
AHEAD = st.sampled_from([name for name in SCHEDULE_NAMES if name not in EXACT_SCHEDULE_NAMES])
LOOKAHEADS = st.lists(st.integers(0, 9)).map(lambda ahead: [*sorted(ahead, reverse=True), 0])


def section(**keys: st.SearchStrategy[object]) -> st.SearchStrategy[dict[str, object]]:
    return st.fixed_dictionaries({}, optional=keys)


RECIPES = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {"name": st.sampled_from(MODEL_NAMES)},
            optional={"width": st.integers(1, 512), "depth": st.integers(1, 40), "weights": TEXT},
        ),
        "data": st.fixed_dictionaries(
            {"name": st.sampled_from(DATASET_NAMES)},
            optional={
                "train": st.one_of(TEXT, st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=3)),
                "augment": st.booleans(),
                "image_size": st.integers(0, 300),
                "workers": st.one_of(st.just("auto"), st.integers(0, 256)),
                "resident": st.booleans(),
                "image_entries": st.lists(
                    st.sampled_from(["jpg", "PNG", "left.jpeg"]), min_size=1, max_size=3
                ),
            },
        ).filter(lambda data: not (data["name"] in DATASETS_WITHOUT_FILES and data.get("train"))),
        "method": section(
            accumulation=st.integers(1, 32), bn_statistics=st.sampled_from(["backward", "forward"])
        ),
    },
    optional={
        "partition": st.one_of(
            section(stages=st.sampled_from([1, 7, "units", "auto"]), balance=BALANCE),
            section(cuts=st.lists(st.integers(1, 17), unique=True).map(sorted), balance=BALANCE),
        ),
        "engine": section(
            mode=st.sampled_from(["auto", "processes"]),
            schedule=st.one_of(AHEAD, LOOKAHEADS),
            threads=st.integers(0, 64),
            device=st.just("cuda:1"),
            replicas=st.integers(1, 4),
            backend=st.sampled_from(["auto", "gloo", "nccl"]),
            wire_dtype=st.sampled_from(["float32", "bfloat16", "float16", "int8"]),
            wire_dtype_backward=st.sampled_from(["", "int8"]),
            stall_timeout=FRACTION,
        ),
        "optimizer": section(
            name=st.sampled_from([*OPTIMIZER_NAMES, "torch.optim:RMSprop"]),
            lr=FRACTION,
            momentum=st.sampled_from([0.0, 0.5]),
            betas=st.tuples(FRACTION, FRACTION).map(list),
            arguments=TABLE,
        ),
        "training": section(
            epochs=st.integers(1, 300),
            lr_decay=st.sampled_from(["multi-step", "cosine", "polynomial", "constant"]),
            milestones=st.lists(st.integers(1, 300), unique=True).map(sorted),
        ),
        "tracking": section(mlflow=st.booleans(), run_name=TEXT),
    },
)


def load_text(text: str):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path)


def as_toml(tables: dict[str, dict[str, object]]) -> str:
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {toml_value(value)}" for key, value in table.items())]
    return "\n".join(lines)


@settings(max_examples=150, deadline=None)
@given(RECIPES, st.booleans())
def test_a_rendered_recipe_loads_back_equal_and_settled(tables, comments) -> None:
    try:
        first = load_text(as_toml(tables))
    except RecipeError as error:  # a list of lookaheads for another number of stages, drawn by chance
        assume({problem.key for problem in error.problems} != {"engine.schedule"})
        raise
    text = render(first.recipe, comments=comments)
    second = load_text(text)
    assert second.recipe == first.recipe
    assert render(second.recipe, comments=comments) == text
    # Written out in full, a recipe must not be warned about for more than what its author wrote.
    assert {w.key for w in second.warnings} <= {w.key for w in first.warnings}


@pytest.mark.parametrize("schedule", EXACT_SCHEDULE_NAMES)
def test_an_exact_pipeline_on_devices_loads_back_equal(schedule) -> None:
    engine = {"schedule": schedule, "devices": ["cuda:0", "cpu", "cuda:0", "cuda:11"], "replicas": 2}
    tables = {"model": {"name": "revnet18"}, "data": {}, "method": {"name": "backprop", "accumulation": 8}}
    first = load_text(as_toml(tables | {"engine": engine}))
    assert first.warnings == ()
    second = load_text(render(first.recipe))
    assert (second.recipe, second.warnings) == (first.recipe, ())


@given(
    st.recursive(
        st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.text()), st.lists, max_leaves=8
    )
)
def test_a_toml_value_stays_on_one_line(value) -> None:
    text = toml_value(value)
    assert "\n" not in text
    assert tomli.loads(f"v = {text}")["v"] == value


@given(TABLE)
def test_a_table_is_written_inline(table) -> None:
    assert tomli.loads(f"v = {toml_value(table)}")["v"] == table


@pytest.mark.parametrize("shipped", list_recipes(), ids=lambda shipped: shipped.name)
def test_shipped_recipes_render_and_load_back_without_a_warning(shipped) -> None:
    loaded = load_recipe(shipped.path)
    assert loaded.warnings == ()
    again = load_text(render(loaded.recipe))
    assert again.recipe == loaded.recipe
    assert again.warnings == ()


def test_every_key_stands_there_with_its_docstring() -> None:
    recipe = load_recipe("digits_revnet18").recipe
    lines = render(recipe).splitlines()
    for name, model in SECTIONS.items():
        start = lines.index(f"[{name}]")
        for key, field in model.model_fields.items():
            comment = lines.index(f"# {field.description}", start)
            assert lines[comment + 1].removeprefix("# ").startswith(f"{key} = ")


def test_every_key_has_one_line_of_help_that_fits() -> None:
    for name, model in SECTIONS.items():
        assert model.__doc__
        assert "\n" not in model.__doc__
        for key, field in model.model_fields.items():
            assert field.description, f"{name}.{key}"
            assert "\n" not in field.description
            assert len(field.description) <= 105, f"{name}.{key}"


def test_without_comments_there_are_only_keys() -> None:
    text = render(load_recipe("digits_revnet18").recipe, comments=False)
    assert "#" not in text
    assert "betas" not in text  # it does nothing with sgd


def test_chosen_cuts_take_the_place_of_the_rule() -> None:
    recipe = load_recipe("digits_revnet18").recipe
    cut = recipe.with_cuts([3, 6])
    assert cut.partition.cuts == (3, 6)
    loaded = load_text(render(cut))
    assert loaded.recipe == cut
    assert loaded.warnings == ()
    assert (cut.model, cut.training) == (recipe.model, recipe.training)


def test_one_stage_is_written_as_one_stage() -> None:
    # Written as no cuts at all, "auto" would choose again: a resumed run would have a stage per unit.
    cut = load_recipe("digits_revnet18").recipe.with_cuts([])
    assert load_text(render(cut, comments=False)).recipe.partition.stages == 1


def test_every_section_is_a_model_of_the_schema() -> None:
    assert set(SECTIONS) == set(Recipe.model_fields)
    assert all(issubclass(model, BaseModel) and not get_args(model) for model in SECTIONS.values())
