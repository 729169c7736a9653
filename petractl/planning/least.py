"""The least lookahead that costs no throughput, and the throughput of any lookahead, in closed form.

A microbatch that goes from stage j up to stage l and back takes S(j, l): the forwards and backwards of the
stages j ... l, and the ways of all messages between them, up and down. Meanwhile stage j may have
W_j - W_l + 1 microbatches between itself and stage l, and no more: so a microbatch cannot take less than

    period = max over j <= l of S(j, l) / (W_j - W_l + 1),    for l = j the time T_j of the stage itself,

and, as all cycles of the dependencies are made of these round trips, it takes no more. Full throughput, one
microbatch per max T, thus needs W_j >= W_l + S(j, l) / max T - 1 for every l > j. From the last stage (W = 0)
to the first these bounds give the smallest W of all that are valid, each stage's at once.

Every round trip of stage j meets an update of it for k = 1; for k > 1 some do and some do not, and no formula
this short says which matter. So W is computed with a part of the update in every round trip, from a k-th up
to all of it (and, for updates longer than a microbatch, more), and the first W is taken with which the
stages, run round by round, have full throughput.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from petractl.planning.rounds import Rounds
from petractl.planning.times import Link, StageTimes, limit_per_s, links_between

_ROUNDING = 1e-9  # a round trip that takes a whole number of periods must not ask for one more
_PARTS = (0.25, 0.5, 0.75)
"""Of an update, tried in this order between a k-th and all of it."""
_LONGER = (0.1, 0.2, 0.4, 0.8, 1.6)
_SLOWER, _ROUNDS, _MOST_TRIED = 1e-3, 200, 4096


def least_lookahead(
    times: Sequence[StageTimes],
    *,
    link: Link | Sequence[Link] = Link(),  # noqa: B008 (a frozen value)
    accumulation: int = 1,
    margin: float = 0.0,
) -> tuple[int, ...]:
    """Return the smallest W with full throughput for these times.

    `margin` makes round trips that much longer than they are (0.1: ten percent), for times that vary.

    Raises:
        ValueError: a stage whose time is not positive.
    """
    links = links_between(link, num_stages=len(times))
    if any(time.busy_s <= 0.0 for time in times):
        raise ValueError("every stage needs a positive time")
    period = bound_s(times, links, accumulation=accumulation)
    whole = _smallest(times, links, period, margin=margin)
    if accumulation == 1 or whole[0] > _MOST_TRIED or not any(time.update_s for time in times):
        return whole
    found = whole
    for part, more in _tries(accumulation):
        found = _smallest(times, links, period, margin=(1.0 + margin) * (1.0 + more) - 1.0, update_part=part)
        if _measured_s(found, times, links, accumulation=accumulation) <= period * (1.0 + _SLOWER):
            break
    return found


def _tries(accumulation: int) -> list[tuple[float, float]]:
    """Return (part of an update in each round trip, what makes round trips longer), the least first."""
    parts = [1.0 / accumulation, *(part for part in _PARTS if part > 1.0 / accumulation), 1.0]
    return [*((part, 0.0) for part in parts), *((1.0, more) for more in _LONGER)]


def _smallest(
    times: Sequence[StageTimes],
    links: Sequence[Link],
    period: float,
    *,
    margin: float,
    update_part: float = 1.0,
) -> tuple[int, ...]:
    """Return the smallest W whose round trips, with that part of an update each, fit into `period`."""
    trips = _RoundTrips(times, links, update_part=update_part)
    lookahead = np.zeros(len(times), dtype=np.int64)
    for j in range(len(times) - 2, -1, -1):
        periods = trips.beyond(j) * (1.0 + margin) / period
        needed = lookahead[j + 1 :] + np.ceil(periods * (1.0 - _ROUNDING)).astype(np.int64) - 1
        lookahead[j] = max(int(needed.max()), int(lookahead[j + 1]))
    return tuple(int(w) for w in lookahead)


def _measured_s(
    lookahead: Sequence[int], times: Sequence[StageTimes], links: Sequence[Link], *, accumulation: int
) -> float:
    """Return the seconds per microbatch when the stages are run round by round, the filled pipe's."""
    lap = accumulation * -(-(lookahead[0] + 1) // accumulation)
    settle, measured = 4 * lap, lap * max(1, -(-_ROUNDS // lap))
    rounds = Rounds(times, links)
    rounds.run(lookahead, accumulation=accumulation, stop=settle)
    began = rounds.backward_end_s
    rounds.run(lookahead, accumulation=accumulation, first=settle, stop=settle + measured)
    return float(np.max(rounds.backward_end_s - began)) / measured


def period_s(
    lookahead: Sequence[int],
    times: Sequence[StageTimes],
    *,
    link: Link | Sequence[Link] = Link(),  # noqa: B008 (a frozen value)
    accumulation: int = 1,
) -> float:
    """Return the seconds per microbatch in the steady state of a lookahead; for k > 1, at most so many."""
    links = links_between(link, num_stages=len(times))
    ahead: npt.NDArray[np.int64] = np.array(lookahead, dtype=np.int64)
    trips = _RoundTrips(times, links)
    slowest = bound_s(times, links, accumulation=accumulation)
    for j in range(len(times) - 1):
        periods = trips.beyond(j) / (ahead[j] - ahead[j + 1 :] + 1)
        slowest = max(slowest, float(periods.max()))
    return slowest


def bound_s(times: Sequence[StageTimes], links: Sequence[Link], *, accumulation: int = 1) -> float:
    """Return the seconds per microbatch of the slowest stage or link: no schedule does better."""
    pairs = enumerate(links)
    occupied = [
        link.occupied_s(max(times[j].message_up_bytes, times[j + 1].message_down_bytes)) for j, link in pairs
    ]
    return max([1.0 / limit_per_s(times, accumulation=accumulation), *occupied])


class _RoundTrips:
    """S(j, l): from stage j up to stage l and back."""

    def __init__(
        self, times: Sequence[StageTimes], links: Sequence[Link], *, update_part: float = 1.0
    ) -> None:
        ways = [
            2.0 * link.latency_s
            + link.occupied_s(times[i].message_up_bytes)
            + link.occupied_s(times[i + 1].message_down_bytes)
            for i, link in enumerate(links)
        ]
        self._busy = np.cumsum([0.0, *(time.busy_s for time in times)])
        self._ways = np.cumsum([0.0, *ways])
        self._update_s = [update_part * time.update_s for time in times]

    def beyond(self, j: int) -> npt.NDArray[np.float64]:
        """Return S(j, l) for l = j + 1 ... J-1."""
        busy = self._busy[j + 2 :] - self._busy[j]
        ways = self._ways[j + 1 :] - self._ways[j]
        found: npt.NDArray[np.float64] = busy + ways + self._update_s[j]
        return found


def mean_staleness(lookahead: Sequence[int], *, accumulation: int = 1) -> float:
    """Return the updates between forward and backward of a microbatch, in the mean over the stages."""
    return math.fsum(lookahead) / accumulation / len(lookahead)
