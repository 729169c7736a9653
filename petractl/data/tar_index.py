"""Where the members of a tar are, found by its headers, so that a sample can be read by its place.

`tarfile` makes an object of 20 fields per member, and takes a damaged header for the end. Here the usual
headers (ustar, GNU long names, pax paths) are read by a few slices, their checksums are summed many at once,
and the end must carry its mark; what is unusual (members above 8 GiB, sparse files, other types) is left to
`tarfile`. Nothing is ever unpacked to a disk; a member whose name would lead out of the archive, or that is a
link or a device, is listed with that as its fault, and never read.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from petractl.data.tar_header import (
    BLOCK,
    END,
    DamagedHeader,
    UnusualHeader,
    first_wrong_checksum,
    header_name,
    header_size,
    pax_records,
)

_READ_AHEAD = 4096
_CHECK_EVERY = 1024
_MAX_EXTENSION_BYTES = 2**20
_MAX_NAME_BYTES = 4096
_MAX_PADDING = 2**20
_REGULAR = b"0\x007"
_WITHOUT_DATA = b"123456"
_NO_FILE = "it is a link, a device or a sparse file"


class Member(NamedTuple):
    """A file in a tar: its name, where its bytes begin and how many they are.

    `fault` says why it is not to be read ("": it is); such a member has no bytes.
    """

    name: str
    offset: int
    size: int
    fault: str = ""


@dataclass(slots=True)
class TarScan:
    """The members of a tar; `damage` says what ended the search before the mark of the end ("": nothing)."""

    members: list[Member] = field(default_factory=list)
    damage: str = ""


def scan_tar(path: Path) -> TarScan:
    """Find the members of an uncompressed tar; what is wrong inside it is told, not raised.

    Raises `OSError` where the file itself cannot be read.
    """
    # A named pipe would otherwise wait for its other end.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return TarScan(damage="it is not a regular file")
        try:
            return _Walk(descriptor, status.st_size).scan()
        except UnusualHeader:
            return _scan_by_tarfile(path)
    finally:
        os.close(descriptor)


def tar_headers(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield each member's header as `tarfile` reads it.

    Raises `tarfile.ReadError` unless the archive ends with its mark.
    """
    with tarfile.open(fileobj=file, mode="r:") as archive:
        yield from archive
        end = archive.offset or 0
    file.seek(end)
    mark = file.read(BLOCK)
    if len(mark) < BLOCK:
        raise tarfile.ReadError("it is truncated: the mark of its end is missing")
    if any(mark):
        raise tarfile.ReadError(f"the header at byte {end} is damaged")


class _Walk:
    """One walk from header to header. Headers are collected and checked `_CHECK_EVERY` at a time."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._size = size
        self._window = b""
        self._window_start = 0
        self._unchecked: list[bytes] = []
        self._offsets: list[int] = []
        self._counts: list[int] = []
        self._scan = TarScan()
        self._common: dict[str, str] = {}
        self._own: dict[str, str] = {}

    def scan(self) -> TarScan:
        try:
            end = self._walk()
            self._check()
            self._scan.damage = self._after_the_end(end)
        except DamagedHeader as found:
            self._scan.damage = self._earlier_damage() or str(found)
        except UnusualHeader:
            self._scan.damage = self._earlier_damage()
            if not self._scan.damage:
                raise
        return self._scan

    def _earlier_damage(self) -> str:
        """Return the first wrong checksum: a wrong size has led to a place where no header is."""
        try:
            self._check()
        except DamagedHeader as earlier:
            return str(earlier)
        return ""

    def _walk(self) -> int:
        offset, read, members = 0, self._read, self._scan.members
        unchecked, offsets, counts = self._unchecked, self._offsets, self._counts
        while True:
            header = read(offset)
            if len(header) < BLOCK:
                raise DamagedHeader("it is truncated: the mark of its end is missing")
            if header == END:
                return offset
            unchecked.append(header)
            offsets.append(offset)
            counts.append(len(members))
            if len(unchecked) == _CHECK_EVERY:
                self._check()
            offset = self._member(header, offset + BLOCK)

    def _member(self, header: bytes, data: int) -> int:
        """Take in one header; return where the next one is."""
        kind = header[156:157]
        size = 0 if kind in _WITHOUT_DATA else header_size(header, data - BLOCK)
        if kind in b"LKxg":
            self._extend(kind, data, size)
            return data + -(-size // BLOCK) * BLOCK
        name = header_name(header)
        if self._own or self._common:
            given = {**self._common, **self._own}
            name = given.get("path", name)
            size = int(given.get("size", size))
            self._own = {}
        if kind in _REGULAR and not (kind == b"\0" and name.endswith("/")):
            if data + size > self._size:
                raise DamagedHeader(f"it is truncated: it ends inside {name!r}")
            self._scan.members.append(_member(name, data, size))
        elif kind not in _WITHOUT_DATA:
            raise UnusualHeader
        elif kind != b"5":
            self._scan.members.append(Member(name.removeprefix("./"), 0, 0, _NO_FILE))
        return data + -(-size // BLOCK) * BLOCK

    def _extend(self, kind: bytes, data: int, size: int) -> None:
        """Take in what a header before a member says of it: a long name, or a table of pax."""
        if size > (_MAX_NAME_BYTES if kind == b"L" else _MAX_EXTENSION_BYTES):
            raise DamagedHeader(_too_long(data - BLOCK, size))
        content = os.pread(self._descriptor, size, data)
        if len(content) < size:
            raise DamagedHeader("it is truncated: it ends inside a long name")
        if kind == b"L":
            self._own["path"] = content.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        elif kind != b"K":
            records = pax_records(content, data)
            if len(records.get("path", "")) > _MAX_NAME_BYTES:
                raise DamagedHeader(_too_long(data - BLOCK, len(records["path"])))
            (self._common if kind == b"g" else self._own).update(records)

    def _read(self, offset: int) -> bytes:
        """Return the block at a place, shorter at the end of the file."""
        at = offset - self._window_start
        if at < 0 or at + BLOCK > len(self._window):
            self._window = os.pread(self._descriptor, _READ_AHEAD, offset)
            self._window_start, at = offset, 0
        return self._window[at : at + BLOCK]

    def _check(self) -> None:
        """Check the checksums of the headers collected; forget the members from the first wrong one on."""
        wrong = first_wrong_checksum(self._unchecked)
        if wrong is not None:
            offset, count = self._offsets[wrong], self._counts[wrong]
            del self._scan.members[count:]
            self._forget()
            what = "it is no tar archive" if offset == 0 else f"the header at byte {offset} is damaged"
            raise DamagedHeader(what)
        self._forget()

    def _forget(self) -> None:
        self._unchecked.clear()
        self._offsets.clear()
        self._counts.clear()

    def _after_the_end(self, end: int) -> str:
        """Say what is wrong after the mark of the end: an archive joined to another would lose the second."""
        padding = os.pread(self._descriptor, _MAX_PADDING, end)
        places = np.flatnonzero(np.frombuffer(padding, np.uint8))
        if len(places):
            return f"its end is marked at byte {end}, but more follows at byte {end + int(places[0])}"
        return ""


def _member(name: str, offset: int, size: int) -> Member:
    if leads_out(name):
        return Member(name, 0, 0, "its name leads out of the archive")
    return Member(name.removeprefix("./"), offset, size)


def _too_long(header: int, size: int) -> str:
    return f"the header at byte {header} claims a name of {size} bytes"


def leads_out(name: str) -> bool:
    """Whether a member's name is absolute or climbs above the archive."""
    return name.startswith("/") or (".." in name and ".." in name.split("/"))


def _scan_by_tarfile(path: Path) -> TarScan:
    scan = TarScan()
    with path.open("rb") as file:
        try:
            for header in tar_headers(file):
                if len(header.name) > _MAX_NAME_BYTES:
                    scan.damage = _too_long(header.offset, len(header.name))
                    break
                if header.isreg() and not header.issparse():
                    scan.members.append(_member(header.name, header.offset_data, header.size))
                elif not header.isdir():
                    scan.members.append(Member(header.name.removeprefix("./"), 0, 0, _NO_FILE))
        except tarfile.TarError as error:
            scan.damage = str(error)
        # A damaged number can also be one that no place in a file can be.
        except (EOFError, ValueError, OverflowError, OSError) as error:
            scan.damage = f"a header is damaged: {error}"
    return scan
