"""Cut a row of units into contiguous stages.

A pipeline is as fast as its slowest stage, so the best cut has the smallest largest sum of costs. Many cuts
share that optimum; among them the most even one is taken, with the smallest sum of squares, and among equals
the one that cuts earliest, so that the result is a function of the costs alone. `optimal` does it, also for
unequal devices, with limits of memory and with messages.

A partition is written as `cuts`: the index of the first unit of every stage after the first.
"""

from collections.abc import Sequence

import numpy as np

from petractl.errors import UserError
from petractl.planning.optimal import optimal_cuts


def partition(costs: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """Cut units of the given costs (none negative) so that the largest stage is as small as possible.

    Sums are taken in float64: exact for whole numbers below 2**53.

    Raises:
        UserError: fewer than one stage, or more stages than units.
    """
    check_stages(len(costs), num_stages)
    values = np.asarray(costs, dtype=np.float64)
    cuts = optimal_cuts(values, num_stages=num_stages)
    assert cuts is not None, "without limits something always fits"
    return cuts


def partition_uniform(num_units: int, num_stages: int) -> tuple[int, ...]:
    """Cut so that the stages' numbers of units differ by one at most, the larger ones first.

    Raises:
        UserError: fewer than one stage, or more stages than units.
    """
    check_stages(num_units, num_stages)
    size, larger = divmod(num_units, num_stages)
    return tuple(stage * size + min(stage, larger) for stage in range(1, num_stages))


def check_stages(num_units: int, num_stages: int) -> None:
    """Refuse numbers of stages that no cut can have.

    Raises:
        UserError: fewer than one stage, or more stages than units.
    """
    if num_stages < 1:
        raise UserError(
            f"{num_stages} stages; there is at least 1",
            where="partition.stages",
            hint="give a positive number",
        )
    if num_stages > num_units:
        raise UserError(
            f"stages({num_stages}) > units({num_units}), and a stage holds at least one unit",
            where="partition.stages",
            hint=f"give at most {num_units} stages",
        )
