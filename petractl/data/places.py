"""Where the shards of a split are: paths, brace patterns, folders, indexes and URLs, in their order.

A folder stands for its shards in the order of their names: those with a word that begins like the split's
("train"; "val" or "test"), else those of a subfolder of that name, else all of them where none names any
split. Nothing is opened here but folders and indexes, and nothing is ever run: `pipe:` is refused unless it
is allowed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from petractl.data.patterns import most_names
from petractl.data.shard_index import load_index, read_index
from petractl.errors import DataError

Split = Literal["train", "val"]

SPLIT_WORDS: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("test", "val")}
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst")

_MAX_SHARDS = 100_000
_INDEX_SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf")
"""What an index may name besides the files beside it: what only fetches, and from a server."""
# At a word's start: "medieval", "latest" and "strain" say nothing. "imagenetTrain" does.
_SPLIT_WORD = re.compile(r"(?<![A-Za-z])(train|val|test)|(?<=[a-z])(?-i:(Train|Val|Test))", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ShardPlace:
    """Where one shard is: a path, a URL, or "pipe:" and a command; `text` is what messages call it."""

    text: str
    kind: Literal["file", "url", "pipe"]

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        if self.kind == "pipe":
            return "pipe"
        text = urlsplit(self.text).path if self.kind == "url" else self.text
        return text.rstrip("/").rpartition("/")[2]

    @property
    def folder(self) -> str:
        """The folder or the URL of it; empty where nothing can be looked for beside the shard."""
        if self.kind == "file":
            return str(Path(self.text).parent)
        # What follows a ? is often a signature for this one file.
        return "" if self.kind == "pipe" or "?" in self.text else self.text.rpartition("/")[0]


def find_shards(
    places: Sequence[str], *, where: str, split: Split | None = None, allow_pipe: bool = False
) -> tuple[ShardPlace, ...]:
    """Return the shards that `places` name, in order; those on this machine's disks exist.

    `where` is the recipe's key, for messages; `split` chooses in folders. Raises `DataError` for a bad
    pattern, a missing path, a folder without shards, an index that lists others, and a pipe unless allowed.
    """
    try:
        found = [shard for place in places for shard in _expanded(place, split, where, allow_pipe)]
    except OSError as error:
        raise DataError(
            f"{error.filename} cannot be read: {error.strerror}", where=where, hint="check its permissions"
        ) from error
    _refuse_twice(found, where)
    return tuple(found)


def _expanded(place: str, split: Split | None, where: str, allow_pipe: bool) -> list[ShardPlace]:
    targets: list[Path | ShardPlace] = []
    for name in brace_names(place, where):
        kind = scheme(name)
        if kind == "pipe" and not allow_pipe:
            raise _refused_pipe(place, where)
        if kind in ("", "file"):
            targets.append(_local_path(name, where))
        else:
            targets.append(ShardPlace(name.strip(), "pipe" if kind == "pipe" else "url"))
    missing = [target for target in targets if isinstance(target, Path) and not target.exists()]
    if missing:
        raise missing_files(missing, of=len(targets), where=where)
    found: list[ShardPlace] = []
    for target in targets:
        found += _shards_at(target, split, where=where) if isinstance(target, Path) else [target]
    return found


def shards_in(folder: Path, split: Split | None, *, named_only: bool) -> list[Path]:
    """Return a folder's shards of a split; with `named_only`, none where nothing names a split."""
    shards = _listed(folder)
    if split is None:
        return shards
    refuse_both(shards)
    named = [path for path in shards if names_split(split, path)]
    if named:
        return named
    if not any(names_split(other, path) for other in SPLIT_WORDS for path in shards):
        for word in SPLIT_WORDS[split]:
            inner = sorted(path for path in _entries(folder) if path.is_dir() and path.name.startswith(word))
            refuse_both(inner)
            found = [shard for path in inner for shard in _listed(path)]
            if found:
                return found
        return [] if named_only else shards
    return []


def splits_said(name: str) -> tuple[Split, ...]:
    """Return the splits that a file's name says: one, none, or both."""
    said = {word.lower() for words in _SPLIT_WORD.findall(name) for word in words}
    return tuple(split for split, words in SPLIT_WORDS.items() if said.intersection(words))


def names_split(split: Split, path: Path) -> bool:
    """Whether a file's name says that it belongs to a split."""
    return split in splits_said(path.name)


def refuse_both(paths: Sequence[Path]) -> None:
    """Raise `DataError` where a name says both splits: it could train and validate on the same samples."""
    for path in paths:
        if len(splits_said(path.name)) > 1:
            raise DataError(
                "its name says both train and val (or test), so that its split cannot be told",
                where=str(path),
                hint="name the shards of each split by a pattern, as a-{00..04}.tar, or rename it",
            )


def is_shard(path: Path) -> bool:
    """Whether a file's name is that of a shard."""
    return path.name.lower().endswith(SHARD_SUFFIXES) and path.is_file()


def scheme(place: str) -> str:
    """Return the scheme of a URL, "pipe" for a pipe, "" for a path."""
    head, colon, rest = place.strip().partition(":")
    if not colon:
        return ""
    if head.lower() in ("pipe", "file"):
        return head.lower()
    return head if rest.startswith("//") else ""


def brace_names(place: str, where: str) -> list[str]:
    """Write out a brace pattern; raises `DataError` for a bad one, or one of too many names."""
    if "{" not in place or (not scheme(place) and os.path.exists(Path(place).expanduser())):
        return [place]
    from braceexpand import braceexpand

    # The library writes out a whole range, and reads all of a long product, before it yields a name.
    too_long = most_names(place) > _MAX_SHARDS
    try:
        names = [] if too_long else list(islice(braceexpand(place), _MAX_SHARDS + 1))
    except ValueError as error:
        raise DataError(
            f"bad pattern {place!r}: {error}", where=where, hint="example: a-{00..04}.tar"
        ) from None
    if too_long or len(names) > _MAX_SHARDS:
        raise DataError(
            f"{place!r} names more than {_MAX_SHARDS} files", where=where, hint="shorten its range"
        )
    return names


def missing_files(missing: Sequence[Path], *, of: int, where: str) -> DataError:
    """Return the error that names missing files and what there is in their place."""
    folder = missing[0].parent
    names = ", ".join(str(path) for path in missing[:3]) + (" ..." if len(missing) > 3 else "")
    how_many = "" if of == 1 else f" ({len(missing)} of {of} files)"
    return DataError(f"no such file: {names}{how_many}", where=where, hint=listing(folder))


def listing(folder: Path) -> str:
    """Say what a folder holds, for a message about what it does not."""
    if not folder.is_dir():
        return f"there is no folder {folder} (paths are relative to {Path.cwd()})"
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{folder} holds: {shown or 'nothing'}"


def _shards_at(path: Path, split: Split | None, *, where: str) -> list[ShardPlace]:
    if path.is_dir():
        return [ShardPlace(str(shard), "file") for shard in _folder_shards(path, split, where=where)]
    if path.suffix == ".json":
        return _indexed_shards(path, split, where=where)
    if not path.is_file():
        raise DataError(f"{path} is neither a file nor a folder", where=where, hint=listing(path.parent))
    return [ShardPlace(str(path), "file")]


def _folder_shards(folder: Path, split: Split | None, *, where: str) -> list[Path]:
    shards = shards_in(folder, split, named_only=False)
    if not shards:
        of_split = f" of the {split} split" if split and _listed(folder) else ""
        raise DataError(f"{folder} holds no shard{of_split}", where=where, hint=listing(folder))
    for parent in dict.fromkeys(shard.parent for shard in shards):
        index = read_index(parent)
        here = {shard.name for shard in shards if shard.parent == parent}
        wanted = [Path(entry.name) for entry in index.shards] if index else []
        if parent == folder:
            wanted = _of_split(wanted, split)
        lost = [parent / path for path in wanted if path.name not in here]
        if lost:
            raise missing_files(lost, of=len(wanted), where=where)
    return shards


def _indexed_shards(path: Path, split: Split | None, *, where: str) -> list[ShardPlace]:
    entries = load_index(path).shards
    wanted = {path.name for path in _of_split([Path(entry.name) for entry in entries], split)}
    found = []
    for entry in entries:
        if entry.name not in wanted:
            continue
        if scheme(entry.place) in ("", "file", "pipe"):
            found.append(ShardPlace(str(path.parent / entry.name), "file"))
        else:
            _check_indexed_url(entry.place, index=path)
            found.append(ShardPlace(entry.place, "url"))
    missing = [Path(place.text) for place in found if place.kind == "file" and not Path(place.text).is_file()]
    if missing:
        raise missing_files(missing, of=len(found), where=where)
    if not found:
        raise DataError(f"{path} lists no shard of the {split} split", where=where, hint="name the shards")
    return found


def _check_indexed_url(place: str, *, index: Path) -> None:
    """Refuse what an index, which may be a stranger's, must not have opened.

    fsspec would open anything by whatever is installed, and chains of it ("reference://::http://...") read
    descriptions from elsewhere, some of which are templates with code.
    """
    if scheme(place).lower() not in _INDEX_SCHEMES or "::" in place:
        raise DataError(
            f"it names {place!r}, which an index may not",
            where=str(index),
            hint=f"an index may name {', '.join(f'{each}://' for each in _INDEX_SCHEMES)}; name the shards "
            "in the recipe if you trust their place",
        )


def _local_path(name: str, where: str) -> Path:
    if scheme(name) != "file":
        return Path(name).expanduser()
    parts = urlsplit(name.strip())
    if parts.netloc not in ("", "localhost"):
        raise DataError(
            f"{name!r} is a file of another machine", where=where, hint="write file:///path, or the path"
        )
    return Path(unquote(parts.path))


def _of_split(names: Sequence[Path], split: Split | None) -> list[Path]:
    """Return the names of a split; all of them where none names any."""
    if split is None:
        return list(names)
    refuse_both(names)
    if not any(names_split(other, name) for other in SPLIT_WORDS for name in names):
        return list(names)
    return [name for name in names if names_split(split, name)]


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _listed(folder: Path) -> list[Path]:
    return sorted(path for path in _entries(folder) if is_shard(path))


def _refuse_twice(found: Sequence[ShardPlace], where: str) -> None:
    seen: dict[str, str] = {}
    for place in found:
        real = real_place(place)
        if real in seen:
            earlier = seen[real]
            link = f" (it is the same file as {earlier})" if earlier != place.text else ""
            raise DataError(
                f"{place.text} is named twice{link}: its samples would count twice",
                where=where,
                hint="name every shard once",
            )
        seen[real] = place.text


def real_place(place: ShardPlace) -> str:
    """Return the same text for the same file, whatever links lead to it."""
    return os.path.realpath(place.text) if place.kind == "file" else place.text


def _refused_pipe(place: str, where: str) -> DataError:
    return DataError(
        f"{place!r} would run a command",
        where=where,
        hint="name the file itself; data.allow_pipe=true lets a recipe run any command as you",
    )
