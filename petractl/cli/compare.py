"""`petractl compare`: what differs between runs, in their recipes and in what their journals measured.

The table goes to stdout: on a terminal a few runs stand side by side, many below each other; anywhere else
each run is one line. What is wrong with a run is told on stderr, and the others are compared all the same.
"""

import fcntl
import sys
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from petractl.cli.options import JsonOption
from petractl.cli.places import check_place, writing
from petractl.cli.report import show_warning, write_out
from petractl.errors import Problem, UserError

if TYPE_CHECKING:
    from petractl.tracking.comparison import Comparison
    from petractl.tracking.comparison_run import RunRecord

_RUNNING = "running"
_PNG = b"\x89PNG\r\n\x1a\n"


class MetricName(StrEnum):
    """What `--metric` takes: the names of `METRICS`, which is not imported for the help's sake."""

    TOP1 = "top1"
    TOP5 = "top5"
    LOSS = "loss"
    TRAIN_TOP1 = "train_top1"
    TRAIN_LOSS = "train_loss"
    IMAGES_PER_S = "images_per_s"
    SECONDS = "seconds"
    LR = "lr"
    DATA_WAIT_PERCENT = "data_wait_percent"


_RunsArgument = Annotated[
    list[Path], typer.Argument(metavar="RUN", help="Run folders, or folders that hold run folders.")
]
_PlotOption = Annotated[
    Path | None, typer.Option("--plot", metavar="F.png", help="Draw the curves over each other.")
]
_MetricOption = Annotated[
    MetricName | None, typer.Option("--metric", help="What the curves are of.", show_default="top1")
]
_AllKeysOption = Annotated[
    bool, typer.Option("--all-keys", help="Every key, also where a run lies and where it is logged.")
]


def command(
    runs: _RunsArgument,
    plot: _PlotOption = None,
    metric: _MetricOption = None,
    all_keys: _AllKeysOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare runs: what differs, and what they reached.

    Keys, accuracy, loss, images/s, memory and time as a table, curves as PNG, all from the journals; also of
    runs that go on, were interrupted, or are old.
    """
    if metric is not None and plot is None and not as_json:
        raise UserError(
            "chooses the curves, which are in --plot and --json only",
            where="--metric",
            hint="add one of them",
        )
    _check_plot(plot)
    from petractl.cli.comparison_table import as_document, write_comparison
    from petractl.tracking.comparison import compare_runs
    from petractl.tracking.comparison_run import read_run

    defaults = recipe_defaults()
    records = [_with_state(read_run(folder, defaults=defaults)) for folder in _folders(runs)]
    comparison = compare_runs(records, defaults=defaults, all_keys=all_keys)
    shown = (metric or MetricName.TOP1).value
    if plot is not None:
        _draw(comparison, plot, metric=shown)
    _tell_problems(comparison.runs)
    if as_json:
        write_out(as_document(comparison, metric=shown))
    else:
        write_comparison(comparison, all_keys=all_keys)


def recipe_defaults() -> dict[str, Any]:
    """Return the default of every key that has one, as "section.key"."""
    from petractl.recipe.schema import SECTIONS

    return {
        f"{section}.{key}": field.get_default(call_default_factory=True)
        for section, keys in SECTIONS.items()
        for key, field in keys.model_fields.items()
        if not field.is_required()
    }


def _folders(places: Sequence[Path]) -> list[Path]:
    """Return the run folders that are named, or lie in a folder that is named, each once.

    Raises:
        UserError: a place is none of both, or there are fewer than two runs; all such places are told.
    """
    from petractl.tracking.comparison_run import is_run_folder

    found: dict[Path, Path] = {}
    wrong = []
    for place in places:
        inside = [place] if is_run_folder(place) else _inside(place)
        if not inside:
            wrong.append(f"{place} {'holds no run' if place.is_dir() else 'is no folder'}")
        found |= {path.resolve(): path for path in inside if path.resolve() not in found}
    if wrong:
        raise UserError(
            "; ".join(wrong),
            hint="give run folders, or folders that hold them; `petractl ls runs` lists those in runs",
        )
    if len(found) < 2:
        raise UserError(
            "one run alone",
            where=str(next(iter(found.values()))),
            hint="name the runs to compare it with, or a folder that holds several",
        )
    return list(found.values())


def _inside(place: Path) -> list[Path]:
    from petractl.tracking.comparison_run import is_run_folder

    if not place.is_dir():
        return []
    try:
        return [path for path in sorted(place.iterdir()) if is_run_folder(path)]
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", where=str(place)) from None


def _with_state(run: "RunRecord") -> "RunRecord":
    """Return the run as "running" where its journal has no end and a process holds its folder."""
    from petractl.run_folder import LOCK
    from petractl.tracking.comparison_run import UNFINISHED

    return replace(run, state=_RUNNING) if run.state == UNFINISHED and _is_held(run.path / LOCK) else run


def _is_held(lock: Path) -> bool:
    """Return whether a process of this machine holds the lock, without waiting for it or changing it."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _check_plot(path: Path | None) -> None:
    """Refuse a place for the curves where nothing can be written, or something else lies."""
    check_place(path, ".png")
    if path is None or not path.exists():
        return
    try:
        with path.open("rb") as file:
            start = file.read(len(_PNG))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    if start and start != _PNG:
        raise UserError("is there already, and is no PNG", where=str(path), hint="give another name")


def _draw(comparison: "Comparison", path: Path, *, metric: str) -> None:
    """Draw the curves.

    Raises:
        UserError: no run has the metric, or the file cannot be written.
    """
    from petractl.tracking.comparison_plot import drawable, plot_comparison

    drawn = drawable(comparison, metric=metric)
    if not drawn:
        raise UserError(f"no run has measured {metric}", where="--plot", hint="choose another with --metric")
    with writing(path):
        plot_comparison(comparison, path, metric=metric)
    for n, run in enumerate(comparison.runs):
        if n not in drawn:
            show_warning(Problem(run.name, f"has no {metric} and is not in {path}"))
    sys.stderr.write(f"curves: {path}\n")


def _tell_problems(runs: "Sequence[RunRecord]") -> None:
    for run in runs:
        for problem in run.problems:
            show_warning(Problem(run.name, problem))
        if run.failure is not None:
            show_warning(Problem(run.name, f"failed: {run.failure}"))
