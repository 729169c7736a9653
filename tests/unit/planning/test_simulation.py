"""The simulator against closed forms, and its two halves against each other."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petractl.planning.simulation import simulate, timeline
from petractl.planning.times import Link, StageTimes, links_between

EQUAL = StageTimes(0.02, 0.06)
ASYNCHRONOUS = ("tight", "paper", "least")
EXACT = ("gpipe", "1f1b", "interleaved-1f1b", "zero-bubble")


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[list[StageTimes], list[Link], list[int], int]:
    """Unequal stages with messages and links, a valid W, and k."""
    num_stages = draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    times = [
        StageTimes(
            forward_s=float(rng.uniform(0.1, 1.0)),
            backward_s=float(rng.uniform(0.1, 3.0)),
            update_s=float(rng.choice([0.0, 0.3])),
            message_up_bytes=int(rng.integers(0, 3)),
            message_down_bytes=int(rng.integers(0, 3)),
        )
        for _ in range(num_stages)
    ]
    links = [Link(float(rng.choice([0.0, 0.4])), float(rng.uniform(1.0, 9.0))) for _ in range(num_stages - 1)]
    lookahead = sorted((int(w) for w in rng.integers(0, 2 * num_stages, num_stages - 1)), reverse=True)
    return times, links, [*lookahead, 0], draw(st.integers(1, 4))


@settings(max_examples=60, deadline=None)
@given(pipelines(), st.integers(1, 25))
def test_the_fast_and_the_exact_simulator_agree(
    pipeline: tuple[list[StageTimes], list[Link], list[int], int], count: int
) -> None:
    times, links, lookahead, k = pipeline
    for schedule in (lookahead, "sequential", *ASYNCHRONOUS):
        result = simulate(schedule, times, link=links, accumulation=k, num_microbatches=count)
        spans = timeline(schedule, times, link=links, accumulation=k, num_microbatches=count)
        assert result.seconds == pytest.approx(max(span.end_s for span in spans))
        for j, stage in enumerate(result.stages):
            own = [span for span in spans if span.stage == j]
            busy = sum(span.end_s - span.start_s for span in own)
            assert stage.idle_percent == pytest.approx(100 * (1 - busy / result.seconds), abs=1e-6)
    for schedule in EXACT:
        result = simulate(schedule, times, link=links, accumulation=k, num_microbatches=3 * k)
        spans = timeline(schedule, times, link=links, accumulation=k, num_microbatches=3 * k)
        assert result.seconds == pytest.approx(max(span.end_s for span in spans))


@pytest.mark.parametrize("num_stages", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("k", [1, 4, 32])
def test_the_bubble_of_gpipe_and_1f1b(num_stages: int, k: int) -> None:
    bubble = (num_stages - 1) / (k + num_stages - 1)
    for schedule in ("gpipe", "1f1b"):
        result = simulate(schedule, [EQUAL] * num_stages, accumulation=k)
        assert result.idle_percent == pytest.approx(100 * bubble)
        assert result.microbatches_per_s == pytest.approx((1 - bubble) / EQUAL.busy_s)
        assert result.staleness_updates == 0


@pytest.mark.parametrize("num_stages", [2, 4, 8])
def test_interleaving_halves_the_bubble(num_stages: int) -> None:
    k = 4 * num_stages
    times = [EQUAL] * num_stages
    bubble = (num_stages - 1) / 2 * EQUAL.busy_s
    result = simulate("interleaved-1f1b", times, accumulation=k)
    assert k / result.microbatches_per_s == pytest.approx(k * EQUAL.busy_s + bubble)


@pytest.mark.parametrize("num_stages", [2, 4, 8])
def test_the_bubble_of_zero_bubble(num_stages: int) -> None:
    """With equal forward, input and weight gradients, (J-1) (F + B - W): a third of 1F1B's."""
    unit = StageTimes(1.0, 2.0)
    k = 4 * num_stages
    result = simulate("zero-bubble", [unit] * num_stages, accumulation=k)
    assert k / result.microbatches_per_s == pytest.approx(3 * k + (num_stages - 1))


@pytest.mark.parametrize("schedule", ASYNCHRONOUS)
@pytest.mark.parametrize("times_s", [[4.0, 4.0, 4.0], [4.0, 1.0, 2.0, 4.0], [1.0, 2.0, 5.0, 1.0, 3.0], [7.0]])
def test_without_a_flush_the_slowest_stage_sets_the_rate(schedule: str, times_s: list[float]) -> None:
    times = [StageTimes(t / 4, 3 * t / 4) for t in times_s]
    result = simulate(schedule, times)
    assert result.microbatches_per_s == pytest.approx(1 / max(times_s))
    assert result.share_of_limit == pytest.approx(1.0)
    for stage, t in zip(result.stages, times_s, strict=True):
        assert stage.idle_percent == pytest.approx(100 * (1 - t / max(times_s)), abs=1e-9)


def test_plain_model_parallelism_is_the_sum() -> None:
    times = [StageTimes(1.0, 2.0), StageTimes(2.0, 3.0), StageTimes(0.5, 0.5)]
    assert simulate("sequential", times).microbatches_per_s == pytest.approx(1 / 9)
    link = Link(latency_s=0.25)
    assert simulate("sequential", times, link=link).microbatches_per_s == pytest.approx(1 / (9 + 4 * 0.25))


@pytest.mark.parametrize("num_stages", [2, 5, 16])
def test_latency_costs_tight_two_ways_per_boundary_of_a_turn(num_stages: int) -> None:
    """A turn of J microbatches takes J T + 2 (J-1) l: at most 2 l per microbatch (contract 1)."""
    latency = 0.01
    times, link = [EQUAL] * num_stages, Link(latency_s=latency)
    period = EQUAL.busy_s + 2 * latency * (num_stages - 1) / num_stages
    assert simulate("tight", times, link=link).microbatches_per_s == pytest.approx(1 / period)
    # One more microbatch per boundary hides half a step.
    hidden = Link(latency_s=EQUAL.busy_s / 2)
    assert simulate("tight", times, link=hidden, slack=10**6).share_of_limit == pytest.approx(1.0)
    assert simulate("paper", times, link=hidden).share_of_limit == pytest.approx(1.0)


def test_a_narrow_link_sets_the_rate() -> None:
    times = [StageTimes(0.02, 0.06, message_up_bytes=1000, message_down_bytes=500)] * 4
    link = Link(bytes_per_s=10_000.0)
    ahead = [30, 20, 10, 0]
    assert simulate(ahead, times, link=link).microbatches_per_s == pytest.approx(10.0, rel=1e-3)
    # A round trip of 4 x 80 ms and 3 x (100 + 50) ms, with 7 microbatches in it.
    assert simulate("paper", times, link=link).microbatches_per_s == pytest.approx(7 / 0.77, rel=1e-3)


def test_updates_count() -> None:
    times = [StageTimes(1.0, 2.0, update_s=0.5)] * 3
    assert simulate("tight", times).microbatches_per_s == pytest.approx(1 / 3.5)
    assert simulate("tight", times, accumulation=2).microbatches_per_s == pytest.approx(1 / 3.25)


@pytest.mark.parametrize(("schedule", "lookahead"), [("tight", (3, 2, 1, 0)), ("paper", (6, 4, 2, 0))])
def test_staleness_and_what_is_kept(schedule: str, lookahead: tuple[int, ...]) -> None:
    result = simulate(schedule, [EQUAL] * 4, accumulation=2)
    assert result.lookahead == lookahead
    assert [stage.staleness_updates for stage in result.stages] == [w / 2 for w in lookahead]
    assert [stage.kept for stage in result.stages] == [*(w + 1 for w in lookahead[:-1]), 0]


@settings(max_examples=40, deadline=None)
@given(pipelines(), st.integers(1, 30))
def test_an_epochs_staleness_and_fifos_are_those_of_its_lists(
    pipeline: tuple[list[StageTimes], list[Link], list[int], int], count: int
) -> None:
    times, links, lookahead, k = pipeline
    result = simulate(lookahead, times, link=links, accumulation=k, num_microbatches=count)
    spans = timeline(lookahead, times, link=links, accumulation=k, num_microbatches=count)
    for j, stage in enumerate(result.stages):
        updates, kept, most, seen, delays = 0, 0, 0, {}, []
        for span in (span for span in spans if span.stage == j):
            if span.kind in ("F", "FB"):
                seen[span.microbatch] = updates
                kept += span.kind == "F"
                most = max(most, kept)
            if span.kind in ("B", "FB"):
                delays.append(updates - seen[span.microbatch])
                kept -= span.kind == "B"
            updates += span.kind == "U"
        assert stage.staleness_updates == pytest.approx(sum(delays) / count)
        assert stage.kept == most
        assert kept == 0


@pytest.mark.parametrize("schedule", EXACT)
@pytest.mark.parametrize("k", [4, 8, 12])
def test_what_an_exact_pipeline_keeps(schedule: str, k: int) -> None:
    result = simulate(schedule, [EQUAL] * 4, accumulation=k)
    spans = timeline(schedule, [EQUAL] * 4, accumulation=k, num_microbatches=k)
    share = 0.5 if schedule == "interleaved-1f1b" else 1.0
    done = "W" if schedule == "zero-bubble" else "B"
    for place, stage in enumerate(result.stages):
        kept, most = 0.0, 0.0
        for span in (span for span in spans if span.row == place):
            kept += share * ((span.kind == "F") - (span.kind == done))
            most = max(most, kept)
        assert stage.kept == most


@pytest.mark.parametrize("schedule", [*ASYNCHRONOUS, "sequential", *EXACT])
def test_a_timeline_is_possible(schedule: str) -> None:
    times = [
        StageTimes(0.02, 0.06, 0.01, message_up_bytes=5, message_down_bytes=9),
        StageTimes(0.03, 0.05),
        StageTimes(0.01, 0.04),
    ]
    spans = timeline(schedule, times, link=Link(0.004, 1000.0), accumulation=3, num_microbatches=9)
    for row in {span.row for span in spans}:
        own = [span for span in spans if span.row == row]
        assert all(a.end_s <= b.start_s + 1e-12 for a, b in itertools.pairwise(own))
        for a, b in itertools.pairwise(own):
            assert (b.start_s > a.end_s + 1e-9) == bool(b.waited_for)
    last = max(span.stage for span in spans)
    end = {(span.kind[0], span.stage, span.microbatch): span.end_s for span in spans if span.kind != "FB"}
    for span in spans:
        if span.kind in ("F", "FB") and span.stage > 0:
            assert span.start_s >= end["F", span.stage - 1, span.microbatch] + 0.004 - 1e-12
        if span.kind == "B" and span.stage < last - 1:
            assert span.start_s >= end["B", span.stage + 1, span.microbatch] + 0.004 - 1e-12
    kinds = [span.kind for span in spans]
    assert kinds.count("F") + kinds.count("FB") == kinds.count("B") + kinds.count("FB") == 9 * (last + 1)


@pytest.mark.parametrize("schedule", ["paper", "gpipe", "interleaved-1f1b", "sequential"])
def test_jitter_is_seeded_and_slows(schedule: str) -> None:
    times = [EQUAL] * 4
    still = simulate(schedule, times, accumulation=4).microbatches_per_s
    first, again, other = (
        simulate(schedule, times, accumulation=4, jitter=0.2, seed=seed).microbatches_per_s
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert 0.75 * still < first < 1.05 * still
    assert first == pytest.approx(other, rel=0.15)


def test_jitter_keeps_the_mean() -> None:
    single = simulate("tight", [EQUAL], jitter=0.3, seed=3)
    assert single.microbatches_per_s == pytest.approx(1 / EQUAL.busy_s, rel=0.01)


def test_an_unequal_device() -> None:
    times = [EQUAL, EQUAL.on_device(0.5), EQUAL]
    assert simulate("tight", times).microbatches_per_s == pytest.approx(1 / (2 * EQUAL.busy_s))


def test_thousands_of_stages() -> None:
    times = [EQUAL] * 2048
    assert simulate("tight", times).share_of_limit == pytest.approx(1.0)
    assert simulate("1f1b", times, accumulation=32).share_of_limit == pytest.approx(32 / (32 + 2047))
    assert simulate("sequential", times).share_of_limit == pytest.approx(1 / 2048)


@pytest.mark.parametrize(
    ("schedule", "changes", "what"),
    [
        ("tigth", {}, "unknown schedule"),
        ([1, 2, 0], {}, "must not increase"),
        ([1, 0], {}, "2 entries for 3 stages"),
        ("tight", {"slack": -1}, "slack = -1"),
        ("tight", {"jitter": -1.0}, "jitter"),
        ("tight", {"accumulation": 0}, "at least 1"),
        ("tight", {"num_microbatches": 0}, "at least 1"),
    ],
)
def test_what_is_wrong_is_said(schedule: str | list[int], changes: dict[str, int], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        simulate(schedule, [EQUAL] * 3, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("times", [[], [StageTimes(0.0, 0.0)], [StageTimes(-1.0, 2.0)]])
def test_impossible_times_are_refused(times: list[StageTimes]) -> None:
    with pytest.raises(ValueError, match=r"stage|negative"):
        simulate("tight", times)


def test_a_link_for_every_boundary() -> None:
    assert len(links_between(Link(), num_stages=4)) == 3
    with pytest.raises(ValueError, match="2 links for 4 stages"):
        links_between([Link(), Link()], num_stages=4)
