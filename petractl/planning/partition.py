"""Cut a row of units into contiguous stages.

A pipeline is as fast as its slowest stage, so the best cut has the smallest largest sum of costs. Many cuts
share that optimum; among them the most even one is taken, with the smallest sum of squares, and among equals
the one that cuts earliest, so that the result is a function of the costs alone. Both steps are dynamic
programmes over (stages, units), exact, a vector operation per stage.

A partition is written as `cuts`: the index of the first unit of every stage after the first.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from petractl.errors import UserError

_Matrix = npt.NDArray[np.float64]


def partition(costs: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """Cut units of the given costs (none negative) so that the largest stage is as small as possible.

    Sums are taken in float64: exact for whole numbers below 2**53.

    Raises:
        UserError: fewer than one stage, or more stages than units.
    """
    _check_stages(len(costs), num_stages)
    ends = np.concatenate([[0.0], np.cumsum(np.asarray(costs, dtype=np.float64))])
    assert np.isfinite(ends[-1]), "costs are finite"
    assert np.all(np.diff(ends) >= 0.0), "costs are not negative"
    # sums[l, i]: cost of a stage of the units l ... i-1; a stage without units is ruled out.
    sums = np.where(np.tri(len(ends), dtype=bool), np.inf, ends[None, :] - ends[:, None])
    smallest_largest = _best(sums, num_stages, np.maximum)[0]
    squares = np.square(np.where(sums <= smallest_largest, sums, np.inf))
    return _best(squares, num_stages, np.add)[1]


def partition_uniform(num_units: int, num_stages: int) -> tuple[int, ...]:
    """Cut so that the stages' numbers of units differ by one at most, the larger ones first.

    Raises:
        UserError: fewer than one stage, or more stages than units.
    """
    _check_stages(num_units, num_stages)
    size, larger = divmod(num_units, num_stages)
    return tuple(stage * size + min(stage, larger) for stage in range(1, num_stages))


def _best(costs: _Matrix, num_stages: int, combine: np.ufunc) -> tuple[float, tuple[int, ...]]:
    """Cheapest path of `num_stages` steps from 0 to the last index, its cost and the indices between.

    `costs[l, i]` is the cost of a step from l to i, `combine` (add or maximum) puts two costs together.
    """
    # After s steps the index is at least s and leaves one for each step to come: windows of equal width.
    width = len(costs) - num_stages
    best = costs[0, 1 : 1 + width]
    choices: list[npt.NDArray[np.int64]] = []
    for step in range(1, num_stages):
        candidates = combine(best[:, None], costs[step : step + width, step + 1 : step + 1 + width])
        choices.append(candidates.argmin(axis=0))
        best = candidates.min(axis=0)
    offset = width - 1
    cuts = []
    for step in range(num_stages - 1, 0, -1):
        offset = int(choices[step - 1][offset])
        cuts.append(step + offset)
    return float(best[-1]), tuple(reversed(cuts))


def _check_stages(num_units: int, num_stages: int) -> None:
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
