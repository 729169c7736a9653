"""The exact half of the simulator: any lists of operations, executed one by one.

A process executes its list in order and blocks only on the message that the operation needs; sends never
block; a link carries one message after another. Stage s lives at place s mod P, and messages go between
stages s and s + 1, on the way from one place to the next.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from petractl.planning.exact_schedules import Step
from petractl.planning.rounds import jitter_factors
from petractl.planning.times import Link, Span, StageTimes

_INSTANT_S = 1e-12


@dataclass(slots=True)
class _Place:
    """One process: its list, where it stands in it, and its clock."""

    steps: Sequence[Step]
    next: int = 0
    free_s: float = 0.0


def execute(
    lists: Sequence[Sequence[Step]],
    *,
    times: Sequence[StageTimes],
    links: Sequence[Link],
    weight_share: float = 0.0,
    jitter: float = 0.0,
    seed: int = 0,
    on_span: Callable[[Span], None],
) -> None:
    """Execute the lists of P places; `times` are of the stages, of which each place may have several.

    `links[p]` joins places p and p + 1; from the last place back to the first (interleaved), it is the
    slowest of them. `on_span` gets every operation, each place's in order.

    Raises:
        ValueError: the lists wait for each other for ever.
    """
    _Execution(lists, times, links, weight_share, jitter, seed, on_span).run()


class _Execution:
    def __init__(
        self,
        lists: Sequence[Sequence[Step]],
        times: Sequence[StageTimes],
        links: Sequence[Link],
        weight_share: float,
        jitter: float,
        seed: int,
        on_span: Callable[[Span], None],
    ) -> None:
        self._places = [_Place(steps) for steps in lists]
        self._times = times
        self._last = len(times) - 1
        count = len(lists)
        self._several = len(times) > count
        back = Link(
            latency_s=max((link.latency_s for link in links), default=0.0),
            bytes_per_s=min((link.bytes_per_s for link in links), default=inf),
        )
        self._links = [links[s % count] if s % count + 1 < count else back for s in range(self._last)]
        self._durations = [_durations(time, weight_share) for time in times]
        self._jitter = jitter
        self._random = np.random.default_rng(seed)
        self._on_span = on_span
        # Keyed by (stage, microbatch): when the activation or the gradient for it arrives.
        self._arrivals: dict[str, dict[tuple[int, int], float]] = {"F": {}, "B": {}}
        self._link_free: defaultdict[tuple[str, int], float] = defaultdict(float)

    def run(self) -> None:
        """Execute all lists to their ends."""
        waiting = deque(range(len(self._places)))
        while waiting:
            place = waiting.popleft()
            for woken in self._advance(place):
                waiting.append(woken)
        stuck = [place for place, p in enumerate(self._places) if p.next < len(p.steps)]
        if stuck:
            step = self._places[stuck[0]].steps[self._places[stuck[0]].next]
            raise ValueError(f"place {stuck[0]} waits for ever before {step.kind} {step.microbatch}")

    def _advance(self, index: int) -> list[int]:
        """Execute what place `index` can; return the places that got a message."""
        place, woken = self._places[index], []
        while place.next < len(place.steps):
            step = place.steps[place.next]
            arrival = self._arrival(step)
            if arrival is None:
                break
            waited = arrival > place.free_s + _INSTANT_S
            start = max(place.free_s, arrival)
            end = start + self._seconds(step)
            source = {"F": "forward", "FB": "forward", "B": "backward"}.get(step.kind, "") if waited else ""
            self._on_span(
                Span(
                    step.stage,
                    0,
                    step.kind,
                    step.microbatch,
                    start,
                    end,
                    source,
                    index if self._several else None,
                )
            )
            place.free_s = end
            place.next += 1
            to = self._send(step, end)
            if to is not None and to != index:
                woken.append(to)
        return woken

    def _arrival(self, step: Step) -> float | None:
        """Return when what the step needs is there, None if it has not been sent."""
        if step.kind in ("F", "FB") and step.stage > 0:
            return self._arrivals["F"].pop((step.stage, step.microbatch), None)
        if step.kind == "B" and step.stage < self._last:
            return self._arrivals["B"].pop((step.stage, step.microbatch), None)
        return 0.0

    def _send(self, step: Step, end: float) -> int | None:
        """Send what the step made; return the place that gets it."""
        if step.kind == "F" and step.stage < self._last:
            to, kind, link = step.stage + 1, "F", self._links[step.stage]
            size = self._times[step.stage].message_up_bytes
        elif step.kind in ("B", "FB") and step.stage > 0:
            to, kind, link = step.stage - 1, "B", self._links[step.stage - 1]
            size = self._times[step.stage].message_down_bytes
        else:
            return None
        count = len(self._places)
        arrival = end
        if count > 1:
            way = (kind, step.stage % count)
            left = max(end, self._link_free[way]) + link.occupied_s(size)
            self._link_free[way] = left
            arrival = left + link.latency_s
        self._arrivals[kind][to, step.microbatch] = arrival
        return to % count

    def _seconds(self, step: Step) -> float:
        seconds = self._durations[step.stage][step.kind]
        if self._jitter:
            seconds *= float(jitter_factors(self._random, self._jitter, 1)[0])
        return seconds


def _durations(time: StageTimes, weight_share: float) -> dict[str, float]:
    return {
        "F": time.forward_s,
        "B": time.backward_s * (1.0 - weight_share),
        "W": time.backward_s * weight_share,
        "FB": time.busy_s,
        "U": time.update_s,
    }
