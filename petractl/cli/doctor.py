"""`petractl doctor`: what this machine has and lacks for training."""

import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from petractl.cli.options import JsonOption
from petractl.cli.report import EXIT_RUN_FAILED, wants_colour, write_out
from petractl.errors import UserError

if TYPE_CHECKING:
    from petractl.doctor.check import Check

_COLOURS = {"ok": "\033[32m", "warning": "\033[1;33m", "failure": "\033[1;31m"}
_RESET = "\033[0m"
_WIDTHS = (9, 20)  # of the status and the name


def command(
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="NAME", help="A data set that must be there. Repeatable."),
    ] = None,
    directory: Annotated[
        Path, typer.Option("--directory", metavar="DIR", help="Where runs will be made (run.directory).")
    ] = Path("runs"),
    uri: Annotated[
        str, typer.Option("--uri", help="MLflow's tracking.uri; without it, the store in --directory.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Look at what this machine has and lacks.

    Python, torch, GPUs, messages between processes, disk, memory, MLflow and data sets are tried.

    Each line says ok, warning (some runs need it, or it costs speed) or failure, and what to do. Nothing is
    left behind. Ends with exit code 1 if anything is a failure.
    """
    from petractl.doctor.examine import examine

    _check_names(data or [])
    found = []
    for check in examine(directory=directory, uri=uri, data=data or []):
        found.append(check)
        if not as_json:
            _show(check)
    if as_json:
        write_out(json.dumps([asdict(check) for check in found], indent=2))
    counts = Counter(str(check.status) for check in found)
    sys.stderr.write(f"{counts['ok']} ok, warnings: {counts['warning']}, failures: {counts['failure']}\n")
    if counts["failure"]:
        raise typer.Exit(EXIT_RUN_FAILED)


def _check_names(names: list[str]) -> None:
    """Refuse a data set that is not known, without loading torch: it may be what is broken."""
    from petractl.recipe.problems import did_you_mean
    from petractl.recipe.schema import DATASET_NAMES

    for name in names:
        if name not in DATASET_NAMES:
            hint = did_you_mean(name, DATASET_NAMES) or f"there are: {', '.join(DATASET_NAMES)}"
            raise UserError(f'no data set is called "{name}"', where="--data", hint=hint)


def _show(check: "Check") -> None:
    """Write one line, and what to do below it."""
    status, name = (
        text.ljust(width) for text, width in zip((check.status, check.name), _WIDTHS, strict=True)
    )
    if sys.stdout.isatty() and wants_colour():
        status = f"{_COLOURS[check.status]}{status}{_RESET}"
    sys.stdout.write(status)
    write_out(f"{name}{check.what}")
    if check.hint:
        write_out(f"{' ' * _WIDTHS[0]}hint: {check.hint}")
    sys.stdout.flush()  # the next look may take seconds
