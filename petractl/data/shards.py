"""WebDataset shards: tar files in which `{key}.png` and `{key}.cls` (an ASCII number) stand side by side.

WebDataset groups the members into samples; no decoder of its is used (one of them unpickles), and no shard is
opened by it (it would run `pipe:` names in a shell). The members come from `tarfile`, read here, because both
libraries take a damaged or missing header for the end of the archive and so lose the rest of a shard without
a word: here the end must carry its mark. Nothing is written to disk, so a member's path cannot lead anywhere.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from petractl.data.values import UNKNOWN
from petractl.errors import DataError

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
COUNT_LIMIT_BYTES = 128 * 2**20
"""A shard larger than this is not read through only to count its samples."""

_MAX_SHARDS = 100_000
_BLOCK = 512
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True, slots=True)
class RawSample:
    """One sample as it stands in a shard: its key, the encoded image and the label's text."""

    key: str
    image: bytes
    label: bytes


def expand_place(place: str, *, where: str) -> list[Path]:
    """Return the paths that a path or brace pattern names, in its order; each exists.

    `where` is the recipe's key, for the message. Raises `DataError` for a URL, a bad pattern and a missing
    path.
    """
    scheme = _scheme(place)
    if scheme == "pipe":
        raise DataError(
            f"{place!r} would run a command",
            where=where,
            hint="name the file itself; pipe: is not supported",
        )
    if scheme:
        raise DataError(
            f"{place!r} is a URL, and only files on this machine's disks are read",
            where=where,
            hint="download it and give its path",
        )
    paths = [Path(name).expanduser() for name in _brace_names(place, where)]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise _missing(missing, of=len(paths), where=where)
    return paths


def is_shard(path: Path) -> bool:
    """Whether a file's name is that of a shard."""
    return path.is_file() and path.name.lower().endswith(SHARD_SUFFIXES)


def read_shard(path: Path, *, image: str = "png", label: str = "cls") -> Iterator[RawSample]:
    """Yield the samples of one shard in its order; `image` and `label` are the extensions of their entries.

    Members with other extensions are passed over unread. Raises `DataError` for a truncated or damaged
    archive and a sample without image or label.
    """
    from webdataset.tariterators import group_by_keys

    with _explained(path):
        for sample in group_by_keys(_members(path, extensions=(image, label))):
            yield _raw_sample(sample, image=image, label=label, path=path)


def count_samples(path: Path, *, label: str = "cls") -> int:
    """Return the number of labels in a shard, by its headers, or `UNKNOWN` above `COUNT_LIMIT_BYTES`."""
    if path.stat().st_size > COUNT_LIMIT_BYTES:
        return UNKNOWN
    with _explained(path), _open(path) as file:
        return sum(_extension(member.name) == label for member in _headers(file))


def _members(path: Path, *, extensions: tuple[str, ...]) -> Iterator[dict[str, object]]:
    """Yield regular members of those extensions as WebDataset's grouping takes them."""
    with _open(path) as file:
        for member in _headers(file):
            if member.isreg() and _extension(member.name) in extensions:
                file.seek(member.offset_data)
                data = file.read(member.size)
                if len(data) < member.size:
                    raise tarfile.ReadError(f"it ends inside {member.name!r}")
                yield {"fname": member.name, "data": data, "__url__": str(path)}


def _headers(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield each member's header; raises `tarfile.ReadError` unless the archive ends with its mark."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        yield from archive
        end = archive.offset or 0
    file.seek(end)
    mark = file.read(_BLOCK)
    if len(mark) < _BLOCK:
        raise tarfile.ReadError("it is truncated: the mark of its end is missing")
    if any(mark):
        raise tarfile.ReadError(f"the header at byte {end} is damaged")


def _open(path: Path) -> BinaryIO:
    """Return the uncompressed archive, seekable."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic.startswith(_ZSTD_MAGIC):
        raise DataError(
            "zstd compression is not read", where=str(path), hint="unpack it with `unzstd`, or use .tar.gz"
        )
    if not magic.startswith(_GZIP_MAGIC):
        return path.open("rb")
    # Seeking in a gzip stream can mean starting over, so the shard is unpacked whole: the set is to fit in
    # memory anyway.
    return io.BytesIO(gzip.decompress(path.read_bytes()))


def _raw_sample(sample: dict[str, object], *, image: str, label: str, path: Path) -> RawSample:
    key = str(sample["__key__"])
    for wanted in (image, label):
        if wanted not in sample:
            raise DataError(
                f"sample {key!r} has no {key}.{wanted}",
                where=str(path),
                hint=f"each sample needs {{key}}.{image} and {{key}}.{label}, next to each other in the tar",
            )
    pixels, text = sample[image], sample[label]
    assert isinstance(pixels, bytes)
    assert isinstance(text, bytes)
    return RawSample(key=key, image=pixels, label=text)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what `tarfile`, `gzip` and WebDataset raise for a bad shard into a `DataError` that names it."""
    try:
        yield
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError) as error:
        # WebDataset appends its own arguments to those of the error; the first is the message.
        reason = str(error.args[0]) if error.args and isinstance(error, ValueError) else str(error)
        raise DataError(
            f"not a readable tar: {reason}",
            where=str(path),
            hint="the file may be truncated or no tar; make or download it again",
        ) from error


def _brace_names(place: str, where: str) -> list[str]:
    if "{" not in place or Path(place).exists():
        return [place]
    from braceexpand import braceexpand

    # The library writes out a whole range before it yields its first name.
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", place)
    too_long = any(abs(int(last) - int(first)) >= _MAX_SHARDS for first, last in ranges)
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


def _missing(missing: list[Path], *, of: int, where: str) -> DataError:
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


def _extension(name: str) -> str:
    """Return all extensions of a member, lower case, as WebDataset splits them: 'a/b.c.PNG' has 'c.png'."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def _scheme(place: str) -> str:
    """Return the scheme of a URL, 'pipe' for a pipe, '' for a path."""
    head, colon, rest = place.strip().partition(":")
    if not colon:
        return ""
    if head.lower() in ("pipe", "file"):
        return head.lower()
    return head if rest.startswith("//") else ""
