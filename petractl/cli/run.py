"""`petractl run`: train."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from petractl.cli.options import RecipeArgument, SetOption
from petractl.interrupts import sigterm_obeyed


class Resume(StrEnum):
    """Whether `run` goes on with a run that is there."""

    NEVER = "never"
    AUTO = "auto"


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
    resume: Annotated[
        Resume,
        typer.Option(
            "--resume",
            help="auto: go on with what this command has begun before, if there is such a run.",
            show_default=False,
        ),
    ] = Resume.NEVER,
) -> None:
    """Train by a recipe.

    Progress goes to stderr; everything about the run lies in its folder: recipe, journal, checkpoints, plots.
    Interrupted with Ctrl-C, it saves, ends with exit code 130 and says how to go on.
    """
    with sigterm_obeyed():
        from petractl import launch

        goes_on = resume is Resume.AUTO
        code = launch.run(
            recipe, directory=directory, overrides=overrides or [], trace=trace, goes_on=goes_on
        )
    if code:
        raise typer.Exit(code)
