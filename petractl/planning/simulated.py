"""What a simulation is asked and what it answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from petractl.planning.rounds import Rounds
from petractl.planning.times import Link, StageTimes, limit_per_s

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StageResult:
    """How one stage fared; percent are of the time. With several stages per process: one process."""

    idle_percent: float
    wait_forward_percent: float
    """Idle before a forward: the message from the stage before it is missing."""
    wait_backward_percent: float
    """Idle before a backward. In an exact pipeline this takes all that is idle and not `wait_forward`."""
    staleness_updates: float
    """Updates between forward and backward of a microbatch, in the mean."""
    kept: float
    """Most microbatches between their forward and their backward; half a stage's count half."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """A schedule on given stages."""

    schedule: str
    lookahead: tuple[int, ...] | None
    """W; None for an exact pipeline."""
    accumulation: int
    num_microbatches: int | None
    """Of the epoch; None: the steady state."""
    seconds: float | None
    """Of the epoch, filling and draining included."""
    microbatches_per_s: float
    limit_per_s: float
    """The rate of the slowest stage alone."""
    stages: tuple[StageResult, ...]

    @property
    def idle_percent(self) -> float:
        """Mean over the stages."""
        return float(np.mean([stage.idle_percent for stage in self.stages]))

    @property
    def staleness_updates(self) -> float:
        """Mean over the stages."""
        return float(np.mean([stage.staleness_updates for stage in self.stages]))

    @property
    def share_of_limit(self) -> float:
        """The rate as a part of the limit."""
        return self.microbatches_per_s / self.limit_per_s


@dataclass(frozen=True, slots=True)
class Case:
    """What is simulated, whatever the schedule."""

    times: tuple[StageTimes, ...]
    links: tuple[Link, ...]
    accumulation: int
    jitter: float
    seed: int
    num_microbatches: int | None
    chunks: tuple[StageTimes, ...] | None = None
    """The stages of an interleaved pipeline, two per process; None: each process's times in two halves."""

    def check(self) -> None:
        """Raise a ValueError for numbers out of range."""
        if not self.times:
            raise ValueError("there is no stage")
        everything = [*self.times, *(self.chunks or ())]
        if any(min(time.forward_s, time.backward_s, time.update_s) < 0.0 for time in everything):
            raise ValueError("times must not be negative")
        if not all(map(math.isfinite, (time.busy_s + time.update_s for time in everything))):
            raise ValueError("times must be finite")
        if any(time.busy_s <= 0.0 for time in self.times):
            raise ValueError("every stage needs a positive time")
        if self.accumulation < 1 or (self.num_microbatches is not None and self.num_microbatches < 1):
            raise ValueError("accumulation and the number of microbatches are at least 1")
        if self.jitter < 0.0:
            raise ValueError(f"jitter = {self.jitter} must not be negative")

    def rounds(self, *, weight_share: float = 0.0) -> Rounds:
        """Return stages at rest."""
        return Rounds(self.times, self.links, jitter=self.jitter, seed=self.seed, weight_share=weight_share)

    def halves(self) -> tuple[StageTimes, ...]:
        """Return the times of two stages per process, in the order of the stages."""
        if self.chunks is not None:
            return self.chunks
        return tuple(time.on_device(2.0) for time in self.times) * 2

    @property
    def limit_per_s(self) -> float:
        """The rate of the slowest stage."""
        return limit_per_s(self.times, accumulation=self.accumulation)

    @property
    def slot_s(self) -> Vector:
        """What each stage computes per microbatch, its part of the update included."""
        return np.array([time.busy_s + time.update_s / self.accumulation for time in self.times])


def together(first: StageTimes, second: StageTimes) -> StageTimes:
    """Return the times of a process that holds two stages, its messages those of the first."""
    return replace(
        first,
        forward_s=first.forward_s + second.forward_s,
        backward_s=first.backward_s + second.backward_s,
        update_s=first.update_s + second.update_s,
    )


def stage_results(
    idle: Vector, forward: Vector, backward: Vector, *, staleness: Sequence[float], kept: Sequence[float]
) -> tuple[StageResult, ...]:
    """Build the stages' results; the idle part is shared out as the two kinds of waiting."""
    waits = forward + backward
    share = np.divide(forward, waits, out=np.ones_like(waits), where=waits > 0.0)
    return tuple(
        StageResult(
            idle_percent=100.0 * float(idle[j]),
            wait_forward_percent=100.0 * float(idle[j] * share[j]),
            wait_backward_percent=100.0 * float(idle[j] * (1.0 - share[j])),
            staleness_updates=staleness[j],
            kept=kept[j],
        )
        for j in range(len(idle))
    )
