"""What the run folders in a directory tell: read from their journals, which every run writes.

A journal may be of a run that is still going, was killed or ran on a full disk: lines that are not whole are
skipped, and what is not known stays empty.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petractl.errors import UserError

_JOURNAL = "metrics.jsonl"
_ENDINGS = {"run_finished": "finished", "run_interrupted": "interrupted", "run_failed": "failed"}


@dataclass(slots=True)
class RunSummary:
    """A run as its journal tells it; `best_top1` in percent."""

    name: str
    recipe: str | None = None
    method: str | None = None
    epochs_done: int = 0
    epochs: int | None = None
    best_top1: float | None = None
    status: str = "not started"


def scan_runs(directory: Path) -> list[RunSummary]:
    """Return the runs in a directory, by folder name (that is, by time).

    Raises:
        UserError: there is no such directory.
    """
    if not directory.is_dir():
        raise UserError(
            "no such folder",
            where=str(directory),
            hint="runs are made in run.directory of a recipe: try --directory",
        )
    folders = sorted(path for path in directory.iterdir() if path.is_dir())
    return [
        _summary(path) for path in folders if (path / _JOURNAL).exists() or (path / "resolved.toml").exists()
    ]


def _summary(folder: Path) -> RunSummary:
    summary = RunSummary(folder.name)
    for record in _records(folder / _JOURNAL):
        _add(summary, record)
    return summary


def _records(journal: Path) -> Iterator[Mapping[str, Any]]:
    try:
        lines = journal.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            yield record


def _add(summary: RunSummary, record: Mapping[str, Any]) -> None:
    match record.get("event"):
        case "run_started":
            summary.recipe, summary.method = record.get("recipe_name"), record.get("method")
            summary.status = "unfinished"
        case "plan_made":
            summary.epochs = record.get("epochs")
        case "epoch_trained" if isinstance(record.get("epoch"), int):
            summary.epochs_done = max(summary.epochs_done, record["epoch"])
        case "evaluated" if _is_finite(record.get("top1")):
            summary.best_top1 = round(max(summary.best_top1 or 0.0, record["top1"]), 2)
        case str(name) if name in _ENDINGS:
            summary.status = _ENDINGS[name]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
