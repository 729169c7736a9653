"""Simulate a pipeline: how fast a schedule is on given stages, how long they idle, how stale it is.

The semantics are the engine's: a stage executes its list in order and blocks only on the message it needs,
sends never block, and a link carries one message after another. Two questions:

    the steady state    the rate of a pipeline that neither fills nor drains; exact pipelines fill and drain
                        with every update, so theirs is the rate over whole flushes
    an epoch            so many microbatches, from an empty pipe to a drained one

A transient at the start can make one stage run faster than the pipeline can: the rate is that of the slowest.
"""

from collections.abc import Sequence

import numpy as np

from petractl.engine.exact_rules import EXACT_SCHEDULES
from petractl.engine.schedule import lookaheads, operations
from petractl.planning.exact_schedules import WEIGHT_SHARE, Step, exact_steps
from petractl.planning.exact_simulation import INTERLEAVED, simulate_exact
from petractl.planning.execution import execute
from petractl.planning.least import least_lookahead
from petractl.planning.simulated import Case, Simulated, stage_results, together
from petractl.planning.times import Link, Span, StageTimes, links_between

_SHORT_LAP = 1000
_MOST_AHEAD = 65536
_MICROBATCHES = 500
"""At least so many are measured, and ten times as many with jitter."""


def simulate(
    schedule: str | Sequence[int],
    times: Sequence[StageTimes],
    *,
    link: Link | Sequence[Link] = Link(),  # noqa: B008 (a frozen value)
    accumulation: int = 1,
    num_microbatches: int | None = None,
    slack: int = 0,
    jitter: float = 0.0,
    seed: int = 0,
    chunks: Sequence[StageTimes] | None = None,
) -> Simulated:
    """Return how a schedule fares: steadily, or over an epoch of `num_microbatches`.

    `schedule` is "tight", "paper", "least", "sequential" (plain model parallelism), a list of lookaheads, or
    an exact pipeline of `EXACT_SCHEDULES`. With "interleaved-1f1b", `times` are of processes, each of which
    is cut into two equal stages, unless the stages are given as `chunks`: twice as many, of which process p
    has p and p + P. `jitter` is the relative standard deviation of every operation's time.

    Raises:
        ValueError: an unknown name, a list that is not valid, or numbers out of range.
    """
    case = _case(
        schedule,
        times,
        chunks=chunks,
        link=link,
        accumulation=accumulation,
        jitter=jitter,
        seed=seed,
        num_microbatches=num_microbatches,
    )
    if isinstance(schedule, str) and schedule in EXACT_SCHEDULES:
        return simulate_exact(schedule, case)
    lookahead = resolve_lookahead(schedule, times, link=link, accumulation=accumulation, slack=slack)
    name = schedule if isinstance(schedule, str) else str(list(schedule)).replace(" ", "")
    name = f"{name}, slack {slack}" if slack else name
    return _epoch(name, lookahead, case) if num_microbatches else _steady(name, lookahead, case)


def timeline(
    schedule: str | Sequence[int],
    times: Sequence[StageTimes],
    *,
    num_microbatches: int,
    link: Link | Sequence[Link] = Link(),  # noqa: B008 (a frozen value)
    accumulation: int = 1,
    slack: int = 0,
    jitter: float = 0.0,
    seed: int = 0,
    chunks: Sequence[StageTimes] | None = None,
) -> tuple[Span, ...]:
    """Return every operation of an epoch, in the order in which they start; arguments as in `simulate`.

    An exact pipeline runs whole updates: at least `num_microbatches`. With jitter it is another draw of times
    than `simulate`'s.
    """
    case = _case(
        schedule,
        times,
        chunks=chunks,
        link=link,
        accumulation=accumulation,
        jitter=jitter,
        seed=seed,
        num_microbatches=num_microbatches,
    )
    spans: list[Span] = []
    if isinstance(schedule, str) and schedule in EXACT_SCHEDULES:
        groups = -(-num_microbatches // accumulation)
        steps = exact_steps(schedule, num_places=len(times), accumulation=accumulation, num_groups=groups)
        share = WEIGHT_SHARE if schedule == "zero-bubble" else 0.0
        stages = case.halves() if schedule == INTERLEAVED else case.times
        _execute(steps, case, stages, spans, weight_share=share)
    else:
        lookahead = resolve_lookahead(schedule, times, link=link, accumulation=accumulation, slack=slack)
        lists = operations(lookahead=lookahead, num_microbatches=num_microbatches, accumulation=accumulation)
        plain = [
            [Step(operation.kind.value, j, operation.microbatch) for operation in stage]
            for j, stage in enumerate(lists)
        ]
        _execute(plain, case, case.times, spans)
    return tuple(sorted(spans, key=lambda span: (span.start_s, span.row)))


def resolve_lookahead(
    schedule: str | Sequence[int],
    times: Sequence[StageTimes],
    *,
    link: Link | Sequence[Link] = Link(),  # noqa: B008 (a frozen value)
    accumulation: int = 1,
    slack: int = 0,
) -> tuple[int, ...]:
    """Return W of an asynchronous schedule or of "sequential", "least" among them.

    Raises:
        ValueError: an unknown name or a list that is not valid.
    """
    if schedule == "least":
        found = least_lookahead(times, link=link, accumulation=accumulation)
    else:
        found = lookaheads(schedule, num_stages=len(times), slack=slack)
    if found[0] > _MOST_AHEAD:
        raise ValueError(f"{found[0]:,} microbatches ahead are too many: at most {_MOST_AHEAD:,}")
    return found


def _case(
    schedule: str | Sequence[int],
    times: Sequence[StageTimes],
    *,
    chunks: Sequence[StageTimes] | None,
    link: Link | Sequence[Link],
    accumulation: int,
    jitter: float,
    seed: int,
    num_microbatches: int | None,
) -> Case:
    """Return what is simulated, checked; chunks are for interleaved pipelines alone."""
    links = links_between(link, num_stages=len(times))
    if schedule != INTERLEAVED:
        chunks = None
    if chunks is not None:
        if len(chunks) != 2 * len(times):
            raise ValueError(f"{len(chunks)} stages for {len(times)} processes: give two each")
        times = [together(*pair) for pair in zip(chunks[: len(times)], chunks[len(times) :], strict=True)]
    case = Case(
        times=tuple(times),
        links=links,
        accumulation=accumulation,
        jitter=jitter,
        seed=seed,
        num_microbatches=num_microbatches,
        chunks=None if chunks is None else tuple(chunks),
    )
    case.check()
    return case


def _steady(name: str, lookahead: tuple[int, ...], case: Case) -> Simulated:
    """Run until the pipe is in its stride, then measure laps: the stage with most ahead turns over once."""
    lap = lookahead[0] + 1
    wanted = _MICROBATCHES * (10 if case.jitter else 1)
    settle = lap if lap > _SHORT_LAP else 3 * lap + 16
    measured = lap * -(-wanted // lap)
    measured = case.accumulation * -(-measured // case.accumulation)
    if not any(lookahead):
        # Nothing runs ahead: every microbatch is like the one before.
        settle, measured = case.accumulation, wanted if case.jitter else case.accumulation
    rounds = case.rounds()
    rounds.run(lookahead, accumulation=case.accumulation, stop=settle)
    began = rounds.backward_end_s
    waits = (rounds.wait_forward_s.copy(), rounds.wait_backward_s.copy())
    rounds.run(lookahead, accumulation=case.accumulation, first=settle, stop=settle + measured)
    rate = measured / float(np.max(rounds.backward_end_s - began))
    forward, backward = rounds.wait_forward_s - waits[0], rounds.wait_backward_s - waits[1]
    return Simulated(
        schedule=name,
        lookahead=lookahead,
        accumulation=case.accumulation,
        num_microbatches=None,
        seconds=None,
        microbatches_per_s=rate,
        limit_per_s=case.limit_per_s,
        stages=stage_results(
            np.maximum(0.0, 1.0 - case.slot_s * rate),
            forward,
            backward,
            staleness=[w / case.accumulation for w in lookahead],
            kept=_kept(lookahead),
        ),
    )


def _epoch(name: str, lookahead: tuple[int, ...], case: Case) -> Simulated:
    total = case.num_microbatches
    assert total is not None
    rounds = case.rounds()
    rounds.run(lookahead, accumulation=case.accumulation, num_microbatches=total)
    seconds = float(rounds.free_s.max())
    k = case.accumulation
    staleness = [(_updates_seen(total, k) - _updates_seen(max(0, total - w), k)) / total for w in lookahead]
    return Simulated(
        schedule=name,
        lookahead=lookahead,
        accumulation=k,
        num_microbatches=total,
        seconds=seconds,
        microbatches_per_s=total / seconds,
        limit_per_s=case.limit_per_s,
        stages=stage_results(
            1.0 - rounds.busy_s / seconds,
            rounds.wait_forward_s,
            rounds.wait_backward_s + (seconds - rounds.free_s),
            staleness=staleness,
            kept=[min(kept, total) for kept in _kept(lookahead)],
        ),
    )


def _kept(lookahead: Sequence[int]) -> list[int]:
    """Return the most microbatches between forward and backward; of the last stage they are one operation."""
    return [*(w + 1 for w in lookahead[:-1]), 0]


def _updates_seen(count: int, accumulation: int) -> int:
    """Return the sum of i // k over i = 0 ... count - 1."""
    whole, rest = divmod(count, accumulation)
    return accumulation * whole * (whole - 1) // 2 + whole * rest


def _execute(
    lists: Sequence[Sequence[Step]],
    case: Case,
    stages: Sequence[StageTimes],
    spans: list[Span],
    *,
    weight_share: float = 0.0,
) -> None:
    execute(
        lists,
        times=stages,
        links=case.links,
        weight_share=weight_share,
        jitter=case.jitter,
        seed=case.seed,
        on_span=spans.append,
    )
