"""Where a split of a set of photographs is, what is known of it, and the store that reads it.

There are two forms: shards, and a folder with one folder per class. Nothing is decoded here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from petractl.data.download import SetMissing
from petractl.data.encoded import EncodedSamples
from petractl.data.image_folder import is_image_folder, open_image_folder
from petractl.data.places import (
    SPLIT_WORDS,
    Split,
    find_shards,
    listing,
    real_place,
    scheme,
    shards_in,
)
from petractl.data.request import Request
from petractl.data.shard_store import describe_shards, open_shards

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FoundSplit:
    """A split: the places of its shards, or the folder of the folders of its classes."""

    split: Split
    shards: tuple[str, ...] = ()
    folder: Path | None = None

    @property
    def where(self) -> str:
        """The recipe's key, for messages."""
        return f"data.{self.split}"


@dataclass(frozen=True, slots=True)
class SplitFacts:
    """What is known without decoding: samples (`UNKNOWN`: dear to count), classes (0: nowhere said), ...

    `image_size` is the (height, width) of all images where an index says that they have one. `store` is what
    was opened to find out.
    """

    samples: int
    classes: int
    class_names: tuple[str, ...] = ()
    image_size: tuple[int, int] | None = None
    store: EncodedSamples | None = None


def find_split(name: str, split: Split, request: Request, *, remedy: str) -> FoundSplit:
    """Return where a split of the set `name` is; raises `SetMissing`, which ends in `remedy`, if nowhere.

    Shards that are given by name are not looked at yet.
    """
    given = request.train if split == "train" else request.val
    if given:
        folder = _only_folder(given)
        if folder is None:
            return FoundSplit(split, shards=given)
        found = _in_folder(folder, split, named_only=False)
    else:
        # Shards that name no split may be the training set's: never validate on them unasked.
        folder = (_only_folder(request.train) if split == "val" else None) or Path("data") / name
        found = _in_folder(folder, split, named_only=True)
    if found is None:
        raise SetMissing(
            f"the {split} split of {name} is not in {folder}",
            where=f"data.{split}",
            hint=f"{listing(folder)}; {remedy}",
        )
    return found


def describe_split(found: FoundSplit, request: Request, *, class_names: Sequence[str] = ()) -> SplitFacts:
    """Return what is known of a split by its index, its headers or its names; fetches no shard.

    `class_names`, the training set's, number the folders of the classes; none: the folders' own.
    """
    if found.folder is not None:
        folder = open_image_folder(
            found.folder, where=found.where, extensions=request.image_entries, class_names=class_names
        )
        return SplitFacts(sum(folder.sizes), folder.classes, tuple(folder.class_names), store=folder)
    info = describe_shards(
        found.shards,
        where=found.where,
        split=found.split,
        image_entries=request.image_entries,
        label_entry=request.label_entry,
        on_error=request.on_error,
        allow_pipe=request.allow_pipe,
        cache=request.cache,
    )
    return SplitFacts(info.samples, info.classes, tuple(info.class_names), info.image_size)


def open_split(found: FoundSplit, facts: SplitFacts, request: Request) -> EncodedSamples:
    """Return the store of a split; `request.classes` is known by now."""
    if facts.store is not None:
        return facts.store
    return open_shards(
        found.shards,
        where=found.where,
        split=found.split,
        image_entries=request.image_entries,
        label_entry=request.label_entry,
        classes=request.classes,
        on_error=request.on_error,
        allow_pipe=request.allow_pipe,
        cache=request.cache,
    )


def warn_of_shared(train: FoundSplit, val: FoundSplit, request: Request) -> None:
    """Log a warning where files are in both splits: what is learnt by heart would pass for knowledge."""
    shared = sorted(_files(train, request).intersection(_files(val, request)))
    if shared:
        more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
        _log.warning("%s%s: trained on and validated on as well", shared[0], more)


def _files(found: FoundSplit, request: Request) -> set[str]:
    if found.folder is not None:
        return {os.path.realpath(found.folder)}
    shards = find_shards(found.shards, where=found.where, split=found.split, allow_pipe=request.allow_pipe)
    return {real_place(place) for place in shards}


def _only_folder(places: tuple[str, ...]) -> Path | None:
    """Return the folder that a split's only place is, None for anything else."""
    if len(places) != 1 or scheme(places[0]):
        return None
    path = Path(places[0]).expanduser()
    return path if path.is_dir() else None


def _in_folder(folder: Path, split: Split, *, named_only: bool) -> FoundSplit | None:
    for word in SPLIT_WORDS[split]:
        if is_image_folder(folder / word):
            return FoundSplit(split, folder=folder / word)
    if folder.is_dir() and shards_in(folder, split, named_only=named_only):
        return FoundSplit(split, shards=(str(folder),))
    has_splits = any((folder / word).is_dir() for words in SPLIT_WORDS.values() for word in words)
    if not named_only and not has_splits and is_image_folder(folder):
        return FoundSplit(split, folder=folder)
    return None
