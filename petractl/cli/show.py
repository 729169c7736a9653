"""`petractl show`: the resolved recipe."""

from typing import Annotated

import typer

from petractl.cli.options import RecipeArgument, SetOption
from petractl.cli.report import show_warning, write_out


def command(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    comments: Annotated[bool, typer.Option(help="Explain every key in a comment.")] = True,
) -> None:
    """Write a recipe with every key, explained.

    The defaults are filled in. The output is a recipe itself; keys that have no effect beside the others
    stand in comments.
    """
    from petractl.recipe import load_recipe, render

    loaded = load_recipe(recipe, overrides=overrides or [])
    for warning in loaded.warnings:
        show_warning(warning)
    write_out(render(loaded.recipe, comments=comments))
