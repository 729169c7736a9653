"""`petractl ls`: what there is, recipes, models, methods, data sets, runs."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from petractl.cli.options import JsonOption
from petractl.cli.report import write_out
from petractl.cli.table import write_table


class What(StrEnum):
    """What can be listed."""

    RECIPES = "recipes"
    MODELS = "models"
    METHODS = "methods"
    DATASETS = "datasets"
    RUNS = "runs"


@dataclass(frozen=True, slots=True)
class Listing:
    """Things with what is known of each; `columns` are shown in the table, all of it in JSON."""

    columns: tuple[str, ...]
    rows: Sequence[Mapping[str, object]]


def command(
    what: Annotated[What, typer.Argument(help="What to list.")] = What.RECIPES,
    as_json: JsonOption = False,
    directory: Annotated[
        Path, typer.Option("--directory", metavar="DIR", help="Where `ls runs` looks for run folders.")
    ] = Path("runs"),
) -> None:
    """List recipes, models, methods, data sets or runs."""
    listings: dict[What, Callable[[], Listing]] = {
        What.RECIPES: _recipes,
        What.MODELS: _models,
        What.METHODS: _methods,
        What.DATASETS: _datasets,
        What.RUNS: lambda: _runs(directory),
    }
    listing = listings[what]()
    if as_json:
        write_out(json.dumps(listing.rows, indent=2))
        return
    header = [column.replace("_", " ") for column in listing.columns]
    write_table(header, [[_cell(row[column]) for column in listing.columns] for row in listing.rows])


def _cell(value: object) -> str:
    return "-" if value is None else str(value)


def _recipes() -> Listing:
    from petractl.recipe.find import list_recipes

    rows = [{"name": r.name, "what": r.title, "path": str(r.path)} for r in list_recipes()]
    return Listing(("name", "what"), rows)


def _models() -> Listing:
    from petractl.models.registry import describe_model, list_models

    return Listing(("name", "what"), [{"name": name, "what": describe_model(name)} for name in list_models()])


def _datasets() -> Listing:
    from petractl.data.registry import dataset_summary, list_datasets
    from petractl.recipe.schema import DATASETS_WITHOUT_FILES, DOWNLOADABLE_DATASETS

    rows = [
        {
            "name": name,
            "place": None if name in DATASETS_WITHOUT_FILES else f"data/{name}",
            "download": "yes" if name in DOWNLOADABLE_DATASETS else None,
            "what": dataset_summary(name),
        }
        for name in list_datasets()
    ]
    return Listing(tuple(rows[0]), rows)


def _methods() -> Listing:
    from petractl.methods.family import METHODS, Keep

    inputs = {Keep.GRAPH: "graph", Keep.INPUT: "yes", Keep.NOTHING: "no"}
    rows = [
        {
            "name": spec.name,
            "keep": spec.keep or None,
            "keeps_inputs": inputs[spec.reversible.keep],
            "keeps_parameters": "yes" if spec.reversible.parameters else "no",
            "schedule": spec.default_schedule,
            "what": spec.summary,
        }
        for spec in METHODS
    ]
    return Listing(tuple(rows[0]), rows)


def _runs(directory: Path) -> Listing:
    from petractl.cli.runs import scan_runs

    columns = ("name", "recipe", "method", "epochs_done", "epochs", "best_top1", "status")
    return Listing(columns, [asdict(run) for run in scan_runs(directory)])
