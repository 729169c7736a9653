"""Writing one shard: all of it or nothing, and the same bytes for the same samples.

The tar is written beside its place, with no time and no user in it, flushed to the disk and then given its
name. So a file with a shard's name is always a whole shard. Its bytes are those of WebDataset's writer, which
is not used because its import takes seconds (it brings torch).
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from petractl.data.writing.recoding import StoredImage

PARTIAL_SUFFIX = ".partial"

_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class StoredSample:
    """A sample as it will stand in a shard."""

    key: str
    image: StoredImage
    label: int


@dataclass(frozen=True, slots=True)
class Skipped:
    """A sample that was left out: where it is, its key there, and what is wrong with it."""

    place: str
    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """A finished shard: its file, and the one (height, width) of its images, None where they differ."""

    name: str
    samples: int
    bytes: int
    sha256: str
    image_size: tuple[int, int] | None
    skipped: tuple[Skipped, ...] = ()


def write_shard(path: Path, samples: Iterable[StoredSample], *, skipped: list[Skipped]) -> WrittenShard:
    """Write a shard; `skipped` is filled by whoever gives the samples.

    Raises what `samples` raises, and `OSError`; nothing is left behind then.
    """
    partial = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    try:
        count, sizes, file = _write(partial, samples)
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return WrittenShard(
        name=path.name,
        samples=count,
        bytes=file.bytes,
        sha256=file.sha256,
        image_size=sizes.pop() if len(sizes) == 1 else None,
        skipped=tuple(skipped),
    )


def sha256_of(path: Path, *, stopped: Callable[[], None] = lambda: None) -> str:
    """Return a file's SHA-256; `stopped` may raise to end it early."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            stopped()
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _HashedFile:
    """A file that counts and hashes what is written to it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self.bytes = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, content: bytes) -> int:
        # `tarfile` empties the buffer of an archive that was given up, whenever it is collected.
        if self._file.closed:
            return len(content)
        self._digest.update(content)
        self.bytes += len(content)
        return self._file.write(content)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        with suppress(OSError):
            self._file.close()


def _write(path: Path, samples: Iterable[StoredSample]) -> tuple[int, set[tuple[int, int]], _HashedFile]:
    count, sizes = 0, set[tuple[int, int]]()
    file = _HashedFile(path)
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", file), mode="w|", format=tarfile.USTAR_FORMAT) as archive:
            for sample in samples:
                _add(archive, f"{sample.key}.cls", str(sample.label).encode())
                _add(archive, f"{sample.key}.{sample.image.entry}", sample.image.content)
                count += 1
                sizes.add(sample.image.size)
        file.close()
    finally:
        file.abandon()
    return count, sizes, file


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mode = 0o444
    archive.addfile(member, io.BytesIO(content))
