"""The best contiguous stages, exactly: dynamic programmes over (stages, units), a vector operation per stage.

The pipeline is as fast as its slowest stage, so first the smallest largest stage time is found; many cuts
share it, and among those the most even one is taken, with the smallest sum of squares, and among equals the
one that cuts earliest: the result is a function of the costs alone. Stages may differ (unequal devices, in
the order given), may be too small for some units (memory), and cuts may cost time (messages).

    matrix[i, l]   what a stage of the units l ... i-1 costs, infinite where it cannot be
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
BlockOf = Callable[[int, slice, slice], Matrix]
"""(stage index, rows, columns) -> that part of its matrix."""

_CHUNK = 65
_ROUNDING = 1e-12


def optimal_cuts(
    times_s: npt.ArrayLike,
    *,
    num_stages: int,
    crossing_s: npt.ArrayLike | None = None,
    overlapped: bool = True,
    fits: Callable[[int], Mask] | None = None,
) -> tuple[int, ...] | None:
    """Cut units into stages so that the slowest stage is as fast as possible; None where nothing fits.

    `times_s` holds the units' times, (units,) for equal devices or (stages, units). `crossing_s[i]`, or
    `crossing_s[j, i]` for the link below stage j, is how long a microbatch keeps the link busy if the net is
    cut below unit i; `overlapped` links work beside the stages, others add to the stages at both their ends.
    `fits(j)[i, l]` tells whether stage j can hold the units l ... i-1.
    """
    stages = StageTimeMatrices(
        times_s, num_stages=num_stages, crossing_s=crossing_s, overlapped=overlapped, fits=fits
    )
    slowest, _ = cheapest_path(stages.block, num_units=stages.num_units, num_stages=num_stages)
    if not np.isfinite(slowest):
        return None
    # Sums that differ by their rounding alone are the same.
    limit = slowest * (1.0 + _ROUNDING)

    def squares(stage: int, rows: slice, columns: slice) -> Matrix:
        times = stages.block(stage, rows, columns)
        values = np.square(times)
        np.copyto(values, np.inf, where=times > limit)
        return values

    return cheapest_path(
        squares,
        num_units=stages.num_units,
        num_stages=num_stages,
        combine=np.add,
        most_units=stages.most_units(limit),
    )[1]


class StageTimeMatrices:
    """The times of every possible stage, one matrix for each stage index."""

    def __init__(
        self,
        times_s: npt.ArrayLike,
        *,
        num_stages: int,
        crossing_s: npt.ArrayLike | None = None,
        overlapped: bool = True,
        fits: Callable[[int], Mask] | None = None,
    ) -> None:
        times = np.asarray(times_s, dtype=np.float64)
        self._num_stages = num_stages
        self._ends = np.concatenate([np.zeros((*times.shape[:-1], 1)), np.cumsum(times, axis=-1)], axis=-1)
        units = times.shape[-1]
        assert times.ndim == 1 or len(times) == num_stages, "one row per stage"
        assert 1 <= num_stages <= units, "a stage holds at least one unit"
        assert np.all(times >= 0.0), "times are not negative"
        assert np.all(np.isfinite(times)), "times are finite"
        crossing = np.zeros(units + 1) if crossing_s is None else np.asarray(crossing_s, dtype=np.float64)
        self._crossing = np.broadcast_to(crossing, (num_stages, units + 1))
        self._overlapped = overlapped
        self._fits = fits
        self.num_units = units
        self._impossible = ~np.tri(units + 1, k=-1, dtype=bool)
        self._whole: tuple[tuple[object, ...], Matrix] | None = None
        self._too_large: dict[int, Mask] = {}

    def matrix(self, stage: int) -> Matrix:
        """Return the times of stage `stage`; infinite without units, and where it does not fit."""
        return self.block(stage, slice(None), slice(None))

    def block(self, stage: int, rows: slice, columns: slice) -> Matrix:
        """Return a part of the matrix; not to be written to."""
        if rows.stop is None or rows.stop - rows.start < _CHUNK:
            times = self._times(stage, rows, columns)
        else:
            # Equal stages share their times.
            key = self._kind(stage)
            if self._whole is None or self._whole[0] != key:
                self._whole = (key, self._times(stage, slice(None), slice(None)))
            times = self._whole[1][rows, columns]
        if self._fits is None:
            return times
        if stage not in self._too_large:
            self._too_large[stage] = ~self._fits(stage)
        return np.where(self._too_large[stage][rows, columns], np.inf, times)

    def most_units(self, limit: float) -> int:
        """Return the most units that any stage can hold within `limit` seconds."""
        most = 0
        for ends in np.atleast_2d(self._ends):
            first = np.searchsorted(ends, ends - limit * (1.0 + _ROUNDING) - _ROUNDING * ends[-1])
            most = max(most, int((np.arange(len(ends)) - first).max()))
        return max(1, most)

    def _kind(self, stage: int) -> tuple[object, ...]:
        """Return what a stage's times depend on besides its units."""
        below, above = self._links(stage)
        ends = self._ends if self._ends.ndim == 1 else self._ends[stage]
        return (ends.tobytes(), below.tobytes(), above.tobytes())

    def _links(self, stage: int) -> tuple[Matrix, Matrix]:
        last = stage == self._num_stages - 1
        above = self._crossing[stage] if last else self._crossing[stage + 1]
        return self._crossing[stage], above

    def _times(self, stage: int, rows: slice, columns: slice) -> Matrix:
        ends = self._ends if self._ends.ndim == 1 else self._ends[stage]
        times: Matrix = ends[rows, None] - ends[None, columns]
        np.copyto(times, np.inf, where=self._impossible[rows, columns])
        below, above = self._links(stage)
        if below.any() or above.any():
            # The net's own ends are no cuts.
            place = np.arange(len(ends))
            add = np.maximum if self._overlapped else np.add
            add(times, np.where(place == 0, 0.0, below)[None, columns], out=times)
            add(times, np.where(place == place[-1], 0.0, above)[rows, None], out=times)
        return times


def cheapest_path(
    block_of: BlockOf,
    *,
    num_units: int,
    num_stages: int,
    combine: np.ufunc = np.maximum,
    most_units: int | None = None,
) -> tuple[float, tuple[int, ...]]:
    """Return the least cost of `num_stages` steps from 0 to `num_units`, and the indices between.

    `block_of(s, rows, columns)` is a part of the matrix [i, l] of the costs of step s from l to i; `combine`
    (add or maximum) puts two costs together. No step goes further than `most_units`: the rest is not looked
    at.
    """
    # After s steps the index is at least s and leaves one for each step to come: windows of equal width.
    width = num_units + 1 - num_stages
    best = block_of(0, slice(1, 1 + width), slice(0, 1))[:, 0]
    reach = width if most_units is None else most_units
    chunk = width if reach >= width else _CHUNK - 1
    choices: list[npt.NDArray[np.intp]] = []
    for step in range(1, num_stages):
        found, choice = np.empty(width), np.empty(width, dtype=np.intp)
        for start in range(0, width, chunk):
            stop = min(width, start + chunk)
            low = max(0, start + 1 - reach)
            costs = block_of(step, slice(step + 1 + start, step + 1 + stop), slice(step + low, step + stop))
            candidates = combine(costs, best[None, low:stop])
            at = candidates.argmin(axis=1)
            found[start:stop] = candidates[np.arange(stop - start), at]
            choice[start:stop] = at + low
        choices.append(choice)
        best = found
    offset = width - 1
    cuts = []
    for step in range(num_stages - 1, 0, -1):
        offset = int(choices[step - 1][offset])
        cuts.append(step + offset)
    return float(best[-1]), tuple(reversed(cuts))


def stage_times(
    times_s: npt.ArrayLike,
    cuts: Sequence[int],
    *,
    crossing_s: npt.ArrayLike | None = None,
    overlapped: bool = True,
) -> tuple[float, ...]:
    """Return the time of every stage of a cut net, by the same rule."""
    matrices = StageTimeMatrices(
        times_s, num_stages=len(cuts) + 1, crossing_s=crossing_s, overlapped=overlapped
    )
    units = np.asarray(times_s).shape[-1]
    edges = [0, *cuts, units]
    return tuple(float(matrices.matrix(j)[edges[j + 1], edges[j]]) for j in range(len(cuts) + 1))
