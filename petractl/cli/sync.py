"""`petractl sync`: send to MLflow what it has missed of runs that have ended.

One line per run goes to stdout. A run that cannot be sent is told on stderr, and the others are sent all the
same.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from petractl.cli.options import JsonOption
from petractl.cli.report import EXIT_RUN_FAILED, EXIT_USER_ERROR, show_error, show_warning, write_out
from petractl.errors import Problem, RunError, UserError

if TYPE_CHECKING:
    from petractl.recipe.schema import Recipe
    from petractl.tracking.mlflow_worker import Sent

_MASK = "***"

_RunsArgument = Annotated[
    list[Path], typer.Argument(metavar="RUN", help="Run folders, or folders that hold run folders.")
]
_UriOption = Annotated[
    str,
    typer.Option(
        "--uri",
        metavar="URI",
        help="The tracking server or database, if not the one of the run.",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True)
class Line:
    """What became of one run: `values` are in its journal, of which `sent` were missing in the store."""

    run: str
    uri: str
    mlflow_run_id: str
    values: int
    sent: int


def command(runs: _RunsArgument, uri: _UriOption = "", as_json: JsonOption = False) -> None:
    """Send to MLflow what it missed of runs.

    Its server was down, slow or full, or was never named.

    Each value is sent once, however often this is run; a run that never arrived is made. Recipe and plots
    are sent as well. Everything comes from the run folder.
    """
    lines: list[Line] = []
    code = 0
    for folder in run_folders(runs):
        try:
            lines.append(_sync(folder, uri))
        except (UserError, RunError) as error:
            show_error(error)
            code = max(code, EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_RUN_FAILED)
        else:
            if not as_json:
                write_out(_in_words(lines[-1]))
    if as_json:
        write_out(json.dumps([asdict(line) for line in lines], indent=1))
    if code:
        raise typer.Exit(code)


def run_folders(places: Sequence[Path]) -> list[Path]:
    """Return the run folders that are named, or lie in a folder that is named, each once.

    Raises:
        UserError: a place is none of both; all such places are told.
    """
    from petractl.tracking.comparison_run import is_run_folder

    found: dict[Path, Path] = {}
    wrong = []
    for place in places:
        try:
            inside = (
                [place] if is_run_folder(place) else [p for p in sorted(place.iterdir()) if is_run_folder(p)]
            )
        except (OSError, ValueError):
            inside = []
        if not inside:
            wrong.append(f"{str(place)!r} is no run folder and holds none")
        for path in inside:
            found.setdefault(path.resolve(), path)
    if wrong:
        raise UserError("; ".join(wrong), hint="`petractl ls runs` lists the runs in runs")
    return list(found.values())


def _sync(run: Path, uri: str) -> Line:
    """Send one run.

    Raises:
        UserError: it has no journal or no recipe, is training now, or the address cannot be used.
        RunError: the store cannot be reached, or has refused something.
    """
    from petractl.recipe.load import load_recipe
    from petractl.run_folder import open_run_folder
    from petractl.tracking.comparison_run import read_run
    from petractl.tracking.journal import JOURNAL_NAME
    from petractl.tracking.masking import mask_credentials

    folder = open_run_folder(run)
    if not (run / JOURNAL_NAME).is_file():
        raise UserError(f"has no {JOURNAL_NAME}: there is nothing to send", where=str(run))
    recipe = load_recipe(folder.resolved).recipe
    address = _address(recipe, uri, run)
    with folder.locked():
        for problem in read_run(run, defaults={}).problems:
            show_warning(Problem(str(run), problem))
        sent = _send(run, recipe, address)
    return Line(str(run), mask_credentials(address), sent.run_id, sent.values, sent.sent)


def _send(run: Path, recipe: "Recipe", address: str) -> "Sent":
    from petractl.recipe.flatten import as_parameters
    from petractl.tracking.mlflow_sync import send_late
    from petractl.tracking.mlflow_tracker import tracking_settings

    run = run.absolute()
    settings = tracking_settings(
        run,
        uri=address,
        experiment=recipe.tracking.experiment,
        run_name=recipe.tracking.run_name or run.name,
        parameters=as_parameters(recipe),
        is_live=False,
    )
    return send_late(settings)


def _address(recipe: Any, uri: str, run: Path) -> str:
    """Return where to send a run: as given, else as its recipe has it.

    Raises:
        UserError: MLflow cannot use it.
    """
    from petractl.tracking.masking import mask_credentials
    from petractl.tracking.mlflow_tracker import tracking_problem, tracking_uri

    chosen = uri or recipe.tracking.uri
    where = "--uri" if uri else f"{run}: tracking.uri"
    problem = tracking_problem(chosen) if chosen else ""
    if problem:
        raise UserError(f'"{mask_credentials(chosen)}": {problem}', where=where)
    if _MASK in chosen:
        raise UserError(
            "its credentials are hidden", where=where, hint="name the server with its credentials by --uri"
        )
    return tracking_uri(chosen, directory=Path(recipe.run.directory))


def _in_words(line: Line) -> str:
    what = f"{line.sent:,} of {line.values:,} values sent" if line.sent else "nothing was missing"
    return f"{line.run}: {what}, MLflow run {line.mlflow_run_id} at {line.uri}"
