"""One run as its folder tells it, to be set beside others: its keys, and what its journal has measured.

The run may be going on, killed, or years old. So nothing is taken for granted: lines that are no JSON are
counted and left out, a key or a number that is not there stays None, and what could not be read is told in
`problems`. Epochs that a resumed run trained again count as they were trained last. Times leave out the
pauses between an interruption and the resumption.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import tomli

from petractl.events import (
    EpochTrained,
    Evaluated,
    PlanMade,
    RunFailed,
    RunFinished,
    RunInterrupted,
    RunStarted,
    StageMeasured,
)
from petractl.tracking.journal import JOURNAL_NAME

UNFINISHED = "unfinished"  # going on or killed: the journal cannot tell

_TOO_LARGE = 2**63  # for a number of epochs or bytes
_NOT_STARTED = "not started"
_RESOLVED = "resolved.toml"
_ENDINGS = {RunFinished.name: "finished", RunInterrupted.name: "interrupted", RunFailed.name: "failed"}


@dataclass(frozen=True, slots=True)
class Metric:
    """A number that each epoch has: the event and the key that hold it, and how an axis names it."""

    event: str
    key: str
    title: str
    unit: str


METRICS = {
    "top1": Metric(Evaluated.name, "top1", "Test top-1", "percent of samples"),
    "top5": Metric(Evaluated.name, "top5", "Test top-5", "percent of samples"),
    "loss": Metric(Evaluated.name, "loss", "Test loss", "nats per sample"),
    "train_top1": Metric(EpochTrained.name, "top1", "Training top-1", "percent of samples"),
    "train_loss": Metric(EpochTrained.name, "loss", "Training loss", "nats per sample"),
    "images_per_s": Metric(EpochTrained.name, "images_per_s", "Images per second", "images/s"),
    "seconds": Metric(EpochTrained.name, "seconds", "Training time of an epoch", "s"),
    "lr": Metric(EpochTrained.name, "lr", "Learning rate at the end of the epoch", ""),
    "data_wait_percent": Metric(EpochTrained.name, "data_wait_percent", "Time spent waiting for data", "%"),
}


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric by epoch, ascending; `seconds` is how long the run had been active then."""

    epochs: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run: None is what its journal does not tell. Accuracies in percent, sizes in bytes, times in s."""

    path: Path
    name: str
    state: str  # "finished", "interrupted", "failed", "unfinished", "not started"
    keys: Mapping[str, Any] | None  # of resolved.toml with defaults, as "section.key"
    curves: Mapping[str, Curve]  # by name of METRICS
    failure: str | None = None
    problems: tuple[str, ...] = ()  # what could not be read
    epochs_done: int = 0
    epochs: int | None = None
    best_top1: float | None = None
    best_epoch: int | None = None
    last_top1: float | None = None
    last_top5: float | None = None
    last_loss: float | None = None
    images_per_s: float | None = None  # median over the epochs after the first, or of the only one
    peak_memory_bytes: int | None = None  # of the stage, or process, that held most
    device_kind: str | None = None  # "cpu", "cuda", or both
    seconds: float | None = None


def is_run_folder(path: Path) -> bool:
    """Return whether a folder holds a run, whatever became of it."""
    return (path / JOURNAL_NAME).is_file() or (path / _RESOLVED).is_file()


def read_run(path: Path, *, defaults: Mapping[str, Any]) -> RunRecord:
    """Read a run folder; `defaults` are the values of keys that its resolved.toml leaves out."""
    problems: list[str] = []
    keys = _read_keys(path / _RESOLVED, defaults=defaults, problems=problems)
    story = _Story()
    for record in _read_records(path / JOURNAL_NAME, problems=problems):
        story.add(record)
    curves = {name: story.curve(metric) for name, metric in METRICS.items()}
    top1 = [(value, -epoch) for epoch, value in _points(curves["top1"]) if math.isfinite(value)]
    best_top1, best_epoch = max(top1, default=(None, None))
    return RunRecord(
        path=path,
        name=path.resolve().name,
        state=story.state,
        keys=keys,
        curves=curves,
        failure=story.failure,
        problems=tuple(problems),
        epochs_done=max(story.rows[EpochTrained.name], default=0),
        epochs=story.epochs,
        best_top1=best_top1,
        best_epoch=None if best_epoch is None else -best_epoch,
        last_top1=_last(curves["top1"]),
        last_top5=_last(curves["top5"]),
        last_loss=_last(curves["loss"]),
        images_per_s=_steady(curves["images_per_s"]),
        peak_memory_bytes=story.peak_memory_bytes,
        device_kind=story.device_kind,
        seconds=story.seconds,
    )


def _read_keys(path: Path, *, defaults: Mapping[str, Any], problems: list[str]) -> Mapping[str, Any] | None:
    try:
        sections = tomli.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        problems.append(f"has no {_RESOLVED}: its keys are not known")
        return None
    except OSError as error:
        problems.append(f"its {_RESOLVED} cannot be read ({error.strerror}): its keys are not known")
        return None
    except (ValueError, RecursionError):
        problems.append(f"its {_RESOLVED} is damaged: its keys are not known")
        return None
    tables = {name: table for name, table in sections.items() if isinstance(table, dict)}
    given = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    return _in_order({**defaults, **given})


def _in_order(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys section by section, the name of what a section chooses first."""
    sections = list(dict.fromkeys(key.partition(".")[0] for key in keys))
    order = sorted(keys, key=lambda key: (sections.index(key.partition(".")[0]), not key.endswith(".name")))
    return {key: keys[key] for key in order}


def _read_records(path: Path, *, problems: list[str]) -> Iterator[Mapping[str, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        problems.append(f"has no {JOURNAL_NAME}: nothing is known of what it did")
        return
    except OSError as error:
        problems.append(f"its {JOURNAL_NAME} cannot be read ({error.strerror})")
        return
    damaged: list[int] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            yield record
        else:
            damaged.append(number)
    is_cut = damaged[-1:] == [len(lines)]  # the last line has no end
    if is_cut:
        problems.append(f"the last line of its {JOURNAL_NAME} is cut short")
        damaged.pop()
    if damaged:
        count = "1 line" if len(damaged) == 1 else f"{len(damaged):,} lines"
        problems.append(f"{count} of its {JOURNAL_NAME} cannot be read, the first is line {damaged[0]}")


@dataclass(slots=True)
class _Story:
    """What the records have told so far; `rows` are (seconds, record) by event and epoch."""

    state: str = _NOT_STARTED
    failure: str | None = None
    epochs: int | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    device_kind: str | None = None
    rows: dict[str, dict[int, tuple[float, Mapping[str, Any]]]] = field(
        default_factory=lambda: {EpochTrained.name: {}, Evaluated.name: {}}
    )
    _time: float | None = None  # of the record before this one, in the same session

    def add(self, record: Mapping[str, Any]) -> None:
        """Take the next record of the journal."""
        event = record.get("event")
        if not isinstance(event, str):
            return
        self.state = UNFINISHED if self.state == _NOT_STARTED else self.state
        if event == RunStarted.name:
            self._time = None
            self._go_back(_whole(record.get("resumed_from_epoch")) or 0)
        self._pass_time(_number(record.get("time")))
        if event == RunStarted.name:
            self.state, self.failure = UNFINISHED, None
        elif event == PlanMade.name:
            self.epochs = _whole(record.get("epochs"))
            self.device_kind = _device_kind(record) or self.device_kind
        elif event in self.rows:
            epoch = _whole(record.get("epoch"))
            if epoch is not None and epoch > 0:
                self.rows[event][epoch] = (self.seconds or 0.0, record)
        elif event in _ENDINGS:
            self.state = _ENDINGS[event]
            self.failure = str(record.get("message", "")) if event == RunFailed.name else None
        if event in (StageMeasured.name, RunFinished.name):
            held = _whole(record.get("peak_memory_bytes"))
            self.peak_memory_bytes = max(filter(None, (held, self.peak_memory_bytes)), default=None)

    def curve(self, metric: Metric) -> Curve:
        """Return a metric of the epochs that have it."""
        points = [
            (epoch, seconds, value)
            for epoch, (seconds, record) in sorted(self.rows[metric.event].items())
            if (value := _number(record.get(metric.key))) is not None
        ]
        if not points:
            return Curve()
        epochs, seconds, values = zip(*points, strict=True)
        return Curve(epochs, seconds, values)

    def _go_back(self, epoch: int) -> None:
        """Forget the epochs that will be trained again."""
        for rows in self.rows.values():
            for later in [known for known in rows if known > epoch]:
                del rows[later]

    def _pass_time(self, now: float | None) -> None:
        if now is None or not math.isfinite(now):
            return
        passed = 0.0 if self._time is None else max(0.0, now - self._time)
        self.seconds = (self.seconds or 0.0) + passed
        self._time = now


def _points(curve: Curve) -> Iterable[tuple[int, float]]:
    return zip(curve.epochs, curve.values, strict=True)


def _last(curve: Curve) -> float | None:
    return curve.values[-1] if curve.values else None


def _steady(curve: Curve) -> float | None:
    """Return the median after the first epoch, in which libraries warm up."""
    values = [value for _, value in _points(curve) if math.isfinite(value)]
    later = [value for epoch, value in _points(curve) if math.isfinite(value) and epoch > curve.epochs[0]]
    return median(later or values) if values else None


def _device_kind(plan: Mapping[str, Any]) -> str | None:
    """Return the kinds of device that a plan names: "cuda" of "cuda:0, cuda:1"."""
    stages = plan.get("stages")
    stages = [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    named = ",".join(str(stage.get("device") or "") for stage in stages)
    if not named.strip(","):
        named = str(plan.get("device") or "")
    kinds = sorted({place.strip().partition(":")[0] for place in named.split(",")} - {""})
    return ", ".join(kinds) or None


def _number(value: object) -> float | None:
    """Return a number, also "NaN" and "Infinity" as the journal writes them; None for anything else."""
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(str(value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _whole(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if abs(value) < _TOO_LARGE else None
