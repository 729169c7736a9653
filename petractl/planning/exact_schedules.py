"""The operation lists of the exact pipelines, in the order of `torch.distributed.pipelining`.

A flush takes the k microbatches of an update through P processes, p = 0 ... P-1, and back:

    gpipe               all forwards, then all backwards
    1f1b                P-1-p forwards ahead, then one forward, one backward
    interleaved-1f1b    the same with stages p and p + P, taken in rounds of microbatches
    zero-bubble         1f1b with P-1-p ahead whose weight gradients ("W") come p backwards late

An update follows the flush on every stage. What torch does not run as one flush is run as two, as the engine
does (`engine.exact_rules.flushes`). No torch here: a test compares the lists with torch's own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from petractl.engine.exact_rules import flushes, stages_per_process

WEIGHT_SHARE = 0.5
"""Of a backward: a layer's input gradient and its weight gradient are one product of the same size each."""


@dataclass(frozen=True, slots=True)
class Step:
    """One operation of one process: "F", "B", "FB", "W" or "U" of a microbatch on a stage."""

    kind: str
    stage: int
    microbatch: int


def exact_lookahead(schedule: str, *, num_places: int, count: int) -> tuple[int, ...]:
    """Return how many forwards each place runs ahead in a flush of `count` microbatches.

    Of "interleaved-1f1b" they are forwards of half a stage.
    """
    above = range(num_places - 1, -1, -1)
    if schedule == "gpipe":
        return (count,) * num_places
    if schedule == "interleaved-1f1b":
        per_round = _per_round(num_places=num_places, count=count)
        return tuple(min(per_round + 2 * d, 2 * count) for d in above)
    assert schedule in ("1f1b", "zero-bubble"), schedule
    return tuple(min(d, count) for d in above)


def exact_steps(schedule: str, *, num_places: int, accumulation: int, num_groups: int) -> list[list[Step]]:
    """Return every place's list for `num_groups` updates of `accumulation` microbatches each."""
    stages = stages_per_process(schedule)
    lists: list[list[Step]] = [[] for _ in range(num_places)]
    for group in range(num_groups):
        first = group * accumulation
        for name, count in flushes(schedule, num_places=num_places, count=accumulation):
            ahead = exact_lookahead(name, num_places=num_places, count=count)
            for place, steps in enumerate(lists):
                steps += _flush(name, place, ahead[place], num_places=num_places, first=first, count=count)
            first += count
        for place, steps in enumerate(lists):
            steps += [Step("U", stage * num_places + place, first - 1) for stage in range(stages)]
    return lists


def kept_by_stage(schedule: str, *, num_places: int, accumulation: int) -> tuple[int, ...]:
    """Return the most microbatches that each stage keeps at a time, from forward to its last gradient."""
    stages = num_places * stages_per_process(schedule)
    most = [0] * stages
    last = "W" if schedule == "zero-bubble" else "B"
    for steps in exact_steps(schedule, num_places=num_places, accumulation=accumulation, num_groups=1):
        kept = dict.fromkeys(range(stages), 0)
        for step in steps:
            kept[step.stage] += (step.kind == "F") - (step.kind == last)
            most[step.stage] = max(most[step.stage], kept[step.stage])
    return tuple(most)


def _flush(
    schedule: str, place: int, ahead: int, *, num_places: int, first: int, count: int
) -> Iterator[Step]:
    stages = stages_per_process(schedule)
    forwards = list(_in_rounds(place, stages, num_places=num_places, count=count, rising=True))
    backwards = list(_in_rounds(place, stages, num_places=num_places, count=count, rising=False))
    yield from (Step("F", stage, first + i) for stage, i in forwards[:ahead])
    late = place if schedule == "zero-bubble" else 0
    for n, (stage, i) in enumerate(backwards):
        if n + ahead < len(forwards):
            behind, microbatch = forwards[n + ahead]
            yield Step("F", behind, first + microbatch)
        yield Step("B", stage, first + i)
        if schedule == "zero-bubble" and n >= late:
            yield Step("W", stage, first + backwards[n - late][1])
    if late:
        yield from (Step("W", place, first + i) for _, i in backwards[-min(late, count) :])


def _in_rounds(
    place: int, stages: int, *, num_places: int, count: int, rising: bool
) -> Iterator[tuple[int, int]]:
    """Yield (stage, microbatch): a round of microbatches on one stage of the place, then on the next."""
    size = _per_round(num_places=num_places, count=count) if stages > 1 else count
    own = [chunk * num_places + place for chunk in range(stages)]
    for start in range(0, count, size):
        for stage in own if rising else reversed(own):
            yield from ((stage, i) for i in range(start, start + size))


def _per_round(*, num_places: int, count: int) -> int:
    return count // max(1, count // num_places)
