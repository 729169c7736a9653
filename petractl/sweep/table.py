"""The table of a sweep: a row for each setting, with its runs of all seeds together.

Only finished runs count in a row's numbers, so a row says the same whenever it is looked at; its state says
how many there are. It is written as CSV for programs, as Markdown for people and as one JSON object, which
has every run by itself besides.
"""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from petractl.sweep.cells import Cell, CheckedSetting
from petractl.sweep.names import short_keys
from petractl.tracking.comparison_run import RunRecord

CSV_NAME, MARKDOWN_NAME, JSON_NAME, PLOT_NAME = "sweep.csv", "sweep.md", "sweep.json", "sweep.png"

_MEASURES = ("top1_mean", "top1_std", "best_top1_mean", "best_top1_std", "images_per_s", "peak_memory_bytes")
_MIB, _GIB = 2**20, 2**30
_STATES = ("finished", "running", "failed", "interrupted", "not started")


@dataclass(frozen=True, slots=True)
class Run:
    """A cell and what is known of its run; None is unknown. Accuracies in percent, memory in bytes."""

    name: str
    folder: str
    seed: int | None
    state: str
    failure: str = ""
    epochs_done: int = 0
    epochs: int | None = None
    top1: float | None = None
    best_top1: float | None = None
    images_per_s: float | None = None
    peak_memory_bytes: int | None = None
    seconds: float | None = None
    diverged: bool = False
    """Its training loss is no number any more, whatever its accuracy."""


@dataclass(frozen=True, slots=True)
class Row:
    """A setting: the value of every key of the grid, and its runs; `why` is why it is not allowed."""

    name: str
    values: Mapping[str, str]
    runs: tuple[Run, ...]
    why: str = ""
    is_extra: bool = False
    """It is a cell of its own, not one of the product."""

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that count."""
        return tuple(run for run in self.runs if run.state == "finished")

    def numbers(self, key: str) -> list[float]:
        """Return what the finished runs have of a number of `Run`."""
        found = [getattr(run, key) for run in self.finished]
        return [float(value) for value in found if value is not None and math.isfinite(value)]

    def mean(self, key: str) -> float | None:
        """Return the mean over the finished runs."""
        values = self.numbers(key)
        return fmean(values) if values else None

    def std(self, key: str) -> float | None:
        """Return the standard deviation over seeds (of a sample: n - 1); None for fewer than two."""
        values = self.numbers(key)
        return stdev(values) if len(values) > 1 else None

    @property
    def peak_memory_bytes(self) -> int | None:
        """The most that one of the runs held."""
        return max((run.peak_memory_bytes or 0 for run in self.finished), default=0) or None

    @property
    def state(self) -> str:
        """Where the setting stands, on one line."""
        if self.why:
            return f"not allowed: {self.why}"
        if len(self.runs) == 1:
            return _state_in_words(self.runs[0])
        states = [run.state for run in self.runs]
        if set(states) == {"finished"}:
            diverged = sum(run.diverged for run in self.runs)
            return f"finished, {diverged} diverged" if diverged else "finished"
        counts = [f"{states.count(state)} {state}" for state in _STATES if state in states]
        failures = dict.fromkeys(run.failure for run in self.runs if run.failure)
        return "; ".join([", ".join(counts), *failures])


def make_rows(
    checked: Sequence[CheckedSetting],
    *,
    num_of_product: int,
    failures: Mapping[str, str],
    running: Iterable[str] = (),
) -> list[Row]:
    """Read every cell's folder; `failures` and `running` are what the sweep knows of cells, by name."""
    at_work = set(running)
    rows = []
    for place, each in enumerate(checked):
        runs: tuple[Run, ...] = ()
        if not each.refusal:
            runs = tuple(_run(cell, failures, is_running=cell.name in at_work) for cell in each.cells)
        rows.append(Row(each.name, each.shown, runs, each.why, is_extra=place >= num_of_product))
    return rows


def _run(cell: Cell, failures: Mapping[str, str], *, is_running: bool) -> Run:
    record = cell.record()
    failure = "" if is_running else failures.get(cell.name, "")
    if not failure and record.state == "failed" and not is_running:
        failure = (record.failure or "no reason is known").partition("\n")[0]
    return Run(
        name=cell.name,
        folder=str(cell.folder),
        seed=cell.seed,
        state="running" if is_running else "failed" if failure else _state(record),
        failure=failure,
        epochs_done=record.epochs_done,
        epochs=record.epochs,
        top1=record.last_top1,
        best_top1=record.best_top1,
        images_per_s=record.images_per_s,
        peak_memory_bytes=record.peak_memory_bytes,
        seconds=record.seconds,
        diverged=_diverged(record),
    )


def _diverged(record: RunRecord) -> bool:
    losses = [*record.curves["train_loss"].values, *record.curves["loss"].values]
    return any(not math.isfinite(loss) for loss in losses)


def _state(record: RunRecord) -> str:
    return "interrupted" if record.state == "unfinished" else record.state


def _state_in_words(run: Run) -> str:
    if run.failure:
        return f"failed: {run.failure}"
    if run.state in ("running", "interrupted") and run.epochs:
        return f"{run.state}, {run.epochs_done} of {run.epochs} epochs done"
    return f"{run.state}, diverged" if run.diverged else run.state


def headings(keys: Sequence[str]) -> list[str]:
    """Return the headings of the table for people."""
    short = short_keys(keys)
    return [*(short[key] for key in keys), "top-1, %", "best, %", "images/s", "memory", "state"]


def cells_of(row: Row, keys: Sequence[str]) -> list[str]:
    """Return a row of the table for people."""
    return [
        *(row.values.get(key, "") for key in keys),
        with_deviation(row.mean("top1"), row.std("top1"), len(row.numbers("top1"))),
        with_deviation(row.mean("best_top1"), row.std("best_top1"), 0),
        _speed(row.mean("images_per_s")),
        _memory(row.peak_memory_bytes),
        row.state,
    ]


def with_deviation(mean: float | None, deviation: float | None, count: int) -> str:
    """Return "97.21 ± 0.30 (3)": mean, deviation and, unless it is 0 or 1, number of runs."""
    if mean is None:
        return "-"
    text = f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")
    return f"{text} ({count})" if count > 1 else text


def as_markdown(rows: Sequence[Row], keys: Sequence[str], *, title: str) -> str:
    """Return the table as Markdown."""
    head = headings(keys)
    lines = [head, ["---"] * len(head), *(cells_of(row, keys) for row in rows)]
    table = [f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines]
    note = "Top-1 after the last epoch: mean ± standard deviation (number of seeds); best: of all epochs."
    return "\n".join([f"# {title}", "", *table, "", note]) + "\n"


def as_csv(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """Return the table as CSV, its numbers in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*keys, "runs", "finished", *_MEASURES, "seconds", "state"])
    for row in rows:
        values = [row.values.get(key, "") for key in keys]
        measured = [_plain(measure) for measure in measures(row).values()]
        counts = [len(row.runs), len(row.finished)]
        writer.writerow([*values, *counts, *measured, _plain(row.mean("seconds")), row.state])
    return text.getvalue()


def measures(row: Row) -> dict[str, float | None]:
    """Return the numbers of a row, by the names that files and MLflow have for them."""
    numbers = (
        row.mean("top1"),
        row.std("top1"),
        row.mean("best_top1"),
        row.std("best_top1"),
        row.mean("images_per_s"),
        row.peak_memory_bytes,
    )
    return dict(zip(_MEASURES, numbers, strict=True))


def as_document(rows: Sequence[Row], *, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the whole sweep as one object; `facts` say which it is and how it stands."""
    return {
        **facts,
        "rows": [
            {
                "name": row.name,
                "values": dict(row.values),
                "state": row.state,
                "not_allowed": row.why or None,
                "finished": len(row.finished),
                **measures(row),
                "runs": [{name: getattr(run, name) for name in Run.__slots__} for run in row.runs],
            }
            for row in rows
        ],
    }


def write_table(
    rows: Sequence[Row], keys: Sequence[str], directory: Path, *, facts: Mapping[str, Any]
) -> None:
    """Write CSV, Markdown and JSON, each in one step: somebody may be reading."""
    title = f"Sweep of {facts['recipe']}"
    replace_text(directory / CSV_NAME, as_csv(rows, keys))
    replace_text(directory / MARKDOWN_NAME, as_markdown(rows, keys, title=title))
    replace_text(directory / JSON_NAME, json.dumps(as_document(rows, facts=facts), indent=1) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _speed(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _memory(value: int | None) -> str:
    if value is None:
        return "-"
    return f"{value / _GIB:.2f} GiB" if value >= _GIB else f"{value / _MIB:,.0f} MiB"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
