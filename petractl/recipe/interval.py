"""The time between two checkpoints, in the units in which people think of it. Pure, no torch."""

import re
from dataclasses import dataclass

_UNITS_S = {"s": 1.0, "min": 60.0, "h": 3600.0}
_INTERVAL = re.compile(r"([0-9]{1,9}) (epochs?|updates?|s|min|h)")


@dataclass(frozen=True, slots=True)
class Interval:
    """A number of epochs, of updates, or of seconds; the others are 0."""

    epochs: int = 0
    updates: int = 0
    seconds: float = 0.0


def parse_interval(text: str) -> Interval:
    """Return what "1 epoch", "500 updates", "90 s", "10 min" or "2 h" says.

    Raises:
        ValueError: it says something else, or nothing between two checkpoints.
    """
    found = _INTERVAL.fullmatch(text)
    if found is None or not int(found[1]):
        raise ValueError(
            'must be a whole number and a unit: "1 epoch", "500 updates", "90 s", "10 min" or "2 h"'
        )
    count, unit = int(found[1]), found[2].removesuffix("s") if len(found[2]) > 1 else found[2]
    if unit == "epoch":
        return Interval(epochs=count)
    if unit == "update":
        return Interval(updates=count)
    return Interval(seconds=count * _UNITS_S[unit])
