"""Which stages fit on which device, for nets of a thousand units and more.

A stage's bytes are a constant, so many for each microbatch ahead, and so many for each update among these, as
long as its neighbours are as far ahead of it: the three matrices of every possible stage are made once, and
each stage's bytes are a sum of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from petractl.planning.optimal import Mask, Matrix

if TYPE_CHECKING:
    from petractl.planning.memory import MemoryModel

_ROWS = 32  # that many of a matrix of a thousand stay in the cache
_MOST_KINDS = 4


@dataclass(frozen=True, slots=True)
class _Parts:
    constant: Matrix
    per_microbatch: Matrix
    per_update: Matrix | None
    """None: counted with the microbatches, or nothing."""


class StageBytes:
    """The bytes of every possible stage, [end, first], as `MemoryModel.bytes_of` has them.

    Only the first column is filled in for the first stage, and only the last row for the last one.
    """

    def __init__(self, model: "MemoryModel") -> None:
        self._model = model
        self._parts: dict[tuple[int | None, int | None], _Parts] = {}

    def of(self, lookahead: Sequence[int], stage: int) -> Matrix:
        """Return the bytes of stage number `stage`; infinite without units."""
        ahead = lookahead[stage]
        below = lookahead[stage - 1] - ahead if stage else None
        above = ahead - lookahead[stage + 1] if stage + 1 < len(lookahead) else None
        parts = self._parts.get((below, above))
        if parts is None:
            while len(self._parts) >= _MOST_KINDS:
                del self._parts[next(iter(self._parts))]
            parts = self._parts[below, above] = self._made(below, above)
        found: Matrix = parts.per_microbatch * float(ahead)
        found += parts.constant
        if parts.per_update is not None:
            found += parts.per_update * float(-(-ahead // self._model.accumulation))
        return found

    def _made(self, below: int | None, above: int | None) -> _Parts:
        """Look at stages one microbatch ahead, `below` behind the stage below, `above` before that above."""
        count = self._model.num_units + 1
        constant = np.full((count, count), np.inf)
        per_microbatch, per_update = np.zeros((count, count)), np.zeros((count, count))
        near = {
            "lookahead_below": None if below is None else 1 + below,
            "lookahead_above": None if above is None else 1 - above,
        }
        columns = np.arange(1 if below is None else count)
        # Of messages and images, what grows with the microbatches depends on the stage's lower end alone.
        top = np.full_like(columns, count - 1)
        one = self._model.stage(columns, top, lookahead=1, **near)
        none = self._model.stage(columns, top, lookahead=0, **_nearer(near))
        grows = one.received + one.data - none.received - none.data
        for start in range(count - 1 if above is None else 0, count, _ROWS):
            rows = slice(start, min(start + _ROWS, count))
            width = min(len(columns), rows.stop)
            first, ends = columns[None, :width], np.arange(start, rows.stop)[:, None]
            memory = self._model.stage(first, np.maximum(first, ends), lookahead=1, **near)
            # What an array holds where there is no stage counts for nothing.
            there = first < ends
            flight = memory.in_flight + grows[:width]
            part = (rows, slice(0, width))
            constant[part] = np.where(there, memory.total - flight - memory.versions, np.inf)
            per_microbatch[part] = np.where(there, flight, 0)
            per_update[part] = np.where(there, memory.versions, 0)
        if self._model.accumulation == 1:
            per_microbatch += per_update
        apart = self._model.accumulation > 1 and bool(per_update.any())
        return _Parts(constant, per_microbatch, per_update if apart else None)


def fitting(
    model: "MemoryModel", lookahead: Sequence[int], limits: Sequence[int | None]
) -> Callable[[int], Mask] | None:
    """Return what tells which stages fit on their devices, None where no device's memory is known."""
    if all(limit is None for limit in limits):
        return None
    sizes = StageBytes(model)

    def fits(stage: int) -> Mask:
        limit = limits[stage]
        if limit is None:
            return np.ones((model.num_units + 1,) * 2, dtype=bool)
        return sizes.of(lookahead, stage) <= limit

    return fits


def _nearer(near: dict[str, int | None]) -> dict[str, int | None]:
    """Return the same distances for a stage with nothing ahead."""
    return {name: None if value is None else value - 1 for name, value in near.items()}
