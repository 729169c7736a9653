"""`petractl run`: train."""

from pathlib import Path
from typing import Annotated

import typer

from petractl.cli.options import RecipeArgument, SetOption


def command(
    recipe: RecipeArgument,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            metavar="DIR",
            help="The run folder itself; without it, a new one in the recipe's run.directory.",
        ),
    ] = None,
    overrides: SetOption = None,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace", help="Record what each stage does when: traces/ for a viewer, plots/timeline.png."
        ),
    ] = False,
) -> None:
    """Train by a recipe.

    Progress goes to stderr; everything about the run lies in its folder: recipe, journal, checkpoints, plots.
    Interrupted with Ctrl-C, it saves, ends with exit code 130 and says how to go on.
    """
    from petractl import launch

    code = launch.run(recipe, directory=directory, overrides=overrides or [], trace=trace)
    if code:
        raise typer.Exit(code)
