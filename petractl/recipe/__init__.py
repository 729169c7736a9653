"""Recipes: one TOML file that says what to train, on what, and how.

`load_recipe` turns a name or a path, and overrides from the command line, into a checked `Recipe`; `render`
writes one back. Nothing here imports torch, so a wrong recipe is told in a fraction of a second.
"""

from petractl.recipe.find import ShippedRecipe, find_recipe, list_recipes
from petractl.recipe.load import LoadedRecipe, load_recipe
from petractl.recipe.overrides import parse_overrides
from petractl.recipe.render import render
from petractl.recipe.schema import Recipe

__all__ = [
    "LoadedRecipe",
    "Recipe",
    "ShippedRecipe",
    "find_recipe",
    "list_recipes",
    "load_recipe",
    "parse_overrides",
    "render",
]
