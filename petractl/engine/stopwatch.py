"""How long a process computes: by the CPU's clock, or by events on a GPU's stream."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the time that this process computes: the CPU's clock, or events on a GPU's stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside."""
        if self._device.type != "cuda":
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        yield
        end.record()
        self._events.append((begin, end))

    def read(self) -> float:
        """Return the seconds since the last call; waits for the device."""
        if self._events:
            torch.cuda.synchronize(self._device)
        milliseconds = sum(float(begin.elapsed_time(end)) for begin, end in self._events)
        seconds = self._seconds + milliseconds / 1000
        self._seconds, self._events = 0.0, []
        return seconds
