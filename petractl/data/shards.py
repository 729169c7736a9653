"""WebDataset shards: tar files in which `{key}.png` and `{key}.cls` (an ASCII number) stand side by side.

WebDataset groups the members into samples; no decoder of its is used (one of them unpickles), and no shard is
opened by it (it would run `pipe:` names in a shell). The members come from `tarfile`, read here, because both
libraries take a damaged or missing header for the end of the archive and so lose the rest of a shard without
a word: here the end must carry its mark. Nothing is written to disk, so a member's path cannot lead anywhere.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from petractl.data.compression import compression, uncompressed, unpacking_errors
from petractl.data.places import brace_names, missing_files, scheme
from petractl.data.tar_index import tar_headers
from petractl.data.values import UNKNOWN
from petractl.errors import DataError

COUNT_LIMIT_BYTES = 128 * 2**20
"""A shard larger than this is not read through only to count its samples."""


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
    kind = scheme(place)
    if kind == "pipe":
        raise DataError(
            f"{place!r} would run a command",
            where=where,
            hint="name the file itself; pipe: is not supported",
        )
    if kind:
        raise DataError(
            f"{place!r} is a URL, and only files on this machine's disks are read",
            where=where,
            hint="download it and give its path",
        )
    paths = [Path(name).expanduser() for name in brace_names(place, where)]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise missing_files(missing, of=len(paths), where=where)
    return paths


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
        return sum(_extension(member.name) == label for member in tar_headers(file))


def _members(path: Path, *, extensions: tuple[str, ...]) -> Iterator[dict[str, object]]:
    """Yield regular members of those extensions as WebDataset's grouping takes them."""
    with _open(path) as file:
        for member in tar_headers(file):
            if member.isreg() and _extension(member.name) in extensions:
                file.seek(member.offset_data)
                data = file.read(member.size)
                if len(data) < member.size:
                    raise tarfile.ReadError(f"it ends inside {member.name!r}")
                yield {"fname": member.name, "data": data, "__url__": str(path)}


def _open(path: Path) -> BinaryIO:
    """Return the uncompressed archive, seekable."""
    stream = uncompressed(path)
    if not compression(path):
        return stream
    # Seeking in a compressed stream can mean starting over, so the shard is unpacked whole: the set is to fit
    # in memory anyway.
    with stream:
        return io.BytesIO(stream.read())


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
    unreadable: tuple[type[Exception], ...] = (tarfile.TarError, ValueError, *unpacking_errors())
    try:
        yield
    except unreadable as error:
        # WebDataset appends its own arguments to those of the error; the first is the message.
        reason = str(error.args[0]) if error.args and isinstance(error, ValueError) else str(error)
        raise DataError(
            f"not a readable tar: {reason}",
            where=str(path),
            hint="the file may be truncated or no tar; make or download it again",
        ) from error


def _extension(name: str) -> str:
    """Return all extensions of a member, lower case, as WebDataset splits them: 'a/b.c.PNG' has 'c.png'."""
    return name.rpartition("/")[2].partition(".")[2].lower()
