"""What a sweep leaves in its folder while it runs and at its end, and what it tells MLflow.

The table is written again as each cell ends, so that a sweep of days can be looked at; the picture, which
takes longer, not more often than twice a minute until the end.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from petractl.errors import Problem, RecipeError
from petractl.recipe.schema import Recipe
from petractl.sweep.cells import CheckedSetting
from petractl.sweep.grid import Grid
from petractl.sweep.plot import plot_sweep
from petractl.sweep.table import PLOT_NAME, Row, as_document, make_rows, write_table
from petractl.tracking.masking import mask_credentials
from petractl.tracking.mlflow_tracker import MlflowTracker, tracking_problem, tracking_uri

RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"

_PICTURE_EVERY_S = 30.0
_TRACKING_WORKER = "petractl.tracking.mlflow_sweep"


class Results:
    """The table and the picture of one sweep."""

    def __init__(
        self, checked: Sequence[CheckedSetting], grid: Grid, directory: Path, *, facts: Mapping[str, Any]
    ) -> None:
        self._checked = checked
        self._grid = grid
        self._directory = directory
        self._facts = facts
        self._num_of_product = len(grid.settings) - grid.num_extra
        self._drawn_s = time.monotonic()

    def rows(self, failures: Mapping[str, str], running: Iterable[str] = ()) -> list[Row]:
        """Return the rows as the folders of the cells have them now."""
        return make_rows(
            self._checked, num_of_product=self._num_of_product, failures=failures, running=running
        )

    def document(self, rows: Sequence[Row], status: str) -> dict[str, Any]:
        """Return the sweep as one object."""
        return as_document(rows, facts={**self._facts, "status": status})

    def write(self, rows: Sequence[Row], status: str) -> None:
        """Write the table, and the picture at the end or where the last one is old."""
        write_table(rows, self._grid.keys, self._directory, facts={**self._facts, "status": status})
        if status == RUNNING and time.monotonic() - self._drawn_s < _PICTURE_EVERY_S:
            return
        seeds = len(self._grid.seeds)
        subtitle = f"{seeds} seeds" if seeds > 1 else ""
        title = f"Sweep of {self._facts['recipe']}"
        plot_sweep(rows, self._grid, self._directory / PLOT_NAME, title=title, subtitle=subtitle)
        self._drawn_s = time.monotonic()


def sweep_facts(recipe_name: str, grid: Grid, directory: Path, *, overrides: Sequence[str]) -> dict[str, Any]:
    """Return what says which sweep it is."""
    extra = grid.settings[len(grid.settings) - grid.num_extra :]
    return {
        "recipe": recipe_name,
        "directory": str(directory),
        "set": [mask_credentials(text) for text in overrides],
        "grid": {
            "+".join(axis.keys): [
                mask_credentials("+".join(each.text for each in choice)) for choice in axis.choices
            ]
            for axis in grid.axes
        },
        "cells": [[mask_credentials(text) for text in setting.overrides] for setting in extra],
        "seeds": list(grid.seeds),
        "keys": list(grid.keys),
    }


def check_tracking(recipe: Recipe) -> None:
    """Refuse an address that MLflow cannot use.

    Raises:
        RecipeError: it is neither a server nor a database.
    """
    tracking = recipe.tracking
    problem = tracking_problem(tracking.uri) if tracking.mlflow and tracking.uri else ""
    if problem:
        raise RecipeError([Problem("tracking.uri", f'"{mask_credentials(tracking.uri)}": {problem}')])


def open_tracker(
    recipe: Recipe, directory: Path, *, facts: Mapping[str, Any], on_warning: Callable[[str, str], None]
) -> MlflowTracker | None:
    """Return what shows the sweep in MLflow, as the parent of its runs; None where there is no MLflow."""
    tracking = recipe.tracking
    if not tracking.mlflow:
        return None
    parameters = {f"grid.{keys}": ", ".join(values) for keys, values in facts["grid"].items()}
    parameters |= {
        "recipe": facts["recipe"],
        "set": " ".join(facts["set"]),
        "cells": "; ".join(", ".join(each) for each in facts["cells"]),
        "seeds": ", ".join(map(str, facts["seeds"])),
    }
    return MlflowTracker(
        directory,
        uri=tracking_uri(tracking.uri, directory=Path(recipe.run.directory)),
        experiment=tracking.experiment,
        run_name=directory.name,
        parameters={key: value for key, value in parameters.items() if value},
        on_warning=on_warning,
        worker=_TRACKING_WORKER,
    )
