"""Stage times by FLOPs alone, for a nominal device of 1 TFLOP/s: right in proportion, if in nothing else."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from petractl.methods.family import Keep, Keeping
from petractl.planning.times import StageTimes

if TYPE_CHECKING:
    from petractl.planning.flops import UnitCost

NOMINAL_FLOPS_PER_S = 1e12
_WIRE_BYTES = 4


def nominal_times(
    costs: Sequence["UnitCost"],
    *,
    kept: Sequence[Keeping],
    cuts: Sequence[int],
    batch_size: int,
    flops_per_s: float = NOMINAL_FLOPS_PER_S,
) -> tuple[StageTimes, ...]:
    """Return the times and messages of stages for microbatches of `batch_size`, sent as float32.

    A backward is two forwards, and a third where the graph was not kept. Where the unit below a cut rebuilds
    its input, its output goes down with the gradient.
    """
    bounds = list(pairwise([0, *cuts, len(costs)]))
    stages = []
    for first, end in bounds:
        part = list(zip(costs[first:end], kept[first:end], strict=True))
        forward = sum(cost.flops for cost, _ in part)
        again = sum(cost.flops for cost, keeping in part if keeping.keep is not Keep.GRAPH)
        above = _output_bytes(costs[end - 1]) if end < len(costs) else 0
        below = _output_bytes(costs[first - 1]) if first else 0
        streams = 2 if first and kept[first - 1].keep is Keep.NOTHING else 1
        stages.append(
            StageTimes(
                forward_s=forward * batch_size / flops_per_s,
                backward_s=(2 * forward + again) * batch_size / flops_per_s,
                message_up_bytes=above * batch_size,
                message_down_bytes=streams * below * batch_size,
            )
        )
    return tuple(stages)


def _output_bytes(cost: "UnitCost") -> int:
    return _WIRE_BYTES * sum(math.prod(shape) for shape in cost.output_shapes)
