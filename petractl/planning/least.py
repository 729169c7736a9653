"""The least lookahead that costs no throughput, and the throughput of any lookahead, in closed form.

A microbatch that goes from stage j up to stage l and back takes S(j, l): the forwards and backwards of the
stages j ... l, and the ways of all messages between them, up and down. Meanwhile stage j may have
W_j - W_l + 1 microbatches between itself and stage l, and no more: so a microbatch cannot take less than

    period = max over j <= l of S(j, l) / (W_j - W_l + 1),    for l = j the time T_j of the stage itself,

and, as all cycles of the dependencies are made of these round trips, it takes no more. Full throughput, one
microbatch per max T, thus needs W_j >= W_l + S(j, l) / max T - 1 for every l > j. From the last stage (W = 0)
to the first these bounds give the smallest W of all that are valid, each stage's at once.

An update is counted in full with every round trip: exact for k = 1, and for k > 1 as good as exact while an
update is short beside a microbatch (with an update of a tenth of it, within 1 % of full throughput).
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from petractl.planning.times import Link, StageTimes, limit_per_s, links_between

_ROUNDING = 1e-9  # a round trip that takes a whole number of periods must not ask for one more


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
    trips = _RoundTrips(times, links)
    lookahead = np.zeros(len(times), dtype=np.int64)
    for j in range(len(times) - 2, -1, -1):
        periods = trips.beyond(j) * (1.0 + margin) / period
        needed = lookahead[j + 1 :] + np.ceil(periods * (1.0 - _ROUNDING)).astype(np.int64) - 1
        lookahead[j] = max(int(needed.max()), int(lookahead[j + 1]))
    return tuple(int(w) for w in lookahead)


def period_s(
    lookahead: Sequence[int],
    times: Sequence[StageTimes],
    *,
    link: Link | Sequence[Link] = Link(),  # noqa: B008 (a frozen value)
    accumulation: int = 1,
) -> float:
    """Return the seconds per microbatch in the steady state of a lookahead."""
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

    def __init__(self, times: Sequence[StageTimes], links: Sequence[Link]) -> None:
        ways = [
            2.0 * link.latency_s
            + link.occupied_s(times[i].message_up_bytes)
            + link.occupied_s(times[i + 1].message_down_bytes)
            for i, link in enumerate(links)
        ]
        self._busy = np.cumsum([0.0, *(time.busy_s for time in times)])
        self._ways = np.cumsum([0.0, *ways])
        self._update_s = [time.update_s for time in times]

    def beyond(self, j: int) -> npt.NDArray[np.float64]:
        """Return S(j, l) for l = j + 1 ... J-1."""
        busy = self._busy[j + 2 :] - self._busy[j]
        ways = self._ways[j + 1 :] - self._ways[j]
        found: npt.NDArray[np.float64] = busy + ways + self._update_s[j]
        return found


def mean_staleness(lookahead: Sequence[int], *, accumulation: int = 1) -> float:
    """Return the updates between forward and backward of a microbatch, in the mean over the stages."""
    return math.fsum(lookahead) / accumulation / len(lookahead)
