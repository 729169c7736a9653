"""The fast half of the simulator: a round of all stages is a handful of vector operations.

A stage with lookahead W runs, in its round r, the forward of microbatch r + W (if there is one), then the
backward of r, then what follows it. Rounds r = -W_0 ... -1 fill the pipe with forwards alone. Within a round:

    forwards     stage j waits for the message that stage j-1 sent W_{j-1} - W_j rounds ago; where W does not
                 fall it was sent in this very round, and a scan along such a run of stages finds the ends
    backwards    the gradient comes down in one round from the last stage to the first: a scan too

The scans are longest paths. The end of an operation is x_j = max(base_j, x_{j-1} + gain_j), `base` what the
stage itself is ready for, `gain` the message's way and the operation; with C the running sum of the gains
that is C plus the running maximum of base - C. So 4,096 stages cost about 100 us per microbatch, without a
heap of events.

`execution` does the same one operation at a time, for any lists; a test holds the two against each other.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from petractl.planning.times import Link, StageTimes

Vector = npt.NDArray[np.float64]


class Rounds:
    """Stages and links that run one flush after another; the clocks go on from flush to flush.

    `weight_share` is the part of a backward that is put off (zero-bubble): stage j's weight gradients come j
    rounds late.
    """

    def __init__(
        self,
        times: Sequence[StageTimes],
        links: Sequence[Link],
        *,
        jitter: float = 0.0,
        seed: int = 0,
        weight_share: float = 0.0,
    ) -> None:
        self.num_stages = len(times)
        backward = np.array([time.backward_s for time in times])
        self._forward_s = np.array([time.forward_s for time in times])
        self._backward_s = backward * (1.0 - weight_share)
        self._weight_s = backward * weight_share
        self._splits = weight_share > 0.0
        self._update_s = np.array([time.update_s for time in times])
        self._latency = np.array([link.latency_s for link in links])
        pairs = list(enumerate(links))
        self._up = np.array([link.occupied_s(times[j].message_up_bytes) for j, link in pairs]) + self._latency
        down = np.array([link.occupied_s(times[j + 1].message_down_bytes) for j, link in pairs])
        self._down = down + self._latency
        self._jitter = jitter
        self._random = np.random.default_rng(seed)
        self._up_free = np.zeros(len(links))
        self._down_free = np.zeros(len(links))
        self.free_s = np.zeros(self.num_stages)
        """When each stage has done all that it was given."""
        self.backward_end_s = np.zeros(self.num_stages)
        """When each stage ended its last backward."""
        self.busy_s = np.zeros(self.num_stages)
        self.wait_forward_s = np.zeros(self.num_stages)
        self.wait_backward_s = np.zeros(self.num_stages)

    def run(
        self,
        lookahead: Sequence[int],
        *,
        accumulation: int,
        num_microbatches: int | None = None,
        first: int = 0,
        stop: int | None = None,
        updates: bool = True,
    ) -> None:
        """Run the rounds `first` to `stop` - 1 of a flush; from 0 on, the filling comes before.

        `num_microbatches` None is a flush without an end, and `stop` says where to leave it. A later call
        goes on where the last one stopped. Updates are made after every `accumulation`-th backward and after
        the last, or not at all.
        """
        total = num_microbatches
        ahead = np.array(lookahead, dtype=np.int64)
        if total is not None:
            ahead = np.minimum(ahead, total)
        stop = total if stop is None else stop
        assert stop is not None, "a flush without an end needs a stop"
        if first == 0:
            self._inbox = _Inbox(ahead)
            for r in range(-int(ahead[0]), 0):
                # W does not increase: the stages that have a forward are the first ones.
                self._forwards(r, ahead, 0, int(np.searchsorted(-ahead, r, side="right")))
        for r in range(first, stop):
            beginning = 0 if total is None else int(np.searchsorted(-ahead, r - total, side="right"))
            self._forwards(r, ahead, beginning, self.num_stages)
            self._backwards()
            if self._splits:
                self._spend(self._weight_s, slice(0, r + 1))
            if r + 1 == total and self._splits:
                late = np.minimum(np.arange(self.num_stages), total)
                self._spend(self._weight_s * late, slice(None))
            if updates and ((r + 1) % accumulation == 0 or r + 1 == total):
                self._spend(self._update_s, slice(None))

    def _forwards(self, r: int, ahead: npt.NDArray[np.int64], low: int, high: int) -> None:
        if low >= high:
            return
        inbox, part, links = self._inbox, slice(low, high), slice(low, high - 1)
        seconds = self._drawn(self._forward_s[part])
        free = self.free_s[part]
        arrival = inbox.take(r + ahead[part], low, high)
        if inbox.longest_run > 1:
            sent_now = ~inbox.is_head[low + 1 : high]
            way = self._up[links]
            arrival[1:] = np.where(sent_now, self._up_free[links] + way, arrival[1:])
            ends = inbox.scan(np.maximum(free, arrival) + seconds, seconds, way, low, high)
            now = np.maximum(ends[:-1], self._up_free[links]) + way
            arrival[1:] = np.where(sent_now, now, arrival[1:])
        starts = np.maximum(free, arrival)
        ends = starts + seconds
        self.wait_forward_s[part] += starts - free
        self.busy_s[part] += seconds
        self.free_s[part] = ends
        out = slice(low, min(high, self.num_stages - 1))
        sent = np.maximum(ends[: out.stop - low], self._up_free[out]) + self._up[out]
        self._up_free[out] = sent - self._latency[out]
        inbox.put(sent, r + ahead[out], out)

    def _backwards(self) -> None:
        seconds = self._drawn(self._backward_s)
        base = self.free_s + seconds
        base[:-1] = np.maximum(base[:-1], self._down_free + self._down + seconds[:-1])
        gains = np.zeros(self.num_stages)
        np.cumsum(self._down + seconds[:-1], out=gains[1:])
        ends = np.maximum.accumulate((base + gains)[::-1])[::-1] - gains
        arrival = np.maximum(ends[1:], self._down_free) + self._down
        starts = self.free_s.copy()
        starts[:-1] = np.maximum(starts[:-1], arrival)
        self.wait_backward_s += starts - self.free_s
        self.busy_s += seconds
        self._down_free = arrival - self._latency
        self.free_s = starts + seconds
        self.backward_end_s = self.free_s.copy()

    def _spend(self, seconds: Vector, part: slice) -> None:
        spent = self._drawn(seconds[part])
        self.free_s[part] += spent
        self.busy_s[part] += spent

    def _drawn(self, seconds: Vector) -> Vector:
        if not self._jitter:
            return seconds
        return seconds * jitter_factors(self._random, self._jitter, len(seconds))


def jitter_factors(random: np.random.Generator, jitter: float, count: int) -> Vector:
    """Return factors with mean 1 and relative standard deviation `jitter`, none negative (log-normal)."""
    variance = np.log1p(jitter * jitter)
    factors: Vector = np.exp(random.standard_normal(count) * np.sqrt(variance) - variance / 2)
    return factors


class _Inbox:
    """Activations on their way: for stage j as many as W_{j-1} - W_j + 1, in one array of rings."""

    def __init__(self, ahead: npt.NDArray[np.int64]) -> None:
        drop = ahead[:-1] - ahead[1:]
        self.is_head = np.concatenate([[True], drop > 0])
        """Whether a stage's messages were sent in an earlier round."""
        self._sizes = np.concatenate([[1], drop + 1])
        self._offsets = np.concatenate([[0], np.cumsum(self._sizes[:-1])])
        # Stage 0 finds its data there at any time.
        self._arrivals = np.zeros(int(self._sizes.sum()))
        self._run = np.cumsum(self.is_head)
        self.longest_run = int(np.bincount(self._run).max())

    def take(self, microbatches: npt.NDArray[np.int64], low: int, high: int) -> Vector:
        """Return when the messages for stages `low` ... `high` - 1 arrive, those sent in this round apart."""
        found: Vector = self._arrivals[self._offsets[low:high] + microbatches % self._sizes[low:high]]
        return found

    def put(self, arrivals: Vector, microbatches: npt.NDArray[np.int64], senders: slice) -> None:
        """Note when the messages of some stages arrive behind them."""
        to = slice(senders.start + 1, senders.stop + 1)
        self._arrivals[self._offsets[to] + microbatches % self._sizes[to]] = arrivals

    def scan(self, base: Vector, seconds: Vector, way: Vector, low: int, high: int) -> Vector:
        """Return x_j = max(base_j, x_{j-1} + way_j + seconds_j) along each run of equal lookahead."""
        gains = np.zeros(high - low)
        np.cumsum(way + seconds[1:], out=gains[1:])
        best, run = base - gains, self._run[low:high]
        step = 1
        while step < self.longest_run:
            # Doubling: a running maximum that stops where a run begins.
            shifted = np.where(run[step:] == run[:-step], best[:-step], -np.inf)
            best = np.concatenate([best[:step], np.maximum(best[step:], shifted)])
            step *= 2
        ends: Vector = best + gains
        return ends
