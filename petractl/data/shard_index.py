"""`index.json`, which stands beside shards and says how many samples each holds.

Counting samples means reading every header, which for a large set on a slow disk takes minutes; the index
says it at once, with the classes and checksums. It is written by `petractl shards build`; the form of
WebDataset's `wids` ("shardlist") is read too. An index is trusted for nothing that is not checked against the
files when they are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petractl.errors import DataError

INDEX_NAME = "index.json"
INDEX_VERSION = 1

_MAX_INDEX_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard: its file's name, samples, bytes (None: not said) and SHA-256 ("": not said).

    `place` is what a `wids` index gives, a path or URL of any kind.
    """

    name: str
    samples: int
    bytes: int | None = None
    sha256: str = ""
    place: str = ""


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The shards, the number of classes (0: not said), their names, and the one (height, width) of all."""

    shards: tuple[ShardEntry, ...]
    classes: int = 0
    class_names: tuple[str, ...] = ()
    image_size: tuple[int, int] | None = None

    def entry(self, name: str) -> ShardEntry | None:
        """Return what is said of a shard, None if nothing."""
        return next((entry for entry in self.shards if entry.name == name), None)


def read_index(folder: Path) -> ShardIndex | None:
    """Return the index in a folder, None if there is none; raises `DataError` for a damaged one."""
    path = folder / INDEX_NAME
    return load_index(path) if path.is_file() else None


def load_index(path: Path) -> ShardIndex:
    """Return the index in a file; raises `DataError`."""
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise _bad(str(path), f"it is larger than {_MAX_INDEX_BYTES} bytes")
        return parse_index(path.read_bytes(), place=str(path))
    except OSError as error:
        raise _bad(str(path), f"it cannot be read: {error.strerror}") from error


def index_text(index: ShardIndex) -> str:
    """Return what to write into `index.json`; equal indexes give equal text."""
    table: dict[str, Any] = {"version": INDEX_VERSION}
    if index.classes:
        table["classes"] = index.classes
    if index.class_names:
        table["class_names"] = list(index.class_names)
    if index.image_size:
        table["image_size"] = list(index.image_size)
    rows = []
    for entry in index.shards:
        row: dict[str, Any] = {"name": entry.name, "samples": entry.samples}
        if entry.bytes is not None:
            row["bytes"] = entry.bytes
        if entry.sha256:
            row["sha256"] = entry.sha256
        rows.append(row)
    # One line per shard: such a file can be read, and compared by `diff`.
    head = json.dumps(table, indent=1).removesuffix("\n}")
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    return f'{head},\n "shards": [\n{lines}\n ]\n}}\n'


def parse_index(text: bytes, *, place: str) -> ShardIndex:
    """Return an index from its text; raises `DataError` that names `place` and what is wrong."""
    try:
        table = json.loads(text)
    # A number of thousands of digits, or thousands of brackets, are errors of other kinds.
    except (ValueError, RecursionError) as error:
        raise _bad(place, f"it is no JSON: {error}") from None
    if not isinstance(table, dict):
        raise _bad(place, "it is no table")
    try:
        index = _ours(table) if "shards" in table else _from_wids(table)
    except ValueError as error:
        raise _bad(place, str(error)) from None
    names = [entry.name for entry in index.shards]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if twice:
        raise _bad(place, f"it lists {min(twice)!r} twice")
    if not names:
        raise _bad(place, "it lists no shard")
    return index


def _ours(table: Mapping[str, Any]) -> ShardIndex:
    version = _number(table, "version", "it")
    if version != INDEX_VERSION:
        raise ValueError(f"its version is {version}, and this petractl reads version {INDEX_VERSION}")
    classes = _number(table, "classes", "it") if "classes" in table else 0
    class_names = table.get("class_names", [])
    if not isinstance(class_names, list) or not all(isinstance(name, str) for name in class_names):
        raise ValueError("its class_names are no list of names")
    if class_names and classes != len(class_names):
        raise ValueError(f"it says {classes} classes, and names {len(class_names)}")
    return ShardIndex(
        shards=tuple(_entry(row) for row in _rows(table, "shards")),
        classes=classes,
        class_names=tuple(class_names),
        image_size=_image_size(table.get("image_size")),
    )


def _entry(row: Mapping[str, Any]) -> ShardEntry:
    name = _text(row, "name", "a shard")
    if "/" in name or name in ("", ".", ".."):
        raise ValueError(f"the shard {name!r} is not a file's name")
    return ShardEntry(
        name=name,
        samples=_number(row, "samples", name),
        bytes=_number(row, "bytes", name) if "bytes" in row else None,
        sha256=_text(row, "sha256", name) if "sha256" in row else "",
        place=name,
    )


def _from_wids(table: Mapping[str, Any]) -> ShardIndex:
    if "shardlist" not in table:
        raise ValueError('it has neither "shards" nor "shardlist"')
    entries = []
    for row in _rows(table, "shardlist"):
        place = _text(row, "url", "a shard")
        name = place.partition("?")[0].rpartition("/")[2]
        size = _number(row, "filesize", name) if "filesize" in row else None
        entries.append(ShardEntry(name=name, samples=_number(row, "nsamples", name), bytes=size, place=place))
    return ShardIndex(shards=tuple(entries))


def _rows(table: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    rows = table[key]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f'its "{key}" are no list of tables')
    return rows


def _number(table: Mapping[str, Any], key: str, of: str) -> int:
    value = table.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        raise ValueError(f'the "{key}" of {of} is {str(value)[:40]}, not a number from 0')
    return value


def _text(table: Mapping[str, Any], key: str, of: str) -> str:
    value = table.get(key)
    if not isinstance(value, str):
        raise ValueError(f'the "{key}" of {of} is {str(value)[:40]}, not a text')
    return value


def _image_size(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2:
        height, width = value
        if type(height) is int and type(width) is int and min(height, width) > 0:
            return height, width
    raise ValueError(f"its image_size is {str(value)[:40]}, not [height, width]")


def _bad(place: str, what: str) -> DataError:
    return DataError(
        f"not a readable index: {what}",
        where=place,
        hint="make it again with `petractl shards build`, or take it away: the shards are then counted",
    )
