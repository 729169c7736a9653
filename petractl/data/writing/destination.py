"""The folder that shards are built in: what may be there already, and the index of all of it.

A folder holds the shards of one set, at most one build per split, each added to the same `index.json`. What
is in the way is refused before anything is written: shards of the same split, shards that no index lists,
another number of classes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from petractl.data.places import SPLIT_WORDS, Split, is_shard, names_split, scheme, splits_said
from petractl.data.shard_index import INDEX_NAME, ShardEntry, ShardIndex, index_text, read_index
from petractl.data.writing.journal import JOURNAL_NAME
from petractl.data.writing.shard_file import PARTIAL_SUFFIX, WrittenShard, sync_folder
from petractl.errors import UserError

CACHE_NAME = ".build-cache"
"""Where compressed or remote sources are unpacked to while shards are made of them."""


@dataclass(frozen=True, slots=True)
class Destination:
    """A folder, and the index that is in it (None: none yet)."""

    folder: Path
    index: ShardIndex | None

    @property
    def is_unfinished(self) -> bool:
        """Whether a build was begun here and did not end."""
        return (self.folder / JOURNAL_NAME).is_file()

    def check_room(self, splits: Sequence[Split | None]) -> None:
        """Raise `UserError` where shards of these splits cannot be added."""
        listed = {entry.name for entry in self.index.shards} if self.index else set()
        shards = sorted(path.name for path in self.folder.iterdir() if is_shard(path))
        strange = [name for name in shards if name not in listed]
        if strange and not self.is_unfinished:
            raise self._occupied(f"holds {strange[0]}, which is in no index")
        if self.index and any(entry.place != entry.name for entry in self.index.shards):
            raise self._occupied(f"has an {INDEX_NAME} of another kind")
        clashing = self._clashing(splits)
        if clashing and not self.is_unfinished:
            raise self._occupied(f"already holds the shard {clashing[0].name}")

    def others(self, splits: Sequence[Split | None]) -> tuple[ShardEntry, ...]:
        """Return what the index lists beside the shards of these splits.

        A build that was killed at its very end may have listed its own already.
        """
        entries = self.index.shards if self.index else ()
        clashing = self._clashing(splits)
        return tuple(entry for entry in entries if entry not in clashing)

    def _clashing(self, splits: Sequence[Split | None]) -> list[ShardEntry]:
        entries = self.index.shards if self.index else ()
        return [entry for entry in entries if any(_clash(split, entry.name) for split in splits)]

    def check_classes(self, classes: int, class_names: Sequence[str]) -> None:
        """Raise `UserError` where the set to be added has other classes than what is here."""
        if self.index is None:
            return
        if self.index.classes != classes:
            raise self._occupied(f"holds shards of {self.index.classes} classes, and these have {classes}")
        if self.index.class_names and class_names and self.index.class_names != tuple(class_names):
            raise self._occupied("holds shards whose classes have other names, or another order,")

    def write_index(
        self,
        shards: Sequence[WrittenShard],
        *,
        splits: Sequence[Split | None],
        classes: int,
        class_names: Sequence[str],
    ) -> ShardIndex:
        """Add the shards of splits to the index, in the order of names, and put it in place in one step."""
        before = self.others(splits)
        entries = [ShardEntry(shard.name, shard.samples, shard.bytes, shard.sha256) for shard in shards]
        sizes = {shard.image_size for shard in shards}
        if self.index and before:
            sizes.add(self.index.image_size)
        index = ShardIndex(
            shards=tuple(sorted((*before, *entries), key=lambda entry: entry.name)),
            classes=classes,
            class_names=tuple(class_names) or (self.index.class_names if self.index else ()),
            image_size=sizes.pop() if len(sizes) == 1 else None,
        )
        path = self.folder / INDEX_NAME
        partial = path.with_name(f".{INDEX_NAME}{PARTIAL_SUFFIX}")
        with partial.open("w", encoding="utf-8") as file:
            file.write(index_text(index))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(self.folder)
        return index

    def remove_partial(self) -> None:
        """Take away what a build that was killed left half-written."""
        for path in self.folder.glob(f".*{PARTIAL_SUFFIX}"):
            path.unlink(missing_ok=True)

    def _occupied(self, what: str) -> UserError:
        return UserError(f"the folder {what}", where=str(self.folder), hint="give another folder")


def check_apart(source: str, folder: Path) -> None:
    """Raise `UserError` where one of source and destination lies in the other.

    Shards in a folder of images would be its next class; images among shards would be lost with them.
    """
    if scheme(source):
        return
    origin, target = Path(source).expanduser().resolve(), folder.resolve()
    if target == origin:
        what = "is SRC itself"
    elif target in origin.parents:
        what = "holds SRC"
    # A pattern or a file names shards, and no folder beside them.
    elif origin in target.parents and origin.is_dir():
        what = f"lies in SRC, {origin}"
    else:
        return
    raise UserError(f"DST {what}", where=str(folder), hint="give a folder apart from SRC")


def open_destination(folder: Path) -> Destination:
    """Return what a folder holds; it need not be there. Raises `UserError` for what is no folder."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError("this is a file", where=str(folder), hint="give a folder for the shards")
    return Destination(folder, read_index(folder) if folder.is_dir() else None)


def make_folder(folder: Path) -> None:
    """Make the folder; raises `UserError` where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot be made: {error.strerror}", where=str(folder), hint="give another folder"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError("cannot be written", where=str(folder), hint="give another folder")


def shard_prefix(name: str, split: Split | None) -> str:
    """Return how the names of a split's shards begin; raises `UserError` for an unfit `name`.

    Which split a shard is of is read from its name, so the set's own name must say none.
    """
    if name and (not name[0].isalnum() or not all(char.isalnum() or char in "._-" for char in name)):
        raise UserError(f"{name!r} cannot begin a file's name", where="--name", hint="letters, digits and -")
    said = splits_said(name)
    if said:
        raise UserError(
            f'{name!r} says "{said[0]}", by which shards of a split are known',
            where="--name",
            hint="choose another; the split is added to the name",
        )
    return "-".join(filter(None, (name, split or ""))) or "shard"


def _clash(split: Split | None, name: str) -> bool:
    """Whether shards of a split cannot stand beside a shard of this name."""
    of = [other for other in SPLIT_WORDS if names_split(other, Path(name))]
    return split is None or not of or split in of
