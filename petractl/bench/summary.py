"""What a comparison found: medians and spreads, in one value per variant."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from petractl.bench.measuring import Round, Segment
from petractl.events import PlanMade


@dataclass(frozen=True, slots=True)
class Spread:
    """One value per repeat."""

    all: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.all)

    @property
    def min(self) -> float:
        """The smallest value."""
        return min(self.all)

    @property
    def max(self) -> float:
        """The largest value."""
        return max(self.all)

    def as_json(self) -> dict[str, Any]:
        """Return median, ends and all values."""
        return {"median": self.median, "min": self.min, "max": self.max, "all": list(self.all)}


@dataclass(frozen=True, slots=True)
class ProcessSummary:
    """One process: its stages, and what it measured (medians); None where it was not measured."""

    rank: int
    stages: tuple[int, ...]
    peak_memory_bytes: int
    idle_percent: float | None
    bytes_sent_per_microbatch: float | None


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured of one variant. `ratio` is taken within each repeat, to the first variant."""

    variant: str
    plan: PlanMade
    segment: Segment
    images_per_s: Spread
    ratio: Spread
    processes: tuple[ProcessSummary, ...]
    has_diverged: bool

    @property
    def idle(self) -> tuple[float, ...]:
        """Idle percent of the processes that measured it."""
        return tuple(p.idle_percent for p in self.processes if p.idle_percent is not None)

    @property
    def peak_memory_bytes(self) -> tuple[int, ...]:
        """Peak memory of every process."""
        return tuple(p.peak_memory_bytes for p in self.processes)

    @property
    def bytes_sent(self) -> float | None:
        """Bytes on the wire per microbatch and pipeline, all stages together; None if not measured."""
        sent = [p.bytes_sent_per_microbatch for p in self.processes]
        known = [value for value in sent if value is not None]
        return sum(known) / self.plan.replicas if len(known) == len(sent) else None

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` writes."""
        return {
            "variant": self.variant,
            "method": self.plan.method,
            "schedule": self.plan.schedule,
            "stages": len(self.plan.stages),
            "replicas": self.plan.replicas,
            "microbatch_size": self.plan.microbatch_size,
            "accumulation": self.plan.accumulation,
            "precision": self.plan.precision,
            "device": self.plan.device,
            "threads": self.plan.threads,
            "microbatches": {
                "warmup": self.segment.warmup,
                "timed": self.segment.timed,
                "cooldown": self.segment.cooldown,
            },
            "images_per_s": self.images_per_s.as_json(),
            "ratio": self.ratio.as_json(),
            "bytes_sent_per_microbatch": self.bytes_sent,
            "processes": [
                {
                    "rank": p.rank,
                    "stages": list(p.stages),
                    "idle_percent": p.idle_percent,
                    "peak_memory_bytes": p.peak_memory_bytes,
                    "bytes_sent_per_microbatch": p.bytes_sent_per_microbatch,
                }
                for p in self.processes
            ],
            "diverged": self.has_diverged,
        }


def rate_of(rounds: Iterable[Round]) -> float:
    """Return images/s of one segment from all processes: the sum over replicas."""
    return math.fsum(r.images_per_s for r in rounds if r.images_per_s is not None)


def summarise_processes(
    rounds: Sequence[Sequence[Round]],
    *,
    stages: Sequence[tuple[int, ...]],
    peak_memory_bytes: Sequence[int],
) -> tuple[ProcessSummary, ...]:
    """Return one summary per process; `rounds` are by repeat and then by rank, the others by rank."""
    return tuple(
        ProcessSummary(
            rank=rank,
            stages=stages[rank],
            peak_memory_bytes=peak_memory_bytes[rank],
            idle_percent=_median(r.idle_percent for r in own),
            bytes_sent_per_microbatch=_median(r.bytes_sent for r in own),
        )
        for rank, own in enumerate(zip(*rounds, strict=True))
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
