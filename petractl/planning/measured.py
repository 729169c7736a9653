"""What the journal of a run tells of its stages: what they were, how long they computed, how long they idled.

The first epoch of several is left out: libraries warm up in it. A journal that is damaged, although its lines
are JSON, is told as that.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from petractl.engine.exact_rules import EXACT_SCHEDULES
from petractl.errors import DataError
from petractl.planning.times import StageTimes

_GRAPH_FORWARD, _REBUILT_FORWARD = 1 / 3, 1 / 4
"""The forward's part of forward + backward, with the graph kept and without."""


@dataclass(frozen=True, slots=True)
class MeasuredStage:
    """One stage in the mean over epochs and replicas; percent are of the training time."""

    index: int
    slot_s: float
    """Computation per microbatch, updates included."""
    idle_percent: float
    staleness_updates: float | None


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """A run in the mean over its epochs; numbers of microbatches are per replica and epoch."""

    method: str
    schedule: str
    lookahead: tuple[int, ...]
    accumulation: int
    replicas: int
    num_microbatches: int
    samples: int
    """Of all replicas together."""
    epochs: int
    """That were measured."""
    seconds: float
    stages: tuple[MeasuredStage, ...]

    @property
    def images_per_s(self) -> float:
        """Of all replicas together."""
        return self.samples / self.seconds

    @property
    def schedule_to_simulate(self) -> str | tuple[int, ...]:
        """The name of an exact pipeline, else W."""
        return self.schedule if self.schedule in EXACT_SCHEDULES else self.lookahead

    def times(self) -> tuple[StageTimes, ...]:
        """Return stage times from what each stage computed; forward and backward are split by their FLOPs."""
        keeps_graph = self.method == "backprop" or self.method in ("delayed", "delayed (keep = graph)")
        part = _GRAPH_FORWARD if keeps_graph else _REBUILT_FORWARD
        return tuple(
            StageTimes(forward_s=stage.slot_s * part, backward_s=stage.slot_s * (1.0 - part))
            for stage in self.stages
        )


def measured_run(records: Sequence[Mapping[str, Any]], *, where: str) -> MeasuredRun:
    """Read the journal's records.

    Raises:
        DataError: no epoch was measured stage by stage, or what is told of them cannot be.
    """
    try:
        measured = _measured_run(records, where=where)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        what = f"the journal is damaged ({type(error).__name__}: {error})"
        raise DataError(what, where=where, hint="give another run") from None
    if not _is_possible(measured):
        raise DataError("the journal tells what cannot be", where=where, hint="give another run")
    return measured


def _measured_run(records: Sequence[Mapping[str, Any]], *, where: str) -> MeasuredRun:
    of_event = {
        name: [record for record in records if record.get("event") == name]
        for name in ("plan_made", "stage_measured", "epoch_trained")
    }
    plans = of_event["plan_made"]
    rows = [row for row in of_event["stage_measured"] if row["compute_percent"] is not None]
    trained = {record["epoch"]: record for record in of_event["epoch_trained"]}
    epochs = sorted({row["epoch"] for row in rows} & set(trained))
    if not plans or not epochs:
        raise DataError(
            "the journal has no measured stages",
            where=where,
            hint='only runs in processes measure their stages (engine.mode = "processes"), epoch by epoch',
        )
    plan = plans[-1]
    # A run that was resumed with another partition has other stages before.
    count = len(plan["stages"])
    epochs = [
        epoch for epoch in epochs if {r["stage"] for r in rows if r["epoch"] == epoch} == set(range(count))
    ]
    if not epochs:
        raise DataError("no epoch has all of its stages measured", where=where, hint="give another run")
    epochs = epochs[1:] or epochs
    chosen = [row for row in rows if row["epoch"] in epochs]
    return MeasuredRun(
        method=plan["method"],
        schedule=plan["schedule"],
        lookahead=tuple(stage["lookahead"] for stage in plan["stages"]),
        accumulation=plan["accumulation"],
        replicas=plan["replicas"],
        num_microbatches=plan["steps_per_epoch"],
        samples=round(fmean(trained[epoch]["samples"] for epoch in epochs)),
        epochs=len(epochs),
        seconds=fmean(trained[epoch]["seconds"] for epoch in epochs),
        stages=tuple(
            _stage(j, [row for row in chosen if row["stage"] == j], microbatches=plan["steps_per_epoch"])
            for j in range(count)
        ),
    )


def _stage(index: int, rows: Sequence[Mapping[str, Any]], *, microbatches: int) -> MeasuredStage:
    staleness = [row["staleness_updates"] for row in rows if row["staleness_updates"] is not None]
    return MeasuredStage(
        index=index,
        slot_s=fmean(row["seconds"] * row["compute_percent"] / 100.0 for row in rows) / microbatches,
        idle_percent=fmean(row["idle_percent"] for row in rows),
        staleness_updates=fmean(staleness) if staleness else None,
    )


def _is_possible(run: MeasuredRun) -> bool:
    """Tell whether values are of their type and in their limits; a damaged journal may hold any."""
    wholes = (run.accumulation, run.replicas, run.num_microbatches, *run.lookahead)
    percents = [stage.idle_percent for stage in run.stages]
    staleness = [s.staleness_updates for s in run.stages if s.staleness_updates is not None]
    times = [run.seconds, *(stage.slot_s for stage in run.stages)]
    return (
        isinstance(run.method, str)
        and isinstance(run.schedule, str)
        and all(type(number) is int for number in wholes)
        and min(run.accumulation, run.replicas, run.samples, run.num_microbatches) >= 1
        and all(a >= b for a, b in pairwise(run.lookahead))
        and run.lookahead[-1] == 0
        and all(math.isfinite(value) for value in (*percents, *staleness))
        and all(0.0 < seconds < math.inf for seconds in times)
    )
