"""The bad samples that a run has left out, and how many are too many.

A few damaged images in a million are no reason to stop; a few thousand are a set that is not what it should
be. A bad sample is met again in every pass, so the limit counts different ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from petractl.errors import DataError

if TYPE_CHECKING:
    from petractl.data.encoded import BadSample

DEFAULT_LIMIT = 100


class Skips:
    """Collects what is left out: `samples`, each time that it is; more than `limit` different ones end it."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self.samples: list[BadSample] = []
        self.limit = limit
        self._different: set[tuple[str, str]] = set()

    def add(self, samples: Iterable[BadSample]) -> None:
        """Note bad samples; raises `DataError` with the last of them where the limit is passed."""
        for bad in samples:
            self.samples.append(bad)
            self._different.add((bad.place, bad.key))
            if len(self._different) > self.limit:
                last = f"{bad.key!r}: {bad.reason}"
                raise too_many(len(self._different), limit=self.limit, last=last, where=bad.place)


def too_many(count: int, *, limit: int, last: str, where: str) -> DataError:
    """Return the error that so many different bad samples are."""
    return DataError(
        f"{count} different bad samples were met, more than max_skipped = {limit}; the last was {last}",
        where=where,
        hint="look at the set with `petractl shards check`, or raise data.max_skipped",
    )
