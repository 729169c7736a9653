"""What tells a source from another, so that an unfinished build never goes on with a changed one.

Of shards and batches the names, sizes and times are kept in the journal as they are. A folder of classes has
a million images: their names, sizes and times, in order, become one digest. No file is opened.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from petractl.data.encoded import IMAGE_ENTRIES
from petractl.data.image_folder import ImageFolder
from petractl.data.writing.sources import SourceSplit

_ENDINGS = tuple(f".{entry}".encode() for entry in IMAGE_ENTRIES)


def source_facts(source: SourceSplit) -> list[object]:
    """Return what a source is, by what is known without reading it; plain values."""
    places: list[list[object]] = []
    for place, size in zip(_places(source), source.samples.sizes, strict=False):
        path = Path(place)
        status = path.stat() if path.is_file() else None
        places.append([place, size, *((status.st_size, status.st_mtime_ns) if status else ())])
    facts: list[object] = [source.split, source.count, places]
    if isinstance(source.samples, ImageFolder):
        facts.append(_digest(Path(source.samples.places[0]), source.samples.class_names))
    return facts


def _places(source: SourceSplit) -> tuple[str, ...]:
    places = getattr(source.samples, "places", ())
    assert isinstance(places, tuple)
    return tuple(str(Path(place).absolute()) if Path(place).exists() else str(place) for place in places)


def _digest(root: Path, class_names: tuple[str, ...]) -> str:
    """Return the SHA-256 of the classes' names and their images' names, sizes and times."""
    digest = hashlib.sha256()
    for name in class_names:
        digest.update(b"class %s\0" % os.fsencode(name))
        if (root / name).is_dir():
            for line in _images(os.fsencode(root / name), b"", set()):
                digest.update(line)
    return digest.hexdigest()


def _images(folder: bytes, below: bytes, seen: set[tuple[int, int]]) -> Iterator[bytes]:
    """Yield a line per image below a folder, in the order of names; links are followed, each folder once."""
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        name = below + entry.name
        if entry.name.startswith(b"."):
            continue
        if entry.is_dir():
            yield from _images(entry.path, name + b"/", seen)
        elif name.lower().endswith(_ENDINGS):
            yield b"%s\0%s\0" % (name, _size_and_time(entry))


def _size_and_time(entry: os.DirEntry[bytes]) -> bytes:
    try:
        status = entry.stat()
    # A link that leads nowhere: its sample is a bad one.
    except OSError:
        return b"unreadable"
    return b"%d %d %d" % (status.st_size, status.st_mtime_ns, stat.S_IFMT(status.st_mode))
