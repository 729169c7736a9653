"""Where a split of a CIFAR set is: shards or the authors' own batches, whichever is there.

A place is a shard, a brace pattern or a folder. In a folder are looked for, in this order: shards with
"train" (or "test" or "val") in their names; the pickled and then the binary batches, also in the folders that
the authors' archives unpack to. With no place given that is `data/<name>`; where only folders for training
are given, the validation split is looked for in them as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from petractl.data.cifar_batches import (
    SIDE,
    CifarFormat,
    count_binary_batch,
    count_pickled_batch,
    read_binary_batch,
    read_pickled_batch,
)
from petractl.data.decode import decode_shard
from petractl.data.download import SetMissing
from petractl.data.places import SPLIT_WORDS, Split, is_shard, listing, names_split, refuse_both
from petractl.data.shards import count_samples, expand_place
from petractl.data.values import Samples
from petractl.errors import DataError


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a split: how to count its samples (`UNKNOWN` if that is dear) and how to read them."""

    count: Callable[[], int]
    load: Callable[[], Samples]


def find_split(
    kind: CifarFormat, split: Split, *, places: Sequence[str], train_places: Sequence[str] = ()
) -> list[Part]:
    """Return the files of a split, in order; raises `DataError` that says what is missing and how to get it.

    `places` are the split's own, none for the usual one; `train_places` those of the training split.
    """
    where = f"data.{split}"
    if places:
        paths = [path for place in places for path in expand_place(place, where=where)]
        return [part for path in paths for part in _parts(kind, path, split, where=where)]
    beside = [Path(place).expanduser() for place in train_places]
    folders = [path for path in beside if path.is_dir()] or [Path("data") / kind.name]
    for folder in folders:
        # Shards that name no split may be the training set's: never validate on them unasked.
        found = _search(kind, folder, split, named_only=True)
        if found:
            return found
    raise _not_found(kind, folders[0], split, where=where)


def _parts(kind: CifarFormat, path: Path, split: Split, *, where: str) -> list[Part]:
    if not path.is_dir():
        return [_shard(kind, path)]
    found = _search(kind, path, split, named_only=False)
    if not found:
        raise _not_found(kind, path, split, where=where)
    return found


def _search(kind: CifarFormat, folder: Path, split: Split, *, named_only: bool) -> list[Part]:
    """Look for a split in a folder; shards none of which names a split count unless `named_only`."""
    shards = sorted(path for path in folder.iterdir() if is_shard(path)) if folder.is_dir() else []
    refuse_both(shards)
    named = [path for path in shards if names_split(split, path)]
    nameless = not any(names_split(other, path) for other in SPLIT_WORDS for path in shards)
    if nameless and not named_only:
        named = shards
    if named:
        return [_shard(kind, path) for path in named]
    names = kind.train_files if split == "train" else kind.val_files
    for base in (folder / kind.pickled_folder, folder / kind.binary_folder, folder):
        for suffix in ("", ".bin"):
            files = [base / (name + suffix) for name in names]
            if any(file.is_file() for file in files):
                return _batches(kind, files, pickled=not suffix)
    return []


def _shard(kind: CifarFormat, path: Path) -> Part:
    return Part(
        count=partial(count_samples, path),
        load=partial(decode_shard, path, side=SIDE, classes=kind.classes),
    )


def _batches(kind: CifarFormat, files: list[Path], *, pickled: bool) -> list[Part]:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"{', '.join(missing)} missing beside the other batches of {kind.title}",
            where=str(files[0].parent),
            hint="unpack the authors' archive again",
        )
    count = count_pickled_batch if pickled else count_binary_batch
    read = read_pickled_batch if pickled else read_binary_batch
    return [
        Part(count=partial(count, file, kind=kind), load=partial(read, file, kind=kind)) for file in files
    ]


def _not_found(kind: CifarFormat, folder: Path, split: Split, *, where: str) -> SetMissing:
    remedy = (
        f"set data.download = true; or download '{kind.title} python version' "
        f"({kind.title.lower()}-python.tar.gz) from the CIFAR page of the University of Toronto, "
        f"www.cs.toronto.edu/~kriz/cifar.html, and unpack it in data/{kind.name} "
        f"(it makes the folder {kind.pickled_folder}); or set {where} to the place of WebDataset shards"
    )
    return SetMissing(
        f"the {split} split of {kind.title} is not in {folder}",
        where=where,
        hint=f"{listing(folder)}; {remedy}",
    )
