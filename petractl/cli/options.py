"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[
    str, typer.Argument(help="Path of a recipe, or the name of one from `petractl ls`.")
]
RunArgument = Annotated[Path, typer.Argument(help="Folder of a run.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override a key of the recipe, in TOML (no quotes needed for a plain word). Repeatable.",
    ),
]
BestOption = Annotated[bool, typer.Option("--best", help="Take the best checkpoint, not the last.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")]
