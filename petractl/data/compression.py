"""Compressed shards: told by their first bytes, since a name can lie, and read as a stream.

gzip comes with Python; zstd with Python 3.14, before that with the package zstandard.
"""

from __future__ import annotations

import gzip
import zlib
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, Literal, cast

from petractl.errors import DataError

Compression = Literal["", "gzip", "zstd"]

_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def compression(path: Path) -> Compression:
    """Return how a file is compressed, "" if it is not; raises `OSError`."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic.startswith(_GZIP_MAGIC):
        return "gzip"
    return "zstd" if magic.startswith(_ZSTD_MAGIC) else ""


def uncompressed(path: Path) -> BinaryIO:
    """Return a stream of what a file holds once it is unpacked.

    Raises `OSError`, and `DataError` where the library for it is missing; the stream raises one of
    `unpacking_errors` where the file is damaged.
    """
    kind = compression(path)
    if kind == "gzip":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return _zstd_stream(path) if kind == "zstd" else path.open("rb")


def unpacking_errors() -> tuple[type[Exception], ...]:
    """Return what reading a damaged compressed file raises."""
    errors: list[type[Exception]] = [OSError, EOFError, zlib.error]
    for name in ("compression.zstd", "zstandard"):
        try:
            errors.append(import_module(name).ZstdError)
        except ImportError:
            continue
    return tuple(errors)


def _zstd_stream(path: Path) -> BinaryIO:
    try:
        return cast(BinaryIO, import_module("compression.zstd").open(path, "rb"))
    except ImportError:
        pass
    try:
        library = import_module("zstandard")
    except ImportError:
        raise DataError(
            "it is compressed by zstd, which nothing installed here can read",
            where=str(path),
            hint="`pip install zstandard`, unpack it with `unzstd`, or use .tar or .tar.gz",
        ) from None
    reader = library.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True)
    return cast(BinaryIO, reader)
