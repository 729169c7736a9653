"""The schedule: for every stage, the ordered list of its operations. Pure, no torch.

A stage executes its list in order and blocks only on the message it needs, so the result of a run is a
function of these lists and the data, whatever the speed of the machines. Stage j runs W_j forwards ahead,
then alternates one forward and one backward, and updates after every k-th backward. W is the *lookahead*; the
number of updates between a stage's forward and backward of one microbatch, its *staleness*, is the floor or
the ceiling of W_j / k.

J stages, j = 0 ... J-1; M microbatches, i = 0 ... M-1; k = accumulation. With replicas, M is what this one
gets of the epoch's rows, and updates follow the rows: every replica makes each of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise


class Kind(StrEnum):
    """What an operation does."""

    FORWARD = "F"
    BACKWARD = "B"
    FORWARD_BACKWARD = "FB"
    """The last stage's forward, loss and backward of one microbatch: one operation."""
    UPDATE = "U"


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of one stage; `microbatch` is the last one of the group for an update.

    Where a group holds nothing on this replica, its update has the group's last row for a microbatch.
    """

    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind.value} {self.microbatch}"


def lookaheads(schedule: str | Sequence[int], *, num_stages: int, slack: int = 0) -> tuple[int, ...]:
    """Return W, the number of forwards that each stage runs ahead of its backwards.

    `sequential`: 0 everywhere, the locked methods. `tight`: J-1-j, the least that keeps equal stages busy.
    `paper`: 2(J-1-j), the delays of PETRA's clock. `slack` adds min(slack, J-1-j) to `tight`. A list gives W
    itself.

    Raises:
        ValueError: an unknown name, a negative slack, or a list that is not a valid W.
    """
    if slack < 0:
        raise ValueError(f"slack = {slack} must be at least 0")
    if not isinstance(schedule, str):
        return _checked(tuple(schedule), num_stages=num_stages)
    above = range(num_stages - 1, -1, -1)
    if schedule == "sequential":
        return (0,) * num_stages
    if schedule == "tight":
        return tuple(d + min(slack, d) for d in above)
    if schedule == "paper":
        return tuple(2 * d for d in above)
    raise ValueError(f'unknown schedule "{schedule}" (known: tight, paper, sequential, or a list)')


def _checked(lookahead: tuple[int, ...], *, num_stages: int) -> tuple[int, ...]:
    if len(lookahead) != num_stages:
        raise ValueError(f"the list has {len(lookahead)} entries for {num_stages} stages: give one per stage")
    if any(w < 0 for w in lookahead):
        raise ValueError(f"{list(lookahead)} has a negative entry")
    if any(a < b for a, b in pairwise(lookahead)):
        raise ValueError(f"{list(lookahead)} must not increase from one stage to the next: it would deadlock")
    if lookahead[-1] != 0:
        raise ValueError(f"{list(lookahead)} must end with 0: the last stage cannot run ahead")
    return lookahead


def group_size(microbatch: int, *, num_microbatches: int, accumulation: int) -> int:
    """Return how many microbatches share this one's update; the last group of an epoch may be smaller.

    0 for a row in whose group this replica has none.
    """
    start = microbatch - microbatch % accumulation
    return max(0, min(accumulation, num_microbatches - start))


def num_updates(*, num_microbatches: int, accumulation: int) -> int:
    """Return the updates that every stage makes in an epoch, a partial last group included.

    With replicas: of `num_microbatches` = the epoch's rows.
    """
    return -(-num_microbatches // accumulation)


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of an epoch; by default all of it.

    `after` is the microbatch of the cut that it goes on from (its backward is the last that every stage has
    done), with what was in flight. None: the pipeline is empty, and `first` is the first microbatch to enter.
    `until` is the first that no longer enters: the pipeline is then drained, and a group that it leaves
    incomplete is not updated with.
    """

    first: int = 0
    after: int | None = None
    until: int | None = None

    @property
    def done(self) -> int:
        """How many of the epoch's microbatches have had their backward before it."""
        return self.first if self.after is None else self.after + 1

    def end(self, num_microbatches: int) -> int:
        """Return the first microbatch that does not enter."""
        return num_microbatches if self.until is None else min(self.until, num_microbatches)

    def entered(self, *, lookahead: int, num_microbatches: int) -> int:
        """Return how many of the epoch's microbatches a stage has had the forward of before it."""
        ahead = 0 if self.after is None else lookahead
        return min(self.done + ahead, self.end(num_microbatches))


WHOLE_EPOCH = Stretch()


def closes_group(microbatch: int, *, num_microbatches: int, accumulation: int) -> bool:
    """Tell whether a stage updates after this microbatch's backward."""
    return (microbatch + 1) % accumulation == 0 or microbatch + 1 == num_microbatches


def stage_operations(
    *,
    lookahead: int,
    num_microbatches: int,
    accumulation: int,
    is_last: bool,
    num_rows: int | None = None,
    stretch: Stretch = WHOLE_EPOCH,
) -> Iterator[Operation]:
    """Yield one stage's operations for an epoch, or for a stretch of it: it ends drained.

    `num_rows` is the largest number of microbatches over the replicas (None: this one's). A replica that has
    fewer still makes every update, with what the others have for it.

    Raises:
        ValueError: a negative number of microbatches, fewer rows than these, or an accumulation under 1.
    """
    rows = num_microbatches if num_rows is None else num_rows
    if num_microbatches < 0 or accumulation < 1:
        raise ValueError(f"num_microbatches = {num_microbatches}, accumulation = {accumulation}")
    if rows < num_microbatches:
        raise ValueError(f"num_rows = {rows} is less than num_microbatches = {num_microbatches}")
    end = stretch.end(num_microbatches)
    if stretch.after is None:
        yield from (
            Operation(Kind.FORWARD, i) for i in range(stretch.done, min(stretch.done + lookahead, end))
        )
    for i in range(stretch.done, end):
        if is_last:
            yield Operation(Kind.FORWARD_BACKWARD, i)
        else:
            if i + lookahead < end:
                yield Operation(Kind.FORWARD, i + lookahead)
            yield Operation(Kind.BACKWARD, i)
        if closes_group(i, num_microbatches=num_microbatches, accumulation=accumulation):
            yield Operation(Kind.UPDATE, i)
    if stretch.end(rows) < rows:
        return  # the updates of rows that this replica has not come later
    made = num_updates(num_microbatches=num_microbatches, accumulation=accumulation)
    for group in range(made, num_updates(num_microbatches=rows, accumulation=accumulation)):
        yield Operation(Kind.UPDATE, min((group + 1) * accumulation, rows) - 1)


def operations(
    *, lookahead: Sequence[int], num_microbatches: int, accumulation: int, num_rows: int | None = None
) -> tuple[tuple[Operation, ...], ...]:
    """Return every stage's list of operations for an epoch of `num_microbatches`; see `stage_operations`."""
    last = len(lookahead) - 1
    return tuple(
        tuple(
            stage_operations(
                lookahead=w,
                num_microbatches=num_microbatches,
                accumulation=accumulation,
                is_last=j == last,
                num_rows=num_rows,
            )
        )
        for j, w in enumerate(lookahead)
    )


def updates_seen_by_forward(microbatch: int, *, lookahead: int, accumulation: int) -> int:
    """Return how many of the epoch's updates a stage has made when it runs this forward."""
    return max(0, microbatch - lookahead) // accumulation


def updates_seen_by_backward(microbatch: int, *, accumulation: int) -> int:
    """Return how many of the epoch's updates a stage has made when it runs this backward."""
    return microbatch // accumulation
