"""What MLflow is told of a journal: metrics, parameters of the plan, and how the run has ended.

Pure functions of the journal's records. A journal may be damaged, or of another version: a record that is
not as it should be holds nothing, and what is not a number is no metric.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from petractl.events import (
    EpochTrained,
    Evaluated,
    GradientsDiagnosed,
    PlanMade,
    RunFailed,
    RunFinished,
    RunInterrupted,
    RunStarted,
    SamplesSkipped,
    StageMeasured,
    StepsDone,
)

FAILED = "FAILED"

_LONGEST_NAME = 240  # characters; MLflow keeps 250
_TOO_LARGE = 2**53  # for a step, and for milliseconds
_PLAN_PARAMETERS = (
    "microbatch_size",
    "accumulation",
    "samples_per_update",
    "parameters",
    "schedule",
    "method",
    "precision",
    "device",
    "threads",
    "replicas",
    "processes",
    "backend",
)
_DIAGNOSED = (
    "cosine",
    "norm_ratio",
    "cosine_forward",
    "norm_ratio_forward",
    "delayed_cosine",
    "delayed_norm_ratio",
    "guess_cosine",
    "guess_norm_ratio",
    "reconstruction_error",
)
_STATUS = {RunFinished.name: "FINISHED", RunInterrupted.name: "KILLED"}
_ENDS = (RunStarted.name, RunFinished.name, RunInterrupted.name, RunFailed.name)


@dataclass(frozen=True, slots=True)
class MetricPoint:
    """One value of one metric; `time_ms` is since 1970.

    `step` is the epoch; under "steps/" and "diagnosis/" it is the update.
    """

    key: str
    value: float
    step: int
    time_ms: int


def matters(record: dict[str, object]) -> bool:
    """Tell whether MLflow is told anything of a record; the progress within an epoch is not for it."""
    return bool(metric_points(record)) or str(record.get("event")).startswith("run_")


def metric_points(record: dict[str, object]) -> list[MetricPoint]:
    """Return the metrics in one record of the journal; most records hold none."""
    time_ms = record_time_ms(record)
    try:
        step, values = _metrics(record)
    except (KeyError, TypeError, ValueError):
        return []
    if time_ms is None or not 0 <= step < _TOO_LARGE:
        return []
    numbers = {mlflow_name(key): _number(value) for key, value in values.items()}
    return [MetricPoint(key, value, step, time_ms) for key, value in numbers.items() if value is not None]


def record_time_ms(record: dict[str, object]) -> int | None:
    """Return when a record was written, in milliseconds since 1970; None if it does not say."""
    seconds = _number(record.get("time"))
    if seconds is None or not 0.0 <= 1000.0 * seconds < _TOO_LARGE:
        return None
    return round(1000 * seconds)


def _metrics(record: dict[str, object]) -> tuple[int, dict[str, object]]:
    match record:
        case {"event": EpochTrained.name, "epoch": int(epoch)}:
            values = {f"train/{key}": record[key] for key in ("loss", "top1", "seconds")}
            others = ("images_per_s", "lr", "update", "data_wait_percent")
            return epoch, values | {key: record[key] for key in others}
        case {"event": StepsDone.name, "update": int(update)}:
            return update, {"steps/data_wait_percent": record.get("data_wait_percent")}
        case {"event": SamplesSkipped.name, "epoch": int(epoch)}:
            return epoch, {"samples_skipped": record["count"]}
        case {"event": Evaluated.name, "epoch": int(epoch)}:
            return epoch, {f"{record['split']}/{key}": record[key] for key in ("loss", "top1", "top5")}
        case {"event": StageMeasured.name, "epoch": int(epoch), "stage": int(), "replica": int()}:
            return epoch, _stage_metrics(record)
        case {"event": GradientsDiagnosed.name, "update": int(update), "stage": int(stage)}:
            return update, {f"diagnosis/{key}/stage_{stage:02d}": record[key] for key in _DIAGNOSED}
        case {"event": PlanMade.name, "stages": list(stages)}:
            return 0, {f"staleness_updates/stage_{s['index']:02}": s["staleness_updates"] for s in stages}
        case {"event": RunFinished.name, "epochs": int(epochs)}:
            keys = ("best_top1", "best_epoch", "peak_memory_bytes")
            return epochs, {key: record[key] for key in keys} | {"run_seconds": record["seconds"]}
    return 0, {}


def _stage_metrics(record: dict[str, object]) -> dict[str, object]:
    stage = f"stage_{record['stage']:02d}" + (f"_replica_{record['replica']}" if record["replica"] else "")
    sent = [_number(record[f"bytes_sent_{direction}"]) for direction in ("forward", "backward")]
    known = [count for count in sent if count is not None]
    values = {key: record[key] for key in ("idle_percent", "wait_forward_percent", "wait_backward_percent")}
    values |= {
        "bytes_sent": sum(known) if known else None,
        "staleness_measured": record["staleness_updates"],
    }
    return {f"{key}/{stage}": value for key, value in values.items()}


def plan_parameters(record: dict[str, object]) -> dict[str, str]:
    """Return the parameters that the plan adds to the recipe's; an older journal's plan has fewer."""
    stages = record.get("stages")
    count = len(stages) if isinstance(stages, list) else 0
    values = {f"plan.{key}": str(record[key]) for key in _PLAN_PARAMETERS if key in record}
    return values | {"plan.stages": str(count)}


def final_status(records: Iterable[dict[str, object]]) -> str:
    """Return MLflow's status for a run: FINISHED, KILLED or FAILED (also for one without an end)."""
    last = [record["event"] for record in records if record.get("event") in _ENDS][-1:]
    return _STATUS.get(str(last[0]), FAILED) if last else FAILED


def mlflow_name(name: str) -> str:
    """Return a name that MLflow accepts: it refuses brackets and percent signs, and what is no plain path."""
    plain = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:_LONGEST_NAME]
    return "/".join("_" if part in ("", ".", "..") else part for part in plain.split("/"))


def _number(value: object) -> float | None:
    """Return a number, also one that a journal has as a word ("NaN", "Infinity"); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if isinstance(value, int | float) or not math.isfinite(number) else None
