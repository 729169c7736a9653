"""The most memory that tensors hold while something is built and run.

On a GPU the allocator counts. The CPU's does not, and a process's resident set says little of one method
among several, so there PyTorch's profiler records every allocation and release; what was there before does
not count.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

_MEMORY_EVENT = "[memory]"
_MARK = "petractl: memory counts from here"
_CPU = 0


class PeakMemory:
    """The bytes that tensors made within a block held at most; known when the block has ended."""

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device = device

    def counts_from_here(self) -> None:
        """Leave the peak so far out, not what is still held of it."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            with torch.profiler.record_function(_MARK):
                pass


@contextmanager
def watched_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Watch the tensors on `device` that the block makes; on the CPU it runs slower meanwhile."""
    peak = PeakMemory(device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    # Its native part writes to stderr on machines without a GPU; nothing else can tell it not to.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        yield peak
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        peak.bytes = peak_of(json.loads(trace.read_bytes())["traceEvents"])


def peak_of(events: Sequence[Mapping[str, Any]]) -> int:
    """Return the most bytes that were allocated and not yet released, from the events of a trace."""
    changes = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == _MEMORY_EVENT and event["args"]["Device Type"] == _CPU
    ]
    begin = max((event["ts"] for event in events if event.get("name") == _MARK), default=-math.inf)
    held = most = 0
    for time, change in sorted(changes, key=lambda pair: pair[0]):
        if time >= begin:
            most = max(most, held)
        held += change
    return max(most, held)
