"""What a process did when: the operations of the first microbatches of an epoch, with their times.

The cost is two readings of a clock per operation: the host's, or events on a GPU's stream, which are read
when the epoch is done. Times are those of `time.perf_counter` in this process; `World.clock_offset` relates
the clocks of several.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from petractl.engine.schedule import Kind, Operation

TRACED_MICROBATCHES = 256
_NOTICEABLE_S = 1e-4  # a shorter wait is the handing over of a message


@dataclass(frozen=True, slots=True)
class Record:
    """One operation of a stage, when it was, and what the stage stood still for before it ("" nothing)."""

    stage: int
    kind: str
    microbatch: int
    start_s: float
    end_s: float
    waited_for: str = ""


@dataclass(frozen=True, slots=True)
class _Row:
    """One operation as it was recorded: marks of its start and end, and what its stage waited.

    `waited_s` is None where only the time since the process's last operation tells.
    """

    stage: int
    kind: str
    microbatch: int
    began: Any
    ended: Any
    waited_s: float | None


class Recorder:
    """Records the operations of the first `limit` microbatches of one epoch, which begins with it."""

    def __init__(self, device: torch.device, *, limit: int = TRACED_MICROBATCHES) -> None:
        self._device = device
        self._limit = limit
        self._rows: list[_Row] = []
        self._origin: tuple[float, Any] | None = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self._origin = (time.perf_counter(), self._mark())

    @contextmanager
    def operation(self, stage: int, operation: Operation, *, waited_s: float | None = 0.0) -> Iterator[None]:
        """Record what happens inside as one operation, before which the stage waited `waited_s`."""
        with self.work(stage, operation.kind.value, operation.microbatch, waited_s=waited_s):
            yield

    @contextmanager
    def work(
        self, stage: int, kind: str, microbatch: int, *, waited_s: float | None = None
    ) -> Iterator[None]:
        """Record what happens inside under the name of its kind ("F", "B", "W" for weights ...).

        Without `waited_s` the process is taken to have waited since its last operation.
        """
        if microbatch >= self._limit:
            yield
            return
        began = self._mark()
        yield
        self._rows.append(_Row(stage, kind, microbatch, began, self._mark(), waited_s))

    def records(self) -> list[Record]:
        """Return what was recorded; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        records: list[Record] = []
        for row in self._rows:
            start_s, end_s = self._time(row.began), self._time(row.ended)
            waited_s = row.waited_s
            # A GPU's queue runs behind the host, whose waiting says nothing of the device's.
            if waited_s is None or self._device.type == "cuda":
                waited_s = start_s - records[-1].end_s if records else 0.0
            reason = _reason(row.kind, row.stage, waited_s)
            records.append(Record(row.stage, row.kind, row.microbatch, start_s, end_s, reason))
        return records

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _time(self, mark: Any) -> float:
        if self._origin is None:
            return float(mark)
        started, event = self._origin
        return started + float(event.elapsed_time(mark)) / 1000.0


def _reason(kind: str, stage: int, waited_s: float) -> str:
    if waited_s < _NOTICEABLE_S:
        return ""
    if kind == Kind.BACKWARD:
        return "backward"
    return "forward" if kind in (Kind.FORWARD, Kind.FORWARD_BACKWARD) and stage > 0 else "other"
