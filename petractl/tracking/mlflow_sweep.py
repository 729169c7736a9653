"""The process that shows a sweep in MLflow as one run with its cells below it, as nested runs.

Every cell's run sends itself, as any run does, and leaves its MLflow id in its folder. This process, started
by the sweep as `python -m petractl.tracking.mlflow_sweep`, opens the parent (the one that the sweep's folder
has so far, where it is continued), finds the ids and marks each run as the parent's child. So a run need not
know that it is part of a sweep, and one that was tracked late, or resumed by hand, finds its place as well.
At the end it sends the table: its numbers as metrics, its files as artifacts.
"""

import json
import re
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from petractl.tracking.mlflow_run import RUN_ID_NAME, MlflowRun, TrackingSettings
from petractl.tracking.mlflow_worker import Commands, Reporter, end, reason, serve

TABLE_NAME = "sweep.json"

_FILES = (TABLE_NAME, "sweep.csv", "sweep.md", "sweep.png")
_STATUS = {"finished": "FINISHED", "failed": "FAILED"}
_METRICS = ("top1_mean", "top1_std", "best_top1_mean", "images_per_s", "peak_memory_bytes")
_POLL_S = 1.0
_LONGEST_PAUSE_S = 60.0


def follow_sweep(settings: TrackingSettings, commands: Commands, reporter: Reporter) -> bool:
    """Nest the runs of a sweep as they come, until it is over; return whether everything was sent."""
    run = MlflowRun(settings, progress=lambda: reporter.tell("progress"))
    directory = Path(settings.run_dir)
    nested: set[str] = set()
    pause_s = 0.0  # nothing to wait for before the first try
    last_reason = ""
    closing = False
    while not closing:
        closing = commands.closing(pause_s)
        try:
            run.open()
            for run_id in sorted(run_ids(directory) - nested):
                run.nest(run_id)
                nested.add(run_id)
                reporter.tell("progress")
            pause_s = _POLL_S
            if closing:
                _send_table(run, directory)
        except Exception as error:
            pause_s = min(_LONGEST_PAUSE_S, max(2.0, 2.0 * pause_s))
            if reason(error) != last_reason:
                last_reason = reason(error)
                traceback.print_exc()
            reporter.tell("warning", reason(error))
            if closing:
                return False
    return True


def run_ids(directory: Path) -> set[str]:
    """Return the MLflow ids that the runs in a folder have so far."""
    texts = [path.read_text(encoding="ascii").strip() for path in directory.glob(f"*/{RUN_ID_NAME}")]
    return {text for text in texts if re.fullmatch(r"\w+", text)}


def table_metrics(table: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a sweep's table, each by its measure and the name of its row."""
    return dict(_metrics(table))


def _metrics(table: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    best: float | None = None
    for row in table["rows"]:
        for measure in _METRICS:
            if row[measure] is not None:
                yield f"{measure}/{row['name']}", float(row[measure])
        if row["top1_mean"] is not None:
            best = max(row["top1_mean"], -1.0 if best is None else best)
    if best is not None:
        yield "best_row_top1_mean", best
    yield "runs_finished", float(sum(row["finished"] for row in table["rows"]))


def _send_table(run: MlflowRun, directory: Path) -> None:
    path = directory / TABLE_NAME
    table: dict[str, Any] = {"rows": [], "status": ""}
    if path.is_file():
        table = json.loads(path.read_text(encoding="utf-8"))
    files = [directory / name for name in _FILES]
    run.log(table_metrics(table), [file for file in files if file.is_file()])
    run.finish(_STATUS.get(table["status"], "KILLED"))


if __name__ == "__main__":
    end(serve(follow_sweep))
