"""The measuring core, on pipelines whose times are known."""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from petractl.bench import measuring
from petractl.bench.measuring import Contender, Round, measure_round, plan_segment
from petractl.bench.usage import SegmentUsage, Usage

DATA = [(torch.zeros(4, 1), torch.zeros(4)), (torch.ones(4, 1), torch.ones(4))]


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Scripted:
    """A pipeline of one process in which microbatch i takes `seconds(i)`, and draining 100 s."""

    accumulation = 1
    stages = ()

    def __init__(self, clock: Clock, seconds: Callable[[int], float], *, calls_back: bool = True) -> None:
        self._clock = clock
        self._seconds = seconds
        self._calls_back = calls_back
        self.usage = Usage()
        self.fed: list[float] = []
        self.trained: list[tuple[int, int]] = []

    def train(
        self,
        source: Iterator[Any] | None,
        *,
        num_microbatches: int,
        num_rows: int | None = None,
        offset: int = 0,
        on_microbatch: Callable[[int], None] | None = None,
    ) -> None:
        self.trained.append((offset, num_microbatches))
        for i in range(num_microbatches):
            if source is not None:
                self.fed.append(float(next(source)[0].sum()))
            self._clock.now += self._seconds(i)
            self.usage = Usage(self.usage.waited_s + self._seconds(i) / 4, self.usage.bytes_sent + 10)
            if on_microbatch is not None and self._calls_back:
                on_microbatch(i)
        self._clock.now += 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measuring, "time", clock)
    return clock


def contender(pipeline: Scripted, *, ahead: int = 0, measures: bool = False) -> Contender:
    if measures:
        return Contender("it", pipeline, ahead, usage=lambda: pipeline.usage)
    return Contender("it", pipeline, ahead)


@given(
    st.integers(0, 40),
    st.integers(1, 9),
    st.integers(1, 50),
    st.integers(1, 20),
)
def test_a_segment_is_whole_groups_with_the_pipeline_full(
    ahead: int, k: int, timed: int, warmup: int
) -> None:
    segment = plan_segment(ahead=ahead, accumulation=k, microbatches=timed, warmup=warmup)
    assert all(part % k == 0 for part in (segment.warmup, segment.timed, segment.cooldown))
    assert ahead + warmup <= segment.warmup < ahead + warmup + k
    assert timed <= segment.timed < timed + k
    assert ahead <= segment.cooldown < ahead + k
    assert segment.total == segment.warmup + segment.timed + segment.cooldown


def test_only_the_steady_part_counts(clock: Clock) -> None:
    segment = plan_segment(ahead=2, accumulation=1, microbatches=4, warmup=1)
    pipeline = Scripted(clock, lambda i: 0.5 if 3 <= i < 7 else 50.0)
    measured = measure_round(contender(pipeline, ahead=2), DATA, segment=segment, batch_size=4)
    assert measured == Round(images_per_s=8.0)


def test_microbatches_are_taken_in_turn_and_counted_on(clock: Clock) -> None:
    pipeline = Scripted(clock, lambda i: 1.0)
    entrant = contender(pipeline)
    segment = plan_segment(ahead=0, accumulation=1, microbatches=2, warmup=1)
    for _ in range(2):
        measure_round(entrant, DATA, segment=segment, batch_size=4)
    assert pipeline.fed == [0.0, 4.0, 0.0] * 2
    assert pipeline.trained == [(0, 3), (3, 3)]
    assert entrant.done == 6


def test_waiting_and_bytes_are_of_the_steady_part(clock: Clock) -> None:
    segment = plan_segment(ahead=1, accumulation=2, microbatches=4, warmup=1)
    pipeline = Scripted(clock, lambda i: 2.0)
    measured = measure_round(contender(pipeline, measures=True), DATA, segment=segment, batch_size=4)
    assert measured == Round(images_per_s=2.0, idle_percent=25.0, bytes_sent=10.0)


def test_a_process_without_the_last_stage_has_no_rate(clock: Clock) -> None:
    segment = plan_segment(ahead=1, accumulation=1, microbatches=4, warmup=1)
    pipeline = Scripted(clock, lambda i: 2.0)
    entrant = contender(pipeline, measures=True)
    measured = measure_round(entrant, None, segment=segment, batch_size=4, has_last_stage=False)
    assert measured == Round(images_per_s=None, idle_percent=25.0, bytes_sent=10.0)
    assert pipeline.fed == []


def test_a_process_that_is_not_called_back_is_measured_as_a_whole(clock: Clock) -> None:
    segment = plan_segment(ahead=0, accumulation=1, microbatches=4, warmup=1)
    pipeline = Scripted(clock, lambda i: 20.0, calls_back=False)
    entrant = contender(pipeline, measures=True)
    measured = measure_round(entrant, None, segment=segment, batch_size=4, has_last_stage=False)
    assert measured == Round(images_per_s=None, idle_percent=12.5, bytes_sent=10.0)


def test_what_is_known_of_a_segment_counts_as_a_whole(clock: Clock) -> None:
    segment = plan_segment(ahead=0, accumulation=1, microbatches=4, warmup=1)
    entrant = contender(Scripted(clock, lambda i: 2.0))
    entrant.segment_usage = lambda: SegmentUsage(idle_percent=40.0, bytes_sent=7.0)
    assert measure_round(entrant, DATA, segment=segment, batch_size=4) == Round(2.0, 40.0, 7.0)


def test_the_device_is_waited_for_at_both_ends(clock: Clock) -> None:
    segment = plan_segment(ahead=0, accumulation=1, microbatches=4, warmup=2)
    pipeline = Scripted(clock, lambda i: 1.0)

    def synchronize() -> None:
        clock.now += 0.25

    measured = measure_round(
        contender(pipeline), DATA, segment=segment, batch_size=4, synchronize=synchronize
    )
    assert measured.images_per_s == pytest.approx(16 / 4.25)


def test_a_real_clock_gives_a_real_rate() -> None:
    class Sleeping(Scripted):
        def train(self, source: Any, **how: Any) -> None:
            for i in range(how["num_microbatches"]):
                time.sleep(0.01)
                how["on_microbatch"](i)

    segment = plan_segment(ahead=1, accumulation=1, microbatches=10, warmup=2)
    rates = [
        measure_round(
            contender(Sleeping(Clock(), lambda i: 0.0)), DATA, segment=segment, batch_size=4
        ).images_per_s
        for _ in range(3)
    ]
    assert all(rate is not None and rate <= 400.0 for rate in rates)
    assert max(rate for rate in rates if rate is not None) > 200.0


def test_work_between_the_marks_is_that_of_as_many_microbatches() -> None:
    """With lookaheads in one process, each stage runs as many forwards as backwards between the marks."""
    from petractl.engine.schedule import Kind, operations

    lookahead, k, timed = (6, 4, 2, 0), 2, 6
    segment = plan_segment(ahead=6, accumulation=k, microbatches=timed, warmup=1)
    lists = operations(lookahead=lookahead, num_microbatches=segment.total, accumulation=k)
    for own in lists[:-1]:
        done = list(itertools.accumulate((o.kind is Kind.FORWARD for o in own), initial=0))
        backwards = [n for n, o in enumerate(own) if o.kind is Kind.BACKWARD]
        first, last = segment.warmup - 1, segment.warmup + timed - 1
        assert done[backwards[last]] - done[backwards[first]] == timed
