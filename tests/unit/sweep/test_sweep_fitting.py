from pathlib import Path

import pytest
import tomli

from petractl.errors import RecipeError
from petractl.sweep.fitting import Fitted, fitted_recipe

TEXT = """
# of delayed gradients
[model]
name = "revnet18"
[data]
name = "digits"
[method]
name = "delayed"
keep = "inputs"      # the paper's
accumulation = 2
[engine]
schedule = "tight"
slack = 1
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(TEXT)
    return path


def fit(recipe: Path, method: str, *overrides: str) -> Fitted:
    keys = {text.partition("=")[0] for text in overrides}
    given = [*overrides, *([f"method.name={method}"] if method else [])]
    return fitted_recipe(recipe, given, fixed=keys, method=method)


@pytest.mark.parametrize("method", ["", "delayed"])
def test_the_recipes_own_method_keeps_all_of_it(recipe: Path, method: str) -> None:
    fitted = fit(recipe, method)
    assert (fitted.text, fitted.left_out) == (TEXT, ())


def test_another_method_goes_without_what_it_cannot_use(recipe: Path) -> None:
    fitted = fit(recipe, "backprop")
    assert set(fitted.left_out) == {"method.keep", "engine.schedule", "engine.slack"}
    assert fitted.loaded.recipe.method.name == "backprop"
    assert fitted.loaded.recipe.method.accumulation == 2
    assert fitted.loaded.name == "mine"
    assert fitted.loaded.warnings == ()
    assert tomli.loads(fitted.text)["engine"] == {}
    assert fitted.text.startswith("\n# of delayed gradients\n")
    assert fit(recipe, "petra").left_out == ("method.keep",)


def test_what_the_command_line_says_stays(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"method\.keep: is for"):
        fit(recipe, "backprop", "method.keep=graph")


def test_other_problems_are_told(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.width: must be"):
        fit(recipe, "backprop", "model.width=0")
    recipe.write_text("[model")
    with pytest.raises(RecipeError, match="not valid TOML"):
        fit(recipe, "backprop")
