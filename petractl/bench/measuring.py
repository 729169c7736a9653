"""The measuring core: segments of training, timed where the pipeline is full.

A segment is one call of a pipeline's `train`:

    | fill and warm-up | timed | cool-down |        whole groups of k microbatches each
                       1       2

At 1 and at 2 the last stage has just done a microbatch, and every other stage is as far ahead of it at 1 as
at 2. So what lies between is the steady rate, neither filling nor draining: as many forwards as backwards on
every stage, none of them run before 1 to be missing, and none left for after 2.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle

from torch import Tensor

from petractl.bench.usage import SegmentUsage, Usage, nothing
from petractl.engine.pipeline import Pipeline

Microbatch = tuple[Tensor, Tensor]
"""Images (n, c, h, w) and labels (n,)."""


@dataclass(frozen=True, slots=True)
class Segment:
    """How many microbatches are trained on untimed, timed, and untimed again."""

    warmup: int
    timed: int
    cooldown: int

    @property
    def total(self) -> int:
        """All microbatches of the segment."""
        return self.warmup + self.timed + self.cooldown


def plan_segment(*, ahead: int, accumulation: int, microbatches: int, warmup: int) -> Segment:
    """Return a segment in which at least `microbatches` are timed after `warmup` with a full pipeline.

    `ahead`: the largest lookahead of the stages, which fills the pipeline and which drains from it.
    """
    assert min(microbatches, warmup) >= 1

    def whole(count: int) -> int:
        return -(-count // accumulation) * accumulation

    return Segment(warmup=whole(ahead + warmup), timed=whole(microbatches), cooldown=whole(ahead))


@dataclass(slots=True)
class Contender:
    """One of those compared, as one process holds it. `done`: microbatches that it was trained on so far."""

    name: str
    pipeline: Pipeline
    ahead: int
    usage: Callable[[], Usage | None] = nothing
    segment_usage: Callable[[], SegmentUsage | None] = nothing
    done: int = 0

    def train(
        self,
        microbatches: Sequence[Microbatch] | None,
        *,
        count: int,
        on_microbatch: Callable[[int], None] | None = None,
    ) -> None:
        """Train on `count` microbatches, the given ones in turn; None without the first stage."""
        source = None if microbatches is None else cycle(microbatches)
        self.pipeline.train(source, num_microbatches=count, offset=self.done, on_microbatch=on_microbatch)
        self.done += count


@dataclass(frozen=True, slots=True)
class Round:
    """What one process measured in one segment; None where it cannot tell.

    `images_per_s` is of the process with the last stage, `bytes_sent` per microbatch.
    """

    images_per_s: float | None
    idle_percent: float | None = None
    bytes_sent: float | None = None


@dataclass(frozen=True, slots=True)
class _Mark:
    microbatch: int
    time_s: float
    usage: Usage | None


@dataclass(slots=True)
class _Marks:
    """Takes the time when one of the microbatches `at` is done."""

    at: tuple[int, ...]
    usage: Callable[[], Usage | None]
    synchronize: Callable[[], None]
    taken: list[_Mark] = field(default_factory=list)

    def __call__(self, microbatch: int) -> None:
        if microbatch in self.at:
            self.take(microbatch)

    def take(self, microbatch: int) -> None:
        self.synchronize()
        self.taken.append(_Mark(microbatch, time.perf_counter(), self.usage()))


def measure_round(
    contender: Contender,
    microbatches: Sequence[Microbatch] | None,
    *,
    segment: Segment,
    batch_size: int,
    has_last_stage: bool = True,
    synchronize: Callable[[], None] = lambda: None,
) -> Round:
    """Train on a segment and return what this process measured of it.

    `microbatches` are taken in turn; None in a process without the first stage. `synchronize` waits for the
    device. A process whose pipeline calls back for no microbatch is measured over the whole segment, filling
    and draining included, and gives no rate.
    """
    ends = (segment.warmup - 1, segment.warmup + segment.timed - 1)
    marks = _Marks(ends, contender.usage, synchronize)
    whole = _Marks((), contender.usage, synchronize)
    whole.take(-1)
    contender.train(microbatches, count=segment.total, on_microbatch=marks)
    whole.take(segment.total - 1)
    begin, end = marks.taken or whole.taken
    seconds, count = end.time_s - begin.time_s, end.microbatch - begin.microbatch
    rate = count * batch_size / seconds if has_last_stage else None
    of_segment = contender.segment_usage()
    if of_segment is not None:
        return Round(rate, of_segment.idle_percent, of_segment.bytes_sent)
    if begin.usage is None or end.usage is None:
        return Round(rate)
    return Round(
        rate,
        idle_percent=100.0 * (end.usage.waited_s - begin.usage.waited_s) / seconds,
        bytes_sent=(end.usage.bytes_sent - begin.usage.bytes_sent) / count,
    )
