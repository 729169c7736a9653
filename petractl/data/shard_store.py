"""Samples of WebDataset shards, read one by one from where they lie in their tars.

Which sample is where in a shard is found when the shard is first touched. With `on_error = "skip"` a damaged
shard still gives what stands before the damage, and what is lost is told as bad samples: one each where the
index says how many, else one for all of them.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from petractl.data.encoded import IMAGE_ENTRIES, LABEL_ENTRY, BadSample, Encoded, OnError, bad_size
from petractl.data.open_files import OpenFiles
from petractl.data.places import Split
from petractl.data.sample_table import SampleTable
from petractl.data.shard_index import INDEX_NAME
from petractl.data.shard_set import ShardSet, find_shard_set, is_plain, rows_of
from petractl.data.values import UNKNOWN
from petractl.errors import DataError

_log = logging.getLogger(__name__)

COUNT_LIMIT_BYTES = 16 * 2**30
"""Shards without an index that are larger in all are not read through only to describe them."""

_THREADS = 8


@dataclass(frozen=True, slots=True)
class ShardSetInfo:
    """What is known of a set without reading it; `samples` may be `UNKNOWN`, `classes` 0: nowhere said."""

    samples: int
    classes: int
    class_names: tuple[str, ...]
    image_size: tuple[int, int] | None
    shards: int


class ShardStore:
    """The samples of shards; see `EncodedSamples`. Made by `open_shards`."""

    def __init__(self, shards: ShardSet, *, classes: int) -> None:
        self.classes = classes
        self.class_names = shards.class_names
        self.image_size = shards.image_size
        self.places = tuple(place.text for place in shards.places)
        self._shards = shards
        self._tables: dict[int, SampleTable] = {}
        self._files = OpenFiles()
        self._has_warned = False
        self.sizes = self._count()
        self._ends = tuple(accumulate(self.sizes))

    def read(self, index: int) -> Encoded:
        """Return a sample; raises `BadSample`, or `DataError` for what is wrong with its shard."""
        shard = bisect_right(self._ends, index)
        row = index - (self._ends[shard] - self.sizes[shard])
        table, place = self._table(shard), self.places[shard]
        if row >= len(table):
            raise BadSample(place, f"number {row}", f"lost: {table.damage}")
        key, label = table.key(row), int(table.labels[row])
        reason = table.reasons.get(row) or bad_size(int(table.sizes[row]))
        if not reason and label >= self.classes:
            reason = f"its label {label} is not a number 0 ... {self.classes - 1}"
        if reason:
            raise BadSample(place, key, reason)
        return Encoded(key=key, image=self._image(shard, row, table), label=label, place=place)

    def close(self) -> None:
        """Close the shards that are open."""
        self._files.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def _count(self) -> tuple[int, ...]:
        """Return the samples of each shard; only those in no index are opened, several at a time."""
        entries = self._shards.entries
        unknown = [shard for shard, entry in enumerate(entries) if entry is None]
        far = sum(self._shards.places[shard].kind == "url" for shard in unknown)
        if far:
            _log.warning("no %s beside %d shards: they are fetched to be counted", INDEX_NAME, far)
        with ThreadPoolExecutor(_THREADS) as pool:
            self._tables.update(zip(unknown, pool.map(self._shards.table, unknown), strict=True))
        self._warn_of_overlooked(unknown)
        return tuple(
            rows_of(self._tables[shard]) if entry is None else entry.samples
            for shard, entry in enumerate(entries)
        )

    def _table(self, shard: int) -> SampleTable:
        """Return a shard's table, made again in another process than the one that counted."""
        if shard not in self._tables:
            table = self._shards.table(shard)
            found, counted = rows_of(table), self.sizes[shard]
            if found != counted and self._shards.entries[shard] is None:
                raise _changed(self.places[shard], f"it had {counted} samples, and now has {found}")
            self._tables[shard] = table
            self._warn_of_overlooked([shard])
        return self._tables[shard]

    def _warn_of_overlooked(self, shards: Sequence[int]) -> None:
        """Log once that members that look like entries belong to no sample: they would be missed unseen."""
        found = [shard for shard in shards if self._tables[shard].overlooked]
        if not found or self._has_warned:
            return
        self._has_warned = True
        _log.warning(
            "%s: %r and %d more members are in no sample: a key ends at its first dot, all that follows is "
            "the entry",
            self.places[found[0]],
            self._tables[found[0]].overlooked_name,
            sum(self._tables[shard].overlooked for shard in found) - 1,
        )

    def _image(self, shard: int, row: int, table: SampleTable) -> bytes:
        place, size = self.places[shard], int(table.sizes[row])
        try:
            file = self._files.get(table.path)
            image = file.read(size, int(table.offsets[row]))
        except FileNotFoundError as error:
            raise _changed(place, "it is gone") from error
        except OSError as error:
            raise BadSample(place, table.key(row), f"it cannot be read: {error.strerror}") from error
        if file.stamp != table.stamp:
            raise _changed(place, "it is not the file that it was when its samples were found")
        if len(image) < size:
            raise _changed(place, "it has been cut short")
        return image


def open_shards(
    places: Sequence[str],
    *,
    where: str,
    split: Split | None = None,
    image_entries: Sequence[str] = IMAGE_ENTRIES,
    label_entry: str = LABEL_ENTRY,
    classes: int = 0,
    on_error: OnError = "stop",
    allow_pipe: bool = False,
    cache: str = "",
) -> ShardStore:
    """Open the shards at `places` (paths, brace patterns, folders, indexes, URLs) as one set.

    `where` is the recipe's key for messages; `split` chooses in folders; `classes` 0 is what the index says;
    `cache` "" is the user's own. Raises `DataError` for what is missing, damaged (where it must be read to be
    counted), or not what its index says.
    """
    shards = find_shard_set(
        places, where, split, image_entries, label_entry, on_error, allow_pipe=allow_pipe, cache=cache
    )
    classes = classes or shards.classes
    if not classes:
        raise DataError(
            f"the number of classes is not known: there is no {INDEX_NAME} beside the shards that says it",
            where="data.classes",
            hint="set data.classes, or make the index with `petractl shards build`",
        )
    return ShardStore(shards, classes=classes)


def describe_shards(
    places: Sequence[str],
    *,
    where: str,
    split: Split | None = None,
    image_entries: Sequence[str] = IMAGE_ENTRIES,
    label_entry: str = LABEL_ENTRY,
    classes: int = 0,
    on_error: OnError = "stop",
    allow_pipe: bool = False,
    cache: str = "",
) -> ShardSetInfo:
    """Say what `open_shards` would open, without fetching or unpacking a shard; raises `DataError`."""
    shards = find_shard_set(
        places, where, split, image_entries, label_entry, on_error, allow_pipe=allow_pipe, cache=cache
    )
    known = sum(entry.samples for entry in shards.entries if entry is not None)
    unknown = [shard for shard, entry in enumerate(shards.entries) if entry is None]
    samples = UNKNOWN
    if all(is_plain(shards.places[shard]) for shard in unknown):
        size = sum(os.stat(shards.places[shard].text).st_size for shard in unknown)
        if size <= COUNT_LIMIT_BYTES:
            samples = known + sum(rows_of(shards.table(shard)) for shard in unknown)
    return ShardSetInfo(
        samples=samples,
        classes=classes or shards.classes,
        class_names=shards.class_names,
        image_size=shards.image_size,
        shards=len(shards.places),
    )


def _changed(place: str, what: str) -> DataError:
    return DataError(f"the shard has changed while it was in use: {what}", where=place, hint="start again")
