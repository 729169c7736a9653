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


class Recorder:
    """Records the operations of an epoch's first `limit` microbatches."""

    def __init__(self, device: torch.device, *, limit: int = TRACED_MICROBATCHES) -> None:
        self._device = device
        self._limit = limit
        self._rows: list[tuple[int, Operation, Any, Any, str]] = []
        self._origin: tuple[float, Any] | None = None

    def start(self) -> None:
        """Begin an epoch."""
        self._rows.clear()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._origin = (time.perf_counter(), self._mark())

    @contextmanager
    def operation(self, stage: int, operation: Operation, *, waited_s: float = 0.0) -> Iterator[None]:
        """Record what happens inside as one operation, before which the stage waited `waited_s`."""
        if operation.microbatch >= self._limit:
            yield
            return
        began = self._mark()
        yield
        self._rows.append((stage, operation, began, self._mark(), _reason(operation, stage, waited_s)))

    def records(self) -> list[Record]:
        """Return what was recorded since `start`; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return [
            Record(stage, operation.kind.value, operation.microbatch, self._time(a), self._time(b), waited)
            for stage, operation, a, b, waited in self._rows
        ]

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


def _reason(operation: Operation, stage: int, waited_s: float) -> str:
    if waited_s < _NOTICEABLE_S:
        return ""
    if operation.kind is Kind.BACKWARD:
        return "backward"
    return "other" if operation.kind is Kind.UPDATE or stage == 0 else "forward"
