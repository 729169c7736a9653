"""Simulate exact pipelines: flush after flush, one update each.

The steady rate is that of whole flushes, from the end of the first to the end of the last.
"""

from collections.abc import Sequence

import numpy as np

from petractl.engine.exact_rules import flushes, stages_per_process
from petractl.planning.exact_schedules import WEIGHT_SHARE, Step, exact_lookahead, exact_steps
from petractl.planning.execution import execute
from petractl.planning.simulated import Case, Simulated, Vector, stage_results
from petractl.planning.times import Span

INTERLEAVED = "interleaved-1f1b"
_FLUSHES, _FLUSHES_WITH_JITTER = 2, 12


def simulate_exact(schedule: str, case: Case) -> Simulated:
    """Return how an exact pipeline fares."""
    return _interleaved(case) if schedule == INTERLEAVED else _flushed(schedule, case)


def _flushed(schedule: str, case: Case) -> Simulated:
    """Run flush after flush; one like the next once the second has begun."""
    splits = schedule == "zero-bubble"
    rounds = case.rounds(weight_share=WEIGHT_SHARE if splits else 0.0)
    ends, busy = [], []
    for size in _group_sizes(case):
        parts = flushes(schedule, num_places=len(case.times), count=size)
        for number, (name, count) in enumerate(parts, start=1):
            # The update follows the last part.
            ahead = exact_lookahead(name, num_places=len(case.times), count=count)
            rounds.run(ahead, accumulation=size, num_microbatches=count, updates=number == len(parts))
        ends.append(rounds.free_s.copy())
        busy.append(rounds.busy_s.copy())
    return _exact_result(schedule, case, ends, busy, rounds.wait_forward_s)


def _interleaved(case: Case) -> Simulated:
    places = len(case.times)
    sizes = _group_sizes(case)
    ends = [np.zeros(places) for _ in sizes]
    busy = [np.zeros(places) for _ in sizes]
    waits, free = np.zeros(places), np.zeros(places)
    group_of: list[int] = []
    for group, size in enumerate(sizes):
        group_of += [group] * size

    def note(span: Span) -> None:
        place, group = span.row, group_of[span.microbatch]
        if span.waited_for == "forward":
            waits[place] += span.start_s - free[place]
        free[place] = span.end_s
        ends[group][place] = span.end_s
        busy[group][place] += span.end_s - span.start_s

    full, rest = (sizes[:-1], sizes[-1:]) if sizes[-1] != sizes[0] else (sizes, [])
    lists = exact_steps(INTERLEAVED, num_places=places, accumulation=case.accumulation, num_groups=len(full))
    for size in rest:
        last = exact_steps(INTERLEAVED, num_places=places, accumulation=size, num_groups=1)
        first = sum(full)
        for place, steps in enumerate(last):
            lists[place] += [Step(step.kind, step.stage, first + step.microbatch) for step in steps]
    execute(
        lists,
        times=case.halves(),
        links=case.links,
        jitter=case.jitter,
        seed=case.seed,
        on_span=note,
    )
    return _exact_result(INTERLEAVED, case, ends, list(np.cumsum(busy, axis=0)), waits)


def _kept_by_exact(schedule: str, *, num_places: int, accumulation: int) -> list[float]:
    """Return the most microbatches that each place keeps between forward and (weight gradient's) backward."""
    most = np.zeros(num_places)
    for name, count in flushes(schedule, num_places=num_places, count=accumulation):
        ahead = np.array(exact_lookahead(name, num_places=num_places, count=count), dtype=np.float64)
        late = np.arange(num_places) if name == "zero-bubble" else 0
        stages = stages_per_process(name)
        most = np.maximum(most, np.minimum(ahead + 1 + late, stages * count) / stages)
    return [float(kept) for kept in most]


def _group_sizes(case: Case) -> list[int]:
    """Return the microbatches of each update."""
    k, total = case.accumulation, case.num_microbatches
    if total is None:
        return [k] * (_FLUSHES_WITH_JITTER if case.jitter else _FLUSHES)
    return [k] * (total // k) + ([total % k] if total % k else [])


def _exact_result(
    schedule: str,
    case: Case,
    ends: Sequence[Vector],
    busy: Sequence[Vector],
    wait_forward: Vector,
) -> Simulated:
    """Build the result from when each group's operations had ended and what was computed until then."""
    if case.num_microbatches is None:
        period = float(np.max(ends[-1] - ends[0])) / (len(ends) - 1)
        rate, seconds = case.accumulation / period, None
        idle = 1.0 - (busy[-1] - busy[0]) / (len(ends) - 1) / period
    else:
        seconds = float(ends[-1].max())
        rate = case.num_microbatches / seconds
        idle = 1.0 - busy[-1] / seconds
    idle = np.maximum(0.0, idle)
    forward = np.minimum(wait_forward / float(ends[-1].max()), idle)
    size = min(case.accumulation, case.num_microbatches or case.accumulation)
    kept = _kept_by_exact(schedule, num_places=len(case.times), accumulation=size)
    return Simulated(
        schedule=schedule,
        lookahead=None,
        accumulation=case.accumulation,
        num_microbatches=case.num_microbatches,
        seconds=seconds,
        microbatches_per_s=rate,
        limit_per_s=case.limit_per_s,
        stages=stage_results(idle, forward, idle - forward, staleness=[0.0] * len(idle), kept=kept),
    )
