"""Plain copies of the shards that cannot be read in place: compressed ones, URLs, the output of pipes.

To read any sample by its place, a shard must lie uncompressed on a disk of this machine. So each is fetched
or unpacked once, into a folder shared by all runs, under a name made of where it is from and which version
that was (bytes and time of change, or the server's tag). A lock lets one process at a time make a copy, and a
copy has its name only when it is complete. URLs are read through fsspec, whatever it has installed for them.
The output of a pipe has no version: its copy stays until it is deleted by hand.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from petractl.data.compression import compression, uncompressed, unpacking_errors
from petractl.data.places import ShardPlace, scheme
from petractl.data.shard_index import INDEX_NAME, ShardEntry, ShardIndex, parse_index
from petractl.errors import DataError

_log = logging.getLogger(__name__)

_CHUNK = 2**20
_CHUNKS_PER_LOOK = 32
_ROOM_BYTES = 2**30
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "mtime", "created", "size")
"""What the file systems of fsspec call the version of a file."""

_PACKAGES = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
}
"""What fsspec needs for the schemes that shards are often under."""

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class DamagedShard(DataError):  # noqa: N818 (what was found is the name)
    """A shard was found, but cannot be unpacked."""


class ShardCache:
    """The folder of copies; `folder` "" is petractl/shards in the user's cache folder."""

    def __init__(self, folder: str = "") -> None:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self._folder = Path(folder or f"{home}/petractl/shards").expanduser()

    def local(self, place: ShardPlace, *, entry: ShardEntry | None = None) -> Path:
        """Return the uncompressed tar of a shard, made first if it is not there.

        `entry` is what the index says of the shard: what is fetched is checked by it. Raises `DamagedShard`
        for one that cannot be unpacked, `DataError` for all else.
        """
        if place.kind == "pipe":
            return self._made(place, "", lambda target: _run(place.text, target))
        if place.kind == "url":
            remote = _Remote(place.text)
            found = remote.info()
            version = str(found)
            if entry and not found.keys() - {"size"}:
                # A server that tells no version may have another file of the same size.
                version += entry.sha256
            return self._made(place, version, lambda target: remote.fetch(target, entry))
        path = Path(place.text)
        try:
            if not compression(path):
                return path
            status = path.stat()
        except OSError as error:
            raise _unreadable(place, error) from error
        version = f"{status.st_size} {status.st_mtime_ns}"
        return self._made(
            ShardPlace(str(path.absolute()), "file"),
            version,
            lambda target: _unpack(path, target, place.text),
        )

    def drop(self, place: ShardPlace, path: Path) -> None:
        """Delete the copy of a shard; the shard itself, read in its place, stays."""
        if path.parent == self._folder and path != Path(place.text):
            path.unlink(missing_ok=True)

    def index_of(self, folder: str) -> ShardIndex | None:
        """Return the index in the folder of a URL, None if there is none."""
        url = f"{folder}/{INDEX_NAME}"
        text = _Remote(url).text()
        return None if text is None else parse_index(text, place=url)

    def _made(self, place: ShardPlace, version: str, make: Callable[[Path], None]) -> Path:
        source = hashlib.sha256(place.text.encode("utf-8", "surrogateescape")).hexdigest()[:20]
        stem = re.sub(r"[^\w.-]", "_", place.name)[-80:]
        tag = hashlib.sha256(version.encode()).hexdigest()[:12]
        target = self._folder / f"{source}-{tag}-{stem.partition('.')[0]}.tar"
        if not target.exists():
            with self._explained(place):
                self._make(target, source, make)
        return target

    def _make(self, target: Path, source: str, make: Callable[[Path], None]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with _locked(self._folder / f".{source}.lock"):
            if target.exists():
                return
            partial = self._folder / f".{source}.partial"
            try:
                make(partial)
                _unpack_here(partial, target.name)
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
            _log.info("kept %s", target)
            for older in self._folder.glob(f"{source}-*"):
                if older != target:
                    older.unlink(missing_ok=True)

    @contextmanager
    def _explained(self, place: ShardPlace) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"no copy of {place.text} can be kept in {self._folder}: {error.strerror or error}",
                where="data.cache",
                hint="set data.cache to a folder with room, or name uncompressed .tar files of this machine",
            ) from error


class _Remote:
    """A file at a URL, by fsspec."""

    def __init__(self, url: str) -> None:
        self._url = url
        try:
            self._files, self._path = import_module("fsspec.core").url_to_fs(url)
        except ImportError as error:
            needed = _PACKAGES.get(scheme(url).lower(), "and what it names")
            hint = f"`pip install fsspec {needed}`, or download the shards"
            raise self._error(error, hint) from None
        except Exception as error:
            raise self._error(error, "check its scheme and address") from error

    def info(self) -> Mapping[str, Any]:
        """Return what tells one version of the file from another; raises `DataError` if there is none."""
        with self._explained():
            info = self._files.info(self._path)
        return {key: info[key] for key in _VERSION_KEYS if info.get(key) is not None}

    def fetch(self, target: Path, entry: ShardEntry | None) -> None:
        """Copy the file; raises `DataError` for what is not the file that it should be, else `OSError`."""
        size = self.info().get("size")
        _log.info("fetching %s", self._url)
        _require_room(target.parent, int(size or 0))
        with self._explained(writing=True):
            # A path, not an open file: not every file system of fsspec takes one.
            self._files.get_file(self._path, str(target))
        got = target.stat().st_size
        if size is not None and size != got:
            raise self._error(EOFError(f"it ended after {got} of {size} bytes"), "try again")
        if entry and entry.bytes is not None and size is not None and entry.bytes != got:
            raise self._error(ValueError(f"it has {got} bytes, {INDEX_NAME} says {entry.bytes}"), _CHECK)
        if entry and entry.sha256 and size is not None and entry.sha256 != _sha256(target):
            raise self._error(ValueError(f"its SHA-256 is not the one in {INDEX_NAME}"), _CHECK)

    def text(self) -> bytes | None:
        """Return the whole file, None if there is none."""
        try:
            return bytes(self._files.cat_file(self._path))
        # Some stores say "forbidden" of a file that is not there.
        except (FileNotFoundError, PermissionError):
            return None
        except Exception as error:
            if getattr(error, "status", 0) in (403, 404, 410):
                return None
            raise self._error(error, "check the address and the network") from error

    @contextmanager
    def _explained(self, *, writing: bool = False) -> Iterator[None]:
        """Tell errors of the network (of any class) from those of the disk that is written to."""
        try:
            yield
        except Exception as error:
            if writing and isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                raise
            raise self._error(error, "check the address, the network and the permissions") from error

    def _error(self, error: Exception, hint: str) -> DataError:
        return DataError(f"cannot be fetched: {_words(error)}", where=self._url, hint=hint)


_CHECK = "`petractl shards check` compares shards and index where they were made"


def _run(place: str, target: Path) -> None:
    """Keep what a command writes: only reached where the recipe allows it."""
    command = place.partition(":")[2]
    _log.info("running %s", command)
    with target.open("wb") as file:
        done = subprocess.run(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.PIPE, check=False
        )
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()[-500:]
        raise DataError(
            f"the command ended with {done.returncode}: {said or 'it said nothing'}",
            where=place,
            hint="run it by hand",
        )


def _unpack_here(partial: Path, name: str) -> None:
    """Unpack a file that was fetched compressed, in its place."""
    if compression(partial):
        unpacked = partial.with_suffix(".unpacked")
        try:
            _unpack(partial, unpacked, name)
            unpacked.replace(partial)
        finally:
            unpacked.unlink(missing_ok=True)


def _unpack(path: Path, target: Path, name: str) -> None:
    """Unpack a file; raises `DamagedShard`, or `OSError` where the target cannot be written."""
    _log.info("unpacking %s", name)
    with uncompressed(path) as source, target.open("wb") as file:
        for number in count():
            if number % _CHUNKS_PER_LOOK == 0:
                # A few bytes can unpack to any number.
                _require_room(target.parent, _CHUNKS_PER_LOOK * _CHUNK)
            if not (chunk := _chunk(source, name)):
                break
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def _require_room(folder: Path, size: int) -> None:
    """Raise `OSError` where `size` bytes more would leave too little of a disk for all else on it."""
    disk = shutil.disk_usage(folder)
    if disk.free - size < min(disk.total // 20, _ROOM_BYTES):
        raise OSError(errno.ENOSPC, f"too little room is left on the disk ({disk.free >> 20} MiB)")


def _chunk(source: BinaryIO, name: str) -> bytes:
    try:
        return source.read(_CHUNK)
    except unpacking_errors() as error:
        raise DamagedShard(
            f"it cannot be unpacked: {_words(error)}",
            where=name,
            hint="the file may be truncated; make or download it again",
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that all processes see, and that ends with its holder."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _words(error: BaseException) -> str:
    """Return an error's message, with its class where it has none or hardly any."""
    text = str(error)
    return text if len(text) > 12 else f"{type(error).__name__} {text}".strip()


def _unreadable(place: ShardPlace, error: OSError) -> DataError:
    return DataError(
        f"the shard cannot be read: {error.strerror}", where=place.text, hint="check that it is still there"
    )
