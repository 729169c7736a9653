"""The shards that are at a place, and what their index says, with all that does not fit noted and not raised.

A run stops at the first thing that is wrong with its data. Whoever checks a set wants to know all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from petractl.data.places import ShardPlace, find_shards, is_shard, listing, scheme
from petractl.data.shard_cache import ShardCache
from petractl.data.shard_index import INDEX_NAME, ShardEntry, ShardIndex, load_index
from petractl.errors import DataError, UserError

PLACE = "DST"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is wrong: with a sample, with a shard (no key), or with the set (no shard either)."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.shard, self.key, self.reason)))


@dataclass(frozen=True, slots=True)
class FoundShard:
    """A shard, what its index says of it (None: nothing), and the index (None: there is none)."""

    place: ShardPlace
    entry: ShardEntry | None
    index: ShardIndex | None


@dataclass(frozen=True, slots=True)
class FoundSet:
    """The shards at a place, in order, and what is wrong with the set as such."""

    shards: tuple[FoundShard, ...]
    faults: tuple[Fault, ...] = ()

    @property
    def classes(self) -> int:
        """The number of classes that the indexes say; 0 where they do not, or differ."""
        said = {shard.index.classes for shard in self.shards if shard.index and shard.index.classes}
        return said.pop() if len(said) == 1 else 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; none where no index says them, or they differ."""
        said = {shard.index.class_names for shard in self.shards if shard.index and shard.index.class_names}
        return said.pop() if len(said) == 1 else ()


def find_set(place: str) -> FoundSet:
    """Return the shards of a folder (or of the folders in it), a pattern, an index or a URL.

    Raises `UserError` where there is none at all.
    """
    path = Path(place).expanduser()
    if scheme(place) or not path.is_dir():
        return _named(place)
    folders = [path, *sorted(inner for inner in path.iterdir() if inner.is_dir())]
    if _holds_set(path):
        folders = [path]
    found = [_folder(folder) for folder in folders if _holds_set(folder)]
    if not found:
        raise DataError(f"{path} holds no shard", where=PLACE, hint=listing(path))
    return FoundSet(
        shards=tuple(shard for part in found for shard in part.shards),
        faults=tuple(fault for part in found for fault in part.faults),
    )


def _holds_set(folder: Path) -> bool:
    return (folder / INDEX_NAME).is_file() or any(is_shard(path) for path in folder.iterdir())


def _folder(folder: Path) -> FoundSet:
    index, faults = None, list[Fault]()
    try:
        index = load_index(folder / INDEX_NAME) if (folder / INDEX_NAME).is_file() else None
    except UserError as error:
        faults.append(Fault(str(folder / INDEX_NAME), "", error.what))
    here = {path.name: path for path in sorted(folder.iterdir()) if is_shard(path)}
    listed = {entry.name: entry for entry in index.shards} if index else {}
    for name in sorted(set(listed) - set(here)):
        faults.append(Fault(str(folder / name), "", f"it is missing: {INDEX_NAME} lists it"))
    if index:
        for name in sorted(set(here) - set(listed)):
            faults.append(Fault(str(folder / name), "", f"it is not in {INDEX_NAME}"))
    shards = [
        FoundShard(ShardPlace(str(path), "file"), listed.get(name), index) for name, path in here.items()
    ]
    return FoundSet(tuple(shards), tuple(faults))


def _named(place: str) -> FoundSet:
    """Find shards that are named: those that are missing are an error of the name, not of the set."""
    places = find_shards([place], where=PLACE)
    indexes: dict[str, ShardIndex | None] = {}
    faults: list[Fault] = []
    for found in places:
        if found.folder not in indexes:
            try:
                indexes[found.folder] = _index_beside(found)
            except UserError as error:
                indexes[found.folder] = None
                faults.append(Fault(error.where, "", error.what))
    shards = []
    for found in places:
        index = indexes[found.folder]
        entry = index.entry(found.name) if index else None
        if index and entry is None:
            faults.append(Fault(found.text, "", f"it is not in {INDEX_NAME}"))
        shards.append(FoundShard(found, entry, index))
    return FoundSet(tuple(shards), (*faults, *_unlisted(place)))


def _unlisted(place: str) -> list[Fault]:
    """Return the shards beside an index, if one was named, that it does not list."""
    path = Path(place).expanduser()
    if scheme(place) or path.suffix != ".json" or not path.is_file():
        return []
    listed = {entry.name for entry in load_index(path).shards}
    return [
        Fault(str(beside), "", f"it is not in {path.name}")
        for beside in sorted(path.parent.iterdir())
        if is_shard(beside) and beside.name not in listed
    ]


def _index_beside(place: ShardPlace) -> ShardIndex | None:
    if not place.folder:
        return None
    if place.kind == "url":
        return ShardCache().index_of(place.folder)
    path = Path(place.folder) / INDEX_NAME
    return load_index(path) if path.is_file() else None
