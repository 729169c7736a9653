"""`petractl sweep`: train a recipe with every combination of some values."""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from petractl.cli.options import JsonOption, RecipeArgument, SetOption
from petractl.cli.report import EXIT_INTERRUPTED, EXIT_RUN_FAILED, show_error, show_warning, write_out
from petractl.cli.sweep_progress import SweepProgress, progress_shown
from petractl.cli.table import write_table
from petractl.errors import Problem, RecipeError, RunError, UserError

if TYPE_CHECKING:
    from petractl.sweep.cells import CheckedSetting
    from petractl.sweep.grid import Grid
    from petractl.sweep.results import Results
    from petractl.sweep.runner import Job, Outcome
    from petractl.sweep.table import Row

_RECIPES, _LOGS = "recipe", "logs"


def command(
    recipe: RecipeArgument,
    grids: Annotated[
        list[str] | None,
        typer.Option(
            "--grid",
            metavar="KEY=VALUE,VALUE",
            help="Values to combine with those of other --grid; K1+K2=A+B,C+D varies keys together.",
        ),
    ] = None,
    cells: Annotated[
        list[str] | None,
        typer.Option(
            "--cell", metavar="KEY=VALUE,KEY=VALUE", help="One more cell besides the product. Repeatable."
        ),
    ] = None,
    overrides: SetOption = None,
    seeds: Annotated[
        str, typer.Option("--seeds", metavar="0,1,2", help="Run every cell with each of these run.seed.")
    ] = "",
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, help="Cells at a time; as many as the cores have room for."),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="The sweep's folder; the same again continues it."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the cells; run none.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train every combination of some values.

    Each cell is a run of its own in DIR, and the table sets them side by side. The same command again runs
    what is not finished. The table, as sweep.csv, sweep.md, sweep.json and sweep.png in DIR, is written again
    as each cell ends.
    """
    from petractl.sweep.grid import parse_grid

    _check_stands_alone()
    chosen = overrides or []
    grid = parse_grid(grids or [], cells=cells or [], seeds=seeds, overrides=chosen)
    place = _check_place(directory) or _new_place(recipe, grid, chosen)
    from petractl.sweep.cells import check_settings

    checked = check_settings(recipe, grid, overrides=chosen, directory=place)
    _tell_what_was_found(checked)
    if dry_run:
        _list_cells(checked, grid, as_json=as_json)
        return
    again = _command_line(recipe, grids, cells, chosen, seeds, jobs, place)
    _run(recipe, checked, grid, place, overrides=chosen, jobs=jobs, again=again, as_json=as_json)


def _run(
    recipe: str,
    checked: "Sequence[CheckedSetting]",
    grid: "Grid",
    place: Path,
    *,
    overrides: Sequence[str],
    jobs: int | None,
    again: str,
    as_json: bool,
) -> None:
    from petractl.recipe.find import find_recipe
    from petractl.run_folder import RunFolder
    from petractl.sweep.results import Results, check_tracking, sweep_facts

    allowed = [each for each in checked if each.recipe is not None]
    assert allowed[0].recipe is not None
    check_tracking(allowed[0].recipe)
    source = find_recipe(recipe)
    facts = sweep_facts(source.stem, grid, place, overrides=overrides)
    _make(place)
    with RunFolder(place).locked():
        recipes = _write_recipes(allowed, place / _RECIPES, source.name)
        results = Results(checked, grid, place, facts=facts)
        outcome, rows, status = _run_cells(allowed, results, recipes, place, jobs=jobs, facts=facts)
    _write_answer(rows, grid, results.document(rows, status), as_json=as_json)
    _end(outcome, place, again)


def _run_cells(
    allowed: "Sequence[CheckedSetting]",
    results: "Results",
    recipes: dict[str, Path],
    place: Path,
    *,
    jobs: int | None,
    facts: dict[str, Any],
) -> "tuple[Outcome, list[Row], str]":
    """Run what is not finished, and write the table as it comes; MLflow hears of all of it."""
    from petractl.sweep.results import FAILED, FINISHED, INTERRUPTED, RUNNING, open_tracker
    from petractl.sweep.runner import Runner
    from petractl.sweep.sharing import automatic_jobs, overload

    num_jobs = jobs or automatic_jobs(allowed)
    todo = _jobs(allowed, recipes, place / _LOGS, num_jobs=num_jobs)
    _tell_plan(allowed, todo, place, num_jobs=min(num_jobs, len(todo)))
    too_many = overload(allowed, num_jobs=min(num_jobs, len(todo)))
    if too_many:
        show_warning(Problem("--jobs", too_many, "lower it, or engine.threads"))
    assert allowed[0].recipe is not None

    def warn(message: str, hint: str) -> None:
        show_warning(
            Problem("", message, f"the sweep is not affected; {place / _LOGS / 'mlflow.log'} says more")
        )

    tracker = open_tracker(allowed[0].recipe, place, facts=facts, on_warning=warn)

    def look() -> None:
        if tracker is not None:
            tracker.look()

    def refresh(running: Sequence[str], failures: dict[str, str]) -> None:
        results.write(results.rows(failures, running), RUNNING)

    refresh([], {})
    try:
        with progress_shown(len(todo)) as (say, show):
            places = {job.cell.name: number for number, job in enumerate(todo, start=1)}
            watcher = SweepProgress(
                places, logs=place / _LOGS, say=say, show=show, refresh=refresh, look=look
            )
            look()
            outcome = Runner(todo, num_parallel=num_jobs, watcher=watcher).run()
        status = INTERRUPTED if outcome.is_interrupted else FAILED if outcome.failures else FINISHED
        rows = results.rows(outcome.failures)
        results.write(rows, status)
    finally:
        if tracker is not None:
            tracker.close()
    return outcome, rows, status


def _jobs(
    allowed: "Sequence[CheckedSetting]", recipes: dict[str, Path], logs: Path, *, num_jobs: int
) -> "list[Job]":
    """Return what is not finished: all cells with the first seed, then with the next, and so on."""
    from petractl.sweep.cells import State
    from petractl.sweep.runner import Job
    from petractl.sweep.sharing import threads_of_a_process

    rounds = max(len(each.cells) for each in allowed)
    ordered = [(each, each.cells[n]) for n in range(rounds) for each in allowed]
    return [
        Job(
            cell, recipes[each.name], logs / f"{cell.name}.log", threads_of_a_process(each, num_jobs=num_jobs)
        )
        for each, cell in ordered
        if cell.state is not State.FINISHED
    ]


def _write_recipes(allowed: "Sequence[CheckedSetting]", folder: Path, name: str) -> dict[str, Path]:
    """Write the recipe as it is now, which may be edited meanwhile; return each setting's, by its name."""
    from petractl.sweep.table import replace_text

    paths = {}
    for each in allowed:
        path = paths[each.name] = folder / each.name / name if each.left_out else folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, each.text)
    return paths


def _check_stands_alone() -> None:
    import os

    if int(os.environ.get("WORLD_SIZE", "1") or "1") > 1:
        raise UserError(
            "a sweep starts processes of its own, and cannot be started by torchrun",
            hint="call petractl sweep by itself; engine.mode says how each cell runs",
        )


def _check_place(directory: Path | None) -> Path | None:
    from petractl.tracking.comparison_run import is_run_folder

    if directory is None:
        return None
    if directory.exists() and not directory.is_dir():
        raise UserError("this is a file", where=str(directory), hint="give a folder with --dir")
    if is_run_folder(directory):
        raise UserError(
            "this is the folder of a run, not of a sweep", where=str(directory), hint="give another --dir"
        )
    return directory


def _new_place(recipe: str, grid: "Grid", overrides: Sequence[str]) -> Path:
    """Return the folder of a new sweep, where the recipe has its runs."""
    from petractl.recipe.find import find_recipe
    from petractl.recipe.load import load_recipe

    parent = Path("runs")
    for setting in grid.settings:
        try:
            loaded = load_recipe(recipe, overrides=[*overrides, *setting.overrides])
        except RecipeError:
            continue
        parent = Path(loaded.recipe.run.directory)
        break
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{find_recipe(recipe).stem}-sweep"
    names = (stem, *(f"{stem}-{count}" for count in range(2, 1000)))
    return next(parent / name for name in names if not (parent / name).exists())


def _make(place: Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot be made: {error.strerror or error}",
            where=str(place),
            hint="give a folder that can be written, with --dir",
        ) from None


def _tell_what_was_found(checked: "Sequence[CheckedSetting]") -> None:
    """Tell the warnings, each once with the cells that it is of, and what is not allowed."""
    found: dict[Problem, list[str]] = {}
    for each in checked:
        for warning in each.warnings:
            found.setdefault(warning, []).append(each.name)
        if each.left_out:
            keys = ", ".join(each.left_out)
            sys.stderr.write(f"{each.name}: without the recipe's {keys}, which its method cannot use\n")
    for warning, names in found.items():
        where = "" if len(names) == len(checked) else f" (in {', '.join(names[:3])}"
        where += "" if not where else f" and {len(names) - 3} more)" if len(names) > 3 else ")"
        show_warning(Problem(warning.key, warning.what + where, warning.hint))
    for each in checked:
        if each.refusal:
            sys.stderr.write(f"not allowed: {each.setting.text}: {each.why}\n")


def _tell_plan(
    allowed: "Sequence[CheckedSetting]", todo: "Sequence[Job]", place: Path, *, num_jobs: int
) -> None:
    total = sum(len(each.cells) for each in allowed)
    done = total - len(todo)
    parts = [f"{total} cells" if total != 1 else "1 cell"]
    parts += [f"{done} finished before"] if done else []
    parts += [f"{num_jobs} at a time"] if todo else ["nothing to do"]
    sys.stderr.write(f"{place}: {', '.join(parts)}\n")


def _list_cells(checked: "Sequence[CheckedSetting]", grid: "Grid", *, as_json: bool) -> None:
    rows = [
        {
            "name": cell.name,
            "folder": str(cell.folder),
            "values": dict(each.shown),
            "seed": cell.seed,
            "would": f"not allowed: {each.why}" if each.refusal else _would(cell),
        }
        for each in checked
        for cell in each.cells
    ]
    if as_json:
        write_out(json.dumps({"keys": list(grid.keys), "cells": rows}))
    else:
        write_table(("cell", "would"), [(str(row["name"]), str(row["would"])) for row in rows])


def _would(cell: Any) -> str:
    from petractl.sweep.cells import State

    if cell.state is State.NEW:
        return "run"
    record = cell.record()
    if cell.state is State.FINISHED:
        return "stay as it is: finished"
    return (
        f"resume after epoch {record.epochs_done} of {record.epochs}" if record.epochs_done else "start again"
    )


def _write_answer(rows: "Sequence[Row]", grid: "Grid", document: dict[str, Any], *, as_json: bool) -> None:
    from petractl.sweep.table import cells_of, headings

    if as_json:
        write_out(json.dumps(document))
    else:
        write_table(headings(grid.keys), [cells_of(row, grid.keys) for row in rows])


def _end(outcome: "Outcome", place: Path, again: str) -> None:
    """Name what failed, say how to go on, and end with the exit code."""
    for name, failure in outcome.failures.items():
        show_error(RunError(f"failed: {failure}", where=name, hint=f"see {place / _LOGS / name}.log"))
    if outcome.is_interrupted:
        sys.stderr.write(f"interrupted; continue with: {again}\n")
        raise typer.Exit(EXIT_INTERRUPTED)
    if outcome.failures:
        sys.stderr.write(f"to try what failed once more: {again}\n")
        raise typer.Exit(EXIT_RUN_FAILED)


def _command_line(
    recipe: str,
    grids: Sequence[str] | None,
    cells: Sequence[str] | None,
    overrides: Sequence[str],
    seeds: str,
    jobs: int | None,
    place: Path,
) -> str:
    """Return the command line that continues this sweep."""
    words = ["petractl", "sweep", recipe]
    for option, values in (("--grid", grids), ("--cell", cells), ("--set", overrides)):
        words += [word for value in values or () for word in (option, value)]
    words += ["--seeds", seeds] if seeds else []
    words += ["--jobs", str(jobs)] if jobs is not None else []
    return shlex.join([*words, "--dir", str(place)])
