"""`petractl validate`: everything that `run` would check before its first step."""

from typing import Annotated

import typer

from petractl.cli.options import SetOption
from petractl.cli.report import EXIT_USER_ERROR, show_error, show_warning, write_out
from petractl.errors import UserError


def command(
    recipes: Annotated[list[str], typer.Argument(help="Paths of recipes, or names from `petractl ls`.")],
    overrides: SetOption = None,
) -> None:
    """Check recipes, without training.

    Checks all that `run` checks before it reads the data: keys and values, where the data lie, the net
    (built without memory for its weights), its cuts. Every problem of every recipe is reported.
    """
    failed = 0
    for recipe in recipes:
        try:
            _validate(recipe, overrides=overrides or [])
        except UserError as error:
            show_error(error)
            failed += 1
    if failed:
        raise typer.Exit(EXIT_USER_ERROR)


def _validate(source: str, *, overrides: list[str]) -> None:
    from petractl.recipe import load_recipe

    loaded = load_recipe(source, overrides=overrides)
    from petractl import build
    from petractl.preparing import check_tracking

    check_tracking(loaded)
    checked = build.check(loaded)
    for warning in [*loaded.warnings, *checked.warnings]:
        show_warning(warning)
    write_out(f"ok {source}: {checked.summary}")
