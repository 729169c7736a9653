"""The shards of a split as they were found: where they are and what the indexes beside them say.

Counts come from the index, else from the headers. What the index says is compared with what is found, so that
neither an old index nor a shard cut short can change the data unseen.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from petractl.data.compression import compression
from petractl.data.encoded import OnError
from petractl.data.places import ShardPlace, Split, find_shards
from petractl.data.sample_table import SampleTable, lost_table, read_table
from petractl.data.shard_cache import DamagedShard, ShardCache
from petractl.data.shard_index import INDEX_NAME, ShardEntry, ShardIndex, read_index
from petractl.errors import DataError


@dataclass(frozen=True)
class ShardSet:
    """Where the shards are and what their indexes say of them (None: nothing)."""

    places: tuple[ShardPlace, ...]
    entries: tuple[ShardEntry | None, ...]
    classes: int
    class_names: tuple[str, ...]
    image_size: tuple[int, int] | None
    image_entries: tuple[str, ...]
    label_entry: str
    on_error: OnError
    cache: ShardCache

    def table(self, shard: int) -> SampleTable:
        """Return where a shard's samples are; raises `DataError` for damage unless it is to be skipped."""
        place, entry = self.places[shard], self.entries[shard]
        try:
            path = self.cache.local(place, entry=entry)
            table = read_table(path, image_entries=self.image_entries, label_entry=self.label_entry)
            if not len(table):
                self.cache.drop(place, path)
        except DamagedShard as error:
            if self.on_error == "stop":
                raise
            table = lost_table(error.what)
        except OSError as error:
            raise DataError(
                f"the shard cannot be read: {error.strerror}", where=place.text, hint="check that it is there"
            ) from error
        if table.damage and self.on_error == "stop":
            raise _damaged(place, table.damage)
        if entry is not None:
            _compare(table, entry, place)
        return table

    def check_bytes(self) -> None:
        """Compare the bytes of the shards on this machine with the index's.

        Where damage is skipped that is left to `table`, which tells what is damaged from what is another set.
        """
        for place, entry in zip(self.places, self.entries, strict=True):
            if place.kind != "file" or entry is None or entry.bytes is None or self.on_error == "skip":
                continue
            size = os.stat(place.text).st_size
            if size != entry.bytes:
                raise _disagrees(place, f"{entry.bytes} bytes, but the shard has {size}")


def find_shard_set(
    places: Sequence[str],
    where: str,
    split: Split | None,
    image_entries: Sequence[str],
    label_entry: str,
    on_error: OnError,
    *,
    allow_pipe: bool,
    cache: str,
) -> ShardSet:
    """Find shards and indexes; see `open_shards`. Raises `DataError` for what is missing or differs."""
    found = find_shards(places, where=where, split=split, allow_pipe=allow_pipe)
    copies = ShardCache(cache)
    folders = dict.fromkeys((place.kind, place.folder) for place in found if place.folder)
    indexes: dict[str, ShardIndex] = {}
    for kind, folder in folders:
        index = read_index(Path(folder)) if kind == "file" else copies.index_of(folder)
        if index is not None:
            indexes[folder] = index
    entries = {(folder, entry.name): entry for folder, index in indexes.items() for entry in index.shards}
    classes, names = _agreed_classes(indexes, where)
    sizes = {index.image_size for index in indexes.values()}
    shards = ShardSet(
        places=found,
        entries=tuple(entries.get((place.folder, place.name)) for place in found),
        classes=classes,
        class_names=names,
        image_size=next(iter(sizes)) if len(sizes) == 1 and len(indexes) == len(folders) else None,
        image_entries=tuple(image_entries),
        label_entry=label_entry,
        on_error=on_error,
        cache=copies,
    )
    shards.check_bytes()
    return shards


def _agreed_classes(indexes: dict[str, ShardIndex], where: str) -> tuple[int, tuple[str, ...]]:
    """Return the number and names of the classes, on which all indexes that say them must agree."""
    said = {index.classes: folder for folder, index in indexes.items() if index.classes}
    names = {index.class_names: folder for folder, index in indexes.items() if index.class_names}
    folders = said.values() if len(said) > 1 else names.values()
    if len(folders) > 1:
        raise DataError(
            f"the indexes in {' and '.join(folders)} differ in the classes",
            where=where,
            hint="name shards of one set only",
        )
    return next(iter(said), 0), next(iter(names), ())


def rows_of(table: SampleTable) -> int:
    """Return the samples of a table; damage is told as one more."""
    return len(table) + bool(table.damage)


def is_plain(place: ShardPlace) -> bool:
    """Whether a shard can be read in its place; raises `DataError` where it cannot be read at all."""
    try:
        return place.kind == "file" and not compression(Path(place.text))
    except OSError as error:
        raise DataError(
            f"the shard cannot be read: {error.strerror}", where=place.text, hint="check its permissions"
        ) from error


def _compare(table: SampleTable, entry: ShardEntry, place: ShardPlace) -> None:
    """Raise `DataError` where a shard is not the one in the index; a damaged one may have lost samples."""
    found, counted = len(table), entry.samples
    if found > counted or (found < counted and not table.damage):
        raise _disagrees(place, f"{counted} samples, but the shard holds {found}")
    in_place = str(table.path) == place.text
    if in_place and not table.damage and entry.bytes not in (None, table.stamp[0]):
        raise _disagrees(place, f"{entry.bytes} bytes, but the shard has {table.stamp[0]}")


def _damaged(place: ShardPlace, damage: str) -> DataError:
    return DataError(
        f"not a readable shard: {damage}",
        where=place.text,
        hint='make or download it again, or set data.on_error="skip" to go on without what is lost, counted',
    )


def _disagrees(place: ShardPlace, what: str) -> DataError:
    return DataError(
        f"{INDEX_NAME} says {what}",
        where=place.text,
        hint=f"`petractl shards check {place.folder}` tells what differs; copy or build the shards again",
    )
