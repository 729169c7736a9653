"""`least`: full throughput, and nothing less keeps it; the simulator is the judge, case by case."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petractl.planning.least import bound_s, least_lookahead, mean_staleness, period_s
from petractl.planning.simulation import simulate
from petractl.planning.times import Link, StageTimes


@st.composite
def unbalanced(draw: st.DrawFn) -> tuple[list[StageTimes], list[Link]]:
    num_stages = draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    latency = float(rng.choice([0.0, 0.1, 1.0]))
    # Whole numbers make ties: round trips of exactly so many periods.
    whole = bool(rng.integers(2))
    slots = rng.integers(1, 5, num_stages).astype(float) if whole else rng.uniform(0.3, 3.0, num_stages)
    times = [
        StageTimes(
            float(t) / 4,
            3 * float(t) / 4,
            message_up_bytes=int(rng.integers(0, 3)),
            message_down_bytes=int(rng.integers(0, 3)),
        )
        for t in slots
    ]
    links = [Link(latency * float(rng.uniform()), float(rng.uniform(2, 20))) for _ in range(num_stages - 1)]
    return times, links


@settings(max_examples=100, deadline=None)
@given(unbalanced())
def test_least_keeps_full_throughput(case: tuple[list[StageTimes], list[Link]]) -> None:
    times, links = case
    result = simulate("least", times, link=links)
    assert result.microbatches_per_s >= 0.99 / bound_s(times, links)
    assert result.lookahead is not None
    assert result.lookahead[-1] == 0
    assert list(result.lookahead) == sorted(result.lookahead, reverse=True)


@settings(max_examples=60, deadline=None)
@given(unbalanced())
def test_no_smaller_lookahead_at_any_stage_keeps_it(case: tuple[list[StageTimes], list[Link]]) -> None:
    times, links = case
    least = least_lookahead(times, link=links)
    bound = bound_s(times, links)
    for j in range(len(times) - 1):
        smaller = [*least[:j], least[j] - 1, *least[j + 1 :]]
        if smaller[j] < smaller[j + 1]:
            continue  # not a schedule any more
        period = period_s(smaller, times, link=links)
        assert period > bound * (1 + 1e-12)
        rate = simulate(smaller, times, link=links).microbatches_per_s
        assert rate == pytest.approx(1 / period, rel=2e-3)
        if period > 1.01 * bound:
            assert rate < 0.995 / bound


@settings(max_examples=60, deadline=None)
@given(unbalanced(), st.integers(0, 2**32 - 1))
def test_the_closed_form_is_the_simulators_rate(case: tuple[list[StageTimes], list[Link]], seed: int) -> None:
    times, links = case
    ahead = np.random.default_rng(seed).integers(0, 2 * len(times), len(times) - 1)
    lookahead = [*sorted((int(w) for w in ahead), reverse=True), 0]
    rate = simulate(lookahead, times, link=links).microbatches_per_s
    assert rate == pytest.approx(1 / period_s(lookahead, times, link=links), rel=5e-3)


@settings(max_examples=40, deadline=None)
@given(unbalanced(), st.integers(1, 6), st.floats(0.0, 0.1))
def test_updates_do_not_break_it(case: tuple[list[StageTimes], list[Link]], k: int, part: float) -> None:
    times = [StageTimes(t.forward_s, t.backward_s, part * t.busy_s) for t in case[0]]
    rate = simulate("least", times, link=case[1], accumulation=k).microbatches_per_s
    assert rate >= 0.99 / bound_s(times, case[1], accumulation=k)


@pytest.mark.parametrize("num_stages", [1, 2, 7, 40])
def test_equal_stages_need_tight(num_stages: int) -> None:
    times = [StageTimes(0.1, 0.3)] * num_stages
    assert least_lookahead(times) == tuple(range(num_stages - 1, -1, -1))
    # Half a step of latency each way: one more per boundary.
    assert least_lookahead(times, link=Link(0.2)) == tuple(2 * w for w in range(num_stages - 1, -1, -1))


def test_short_stages_need_less() -> None:
    times = [StageTimes(t / 4, 3 * t / 4) for t in (1.0, 1.0, 4.0, 1.0, 1.0)]
    least = least_lookahead(times)
    # By hand, in periods of 4: 1 + 1 fit in one, 4 + 1 needs two, so does 1 + 4 (to stage 2, which has 1).
    assert least == (2, 2, 1, 0, 0)
    assert mean_staleness(least) == 1.0 < mean_staleness((4, 3, 2, 1, 0))
    assert simulate(least, times).share_of_limit == pytest.approx(1.0)


def test_a_margin_adds_lookahead() -> None:
    times = [StageTimes(0.1, 0.3)] * 4
    assert least_lookahead(times) == (3, 2, 1, 0)
    assert least_lookahead(times, margin=0.1) == (6, 4, 2, 0)


def test_a_stage_without_time_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        least_lookahead([StageTimes(0.0, 0.0), StageTimes(1.0, 1.0)])


@settings(max_examples=60, deadline=None)
@given(unbalanced(), st.integers(2, 9), st.floats(0.05, 2.0))
def test_updates_of_several_microbatches(
    case: tuple[list[StageTimes], list[Link]], k: int, update: float
) -> None:
    times = [replace(time, update_s=update * time.busy_s) for time in case[0]]
    links = case[1]
    found = simulate("least", times, link=links, accumulation=k)
    assert found.microbatches_per_s >= 0.99 / bound_s(times, links, accumulation=k)


def test_updates_in_between_cost_nothing_where_tight_is_enough() -> None:
    # Every stage takes the same: a k-th of an update per round trip, and no microbatch more than `tight`.
    times = [StageTimes(0.25, 0.75, 0.4)] * 6
    assert simulate("tight", times, accumulation=4).share_of_limit > 0.999
    assert least_lookahead(times, accumulation=4) == (5, 4, 3, 2, 1, 0)
