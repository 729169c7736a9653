"""Two stages per process: where to cut a net for an interleaved pipeline.

Process p holds the stages p and p + P, so a net is cut into 2 P stages. The slowest stage is made as fast as
it can be, with unequal processes each for both of its own.
"""

from collections.abc import Sequence

from petractl.planning.net import Net
from petractl.planning.optimal import optimal_cuts

PER_PROCESS = 2


def interleaved_cuts(net: Net, *, accumulation: int, speeds: Sequence[float]) -> tuple[int, ...] | None:
    """Return the cuts for one process of each of `speeds`; None where the net has too few units."""
    stages = PER_PROCESS * len(speeds)
    if stages > net.num_units:
        return None
    times = net.unit_times_s(accumulation=accumulation, speeds=tuple(speeds) * PER_PROCESS)
    return optimal_cuts(times, num_stages=stages)
