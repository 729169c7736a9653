"""What shards are made of: a folder of classes, CIFAR's or ImageNet32's batches, or other shards.

A source that holds both splits gives both: folders `train` and `val` (or `test`), batches of either, shards
whose names say it. One that names no split is taken as it is, and its shards will name none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from petractl.data.encoded import EncodedSamples, OnError
from petractl.data.image_folder import is_image_folder, open_image_folder
from petractl.data.imagenet32 import find_imagenet32
from petractl.data.places import SPLIT_WORDS, Split, listing, names_split, scheme, shards_in
from petractl.data.shard_store import describe_shards, open_shards
from petractl.data.writing.batches import cifar_class_names, find_cifar, open_cifar, open_imagenet32
from petractl.errors import DataError, UserError

Kind = Literal["folder", "cifar", "imagenet32", "shards"]
KINDS: tuple[Kind, ...] = ("folder", "cifar", "imagenet32", "shards")
SPLITS: tuple[Split, ...] = ("train", "val")
SOURCE = "SRC"
SMALL_SIDE = 96
"""Images of at most so many pixels a side are thumbnails."""


@dataclass(frozen=True, slots=True)
class SourceSplit:
    """The samples of one split (None: the source names none), and the names of their classes if known.

    `is_small`: the images are known to be thumbnails, of which a shard may hold many.
    """

    split: Split | None
    samples: EncodedSamples
    class_names: tuple[str, ...] = ()
    is_small: bool = False

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(self.samples.sizes)


@dataclass(frozen=True, slots=True)
class Wanted:
    """How a source is to be read; `class_names` (none: the source's own) number the classes of folders."""

    split: Split | None = None
    classes: int = 0
    class_names: tuple[str, ...] = ()
    on_error: OnError = "stop"
    cache: str = ""


def kind_of(source: str) -> Kind:
    """Return what a place holds by what lies there; raises `DataError` where there is nothing."""
    path = Path(source).expanduser()
    if not path.is_dir():
        return "shards"
    if any(shards_in(path, split, named_only=False) for split in SPLITS):
        return "shards"
    if any(find_cifar(path, split) for split in SPLITS):
        return "cifar"
    if any(find_imagenet32(path, split) for split in SPLITS):
        return "imagenet32"
    if _split_folders(path) or is_image_folder(path):
        return "folder"
    raise DataError(
        f"{path} holds nothing that shards are made of",
        where=SOURCE,
        hint=f"{listing(path)}; wanted are folders of classes, batches of CIFAR or ImageNet32, or shards",
    )


def open_sources(source: str, kind: Kind, wanted: Wanted) -> list[SourceSplit]:
    """Return the splits of a source; raises `DataError` for one that is missing or damaged."""
    path = Path(source).expanduser()
    if kind != "shards" and not path.is_dir():
        raise DataError(f"there is no folder {path}", where=SOURCE, hint=listing(path.parent))
    if kind == "shards":
        return _shards(source, wanted)
    found = _folders(path, wanted) if kind == "folder" else _both_batches(path, kind, wanted)
    for split in found:
        _compare_classes(wanted.classes, split.samples.classes, source)
    return found


def _both_batches(path: Path, kind: Kind, wanted: Wanted) -> list[SourceSplit]:
    splits = (wanted.split,) if wanted.split else SPLITS
    found = [_batches(path, kind, split) for split in splits]
    there = [source for source in found if source is not None]
    if not there:
        raise _no_split(path, wanted.split, f"no batches of {kind}")
    return there


def _batches(path: Path, kind: Kind, split: Split) -> SourceSplit | None:
    if kind == "imagenet32":
        opened = open_imagenet32(path, split)
        return SourceSplit(split, opened, is_small=True) if opened else None
    found = find_cifar(path, split)
    if found is None:
        return None
    cifar, files = found
    names = cifar_class_names(cifar, files[0].parent)
    return SourceSplit(split, open_cifar(cifar, files), names, is_small=True)


def _folders(path: Path, wanted: Wanted) -> list[SourceSplit]:
    folders: dict[Split | None, Path] = {split: folder for split, folder in _split_folders(path).items()}
    if not folders:
        folders = {wanted.split or _split_of(path.name): path}
    elif wanted.split:
        folders = {split: folder for split, folder in folders.items() if split == wanted.split}
    if not folders:
        raise _no_split(path, wanted.split, "no folder")
    names = wanted.class_names
    found = []
    for split, folder in folders.items():
        samples = open_image_folder(folder, where=SOURCE, class_names=names)
        names = samples.class_names
        found.append(SourceSplit(split, samples, names))
    return found


def _split_folders(path: Path) -> dict[Split, Path]:
    """Return the folders in `path` that hold a split's classes, training first."""
    found: dict[Split, Path] = {}
    for split in SPLITS:
        for word in reversed(SPLIT_WORDS[split]):
            if is_image_folder(path / word):
                found.setdefault(split, path / word)
    return found


def _shards(source: str, wanted: Wanted) -> list[SourceSplit]:
    path = Path(source).expanduser()
    if path.is_dir() and not scheme(source):
        named = [split for split in SPLITS if shards_in(path, split, named_only=True)]
        if named and wanted.split and wanted.split not in named:
            raise _no_split(path, wanted.split, "no shard")
        if named:
            splits = [wanted.split] if wanted.split else named
            return [_open_shards(source, split, split, wanted) for split in splits]
    return [_open_shards(source, None, wanted.split or _split_of(Path(source).name), wanted)]


@contextmanager
def hints_of_build() -> Iterator[None]:
    """Name the option of `petractl shards build` where a damaged shard's error names a recipe's key."""
    try:
        yield
    except DataError as error:
        hint = error.hint.replace('set data.on_error="skip"', "give --on-error skip")
        if hint == error.hint:
            raise
        raise DataError(error.what, where=error.where, hint=hint) from error


@hints_of_build()
def _open_shards(source: str, chosen: Split | None, split: Split | None, wanted: Wanted) -> SourceSplit:
    facts = describe_shards(
        [source], where=SOURCE, split=chosen, on_error=wanted.on_error, cache=wanted.cache
    )
    _compare_classes(wanted.classes, facts.classes, source)
    if not facts.classes and not wanted.classes:
        raise UserError(
            f"must be given: no index beside {source} says how many classes there are",
            where="--classes",
            hint="labels are numbers from 0 to one less than it",
        )
    samples = open_shards(
        [source],
        where=SOURCE,
        split=chosen,
        classes=wanted.classes,
        on_error=wanted.on_error,
        cache=wanted.cache,
    )
    side = max(facts.image_size) if facts.image_size else 0
    return SourceSplit(split, samples, facts.class_names, is_small=0 < side <= SMALL_SIDE)


def _compare_classes(given: int, known: int, source: str) -> None:
    """Raise `UserError` where a number of classes was given and another one is known; 0 is neither."""
    if given and known and given != known:
        raise UserError(f"{given}, but {source} has {known}", where="--classes", hint="leave it out")


def _split_of(name: str) -> Split | None:
    """Return the split that a name says, None where it says none or both."""
    said = [split for split in SPLITS if names_split(split, Path(name))]
    return said[0] if len(said) == 1 else None


def _no_split(path: Path, split: Split | None, what: str) -> DataError:
    return DataError(
        f"{path} holds {what}{f' of the {split} split' if split else ''}", where=SOURCE, hint=listing(path)
    )
