from pathlib import Path

import pytest

import petractl
from petractl.errors import UserError
from petractl.recipe import find_recipe, list_recipes

RECIPES = Path(petractl.__file__).parent.parent / "recipes"
NAMES = [
    "cifar10_fg_global_global",
    "cifar10_fg_global_local_activation",
    "cifar10_fg_global_local_batch_weight",
    "cifar10_fg_global_ntk_activation",
    "cifar10_fg_global_random_activation",
    "cifar10_fg_global_random_weight_net",
    "cifar10_fg_order",
    "cifar10_local",
    "cifar10_resnet18_backprop",
    "cifar10_revnet18",
    "cifar10_revnet34",
    "cifar10_revnet50",
    "digits_fg",
    "digits_revnet18",
    "imagenet32_revnet18",
    "imagenet32_revnet34",
    "imagenet32_revnet50",
    "imagenet_resnet50",
    "imagenet_revnet18",
    "imagenet_revnet34",
    "imagenet_revnet50",
    "imagenette_revnet18",
]


@pytest.mark.parametrize(
    "given",
    ["digits_revnet18", "digits_revnet18.toml", "recipes/digits_revnet18.toml", "recipes/digits_revnet18"],
)
def test_a_shipped_recipe_is_found_by_name_in_any_folder(given: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(given).name == "digits_revnet18.toml"


def test_a_file_at_the_path_comes_first(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits_revnet18.toml").write_text("")
    assert find_recipe("digits_revnet18.toml") == Path("digits_revnet18.toml")
    assert find_recipe(tmp_path / "digits_revnet18.toml") == tmp_path / "digits_revnet18.toml"


def test_a_folder_does_not_hide_a_shipped_recipe(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits_revnet18").mkdir()
    assert find_recipe("digits_revnet18").is_file()


def test_shipped_recipes_are_listed_with_their_titles() -> None:
    recipes = list_recipes()
    assert [recipe.name for recipe in recipes] == NAMES
    for recipe in recipes:
        assert recipe.title
        assert not recipe.title.startswith("#")
        assert recipe.path.is_file()


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("digits_revnet81", "did you mean digits_revnet18?"),
        ("recipes/cifar10_revnet43.toml", "did you mean cifar10_revnet34?"),
        ("Digits-RevNet18", "did you mean digits_revnet18?"),
        ("zzz", "shipped recipes: cifar10_fg_global_global, "),
        ("/nowhere/at/all.toml", "shipped recipes: "),
        ("a\0b", "shipped recipes: "),
        ("x" * 5000, "shipped recipes: "),
    ],
)
def test_a_mistyped_name_gets_a_suggestion(given: str, hint: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such recipe") as caught:
        find_recipe(given)
    assert hint in caught.value.hint


def test_a_neighbouring_file_is_suggested(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_recipe.toml").write_text("")
    with pytest.raises(UserError) as caught:
        find_recipe("my_recipes.toml")
    assert caught.value.hint == "did you mean my_recipe.toml?"


def test_a_run_folder_is_told_from_a_recipe(tmp_path) -> None:
    with pytest.raises(UserError, match="this is a folder"):
        find_recipe(tmp_path)
    (tmp_path / "resolved.toml").write_text("")
    with pytest.raises(UserError) as caught:
        find_recipe(tmp_path)
    assert f"petractl resume {tmp_path}" in caught.value.hint
