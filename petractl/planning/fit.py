"""What would fit: the largest microbatch, or the fewest stages, for which memory is enough.

Stages that lie on one device share its memory: then what counts is their sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from petractl.engine.schedule import lookaheads
from petractl.planning.memory import cuts_by_memory
from petractl.planning.net import Net


@dataclass(frozen=True, slots=True)
class Room:
    """The memory that some stages share, in bytes."""

    stages: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class Cut:
    """How a net is run: the first units of stages 1 ... J-1, the lookaheads, and k."""

    cuts: tuple[int, ...]
    lookahead: tuple[int, ...]
    accumulation: int


def stage_bytes(net: Net, cut: Cut) -> tuple[int, ...]:
    """Return the most that each stage holds."""
    sizes = net.memory(accumulation=cut.accumulation).stages(cut.cuts, lookahead=cut.lookahead)
    return tuple(int(size.total) for size in sizes)


def fits(net: Net, cut: Cut, rooms: Sequence[Room]) -> bool:
    """Tell whether the stages of every room have enough together."""
    sizes = stage_bytes(net, cut)
    return all(sum(sizes[stage] for stage in room.stages) <= room.bytes for room in rooms)


def largest_batch(net: Net, cut: Cut, rooms: Sequence[Room]) -> int:
    """Return the most samples per microbatch, up to the net's own, that fit; 0 where not even one does."""
    enough, too_many = 0, net.batch_size + 1
    while too_many - enough > 1:
        middle = (enough + too_many) // 2
        if fits(net.with_batch(middle), cut, rooms):
            enough = middle
        else:
            too_many = middle
    return enough


def fewest_stages(net: Net, *, more_than: int, accumulation: int, device_bytes: int) -> int:
    """Return the fewest stages, on as many devices of so much memory, that fit; 0 where none does."""
    model = net.memory(accumulation=accumulation)
    for stages in range(more_than + 1, net.num_units + 1):
        schedule = "sequential" if net.locked else "tight"
        ahead = lookaheads(schedule, num_stages=stages)
        cuts = cuts_by_memory(model, ahead, limits=[device_bytes] * stages)
        if all(size.total <= device_bytes for size in model.stages(cuts, lookahead=ahead)):
            return stages
    return 0
