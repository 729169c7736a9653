"""The fields of a tar header, a block of 512 bytes: name, size, checksum; and the tables of pax.

Source: POSIX.1-2017, "pax - portable archive interchange", and the GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BLOCK = 512
END = bytes(BLOCK)

_CHECKSUM = slice(148, 156)


class DamagedHeader(Exception):  # noqa: N818 (what was found is the name)
    """The archive cannot be read on; the message says why."""


class UnusualHeader(Exception):  # noqa: N818 (what was found is the name)
    """A header that is legal, but is not read here."""


def header_name(header: bytes) -> str:
    """Return a member's name; a prefix is part of it in the POSIX form only."""
    name = header[:100].partition(b"\0")[0]
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def header_size(header: bytes, offset: int) -> int:
    """Return a member's bytes; `offset` is the header's place, for the message."""
    text = header[124:136]
    if text[0] & 0x80:
        raise UnusualHeader
    try:
        size = int(text.strip(b" \0") or b"0", 8)
    except ValueError:
        size = -1
    if size < 0:
        raise DamagedHeader(f"the header at byte {offset} is damaged")
    return size


def pax_records(content: bytes, offset: int) -> dict[str, str]:
    """Return what a table of pax says of a member's path and size; `offset` is its place."""
    found: dict[str, str] = {}
    at = 0
    try:
        while at < len(content) and content[at]:
            digits, space, _ = content[at : at + 20].partition(b" ")
            length = int(digits)
            record = content[at + len(digits) + 1 : at + length]
            key, equals, value = record.partition(b"=")
            if not (space and equals and record.endswith(b"\n") and len(record) == length - len(digits) - 1):
                raise ValueError
            if key.startswith(b"GNU.sparse") or key == b"hdrcharset":
                raise UnusualHeader
            if key in (b"path", b"size"):
                found[key.decode()] = _pax_value(key, value[:-1])
            at += length
    except ValueError:
        raise DamagedHeader(f"the table of names at byte {offset} is damaged") from None
    return found


def _pax_value(key: bytes, value: bytes) -> str:
    if key == b"size" and not (value.isdigit() and len(value) < 19):
        raise ValueError
    return value.decode("utf-8", "surrogateescape")


def first_wrong_checksum(headers: Sequence[bytes]) -> int | None:
    """Return the place of the first header whose sum is not the one it states, None where all are right."""
    if not headers:
        return None
    blocks = np.frombuffer(b"".join(headers), np.uint8).reshape(len(headers), BLOCK)
    rest = 8 * ord(" ")
    sums = blocks.sum(1, dtype=np.int64) - blocks[:, _CHECKSUM].sum(1, dtype=np.int64) + rest
    stated = np.array([_stated(header) for header in headers])
    for place in np.flatnonzero(sums != stated):
        # Some old programs summed the bytes as signed numbers.
        signed = blocks[place].view(np.int8)
        total = int(signed.sum(dtype=np.int64) - signed[_CHECKSUM].sum(dtype=np.int64)) + rest
        if total != stated[place]:
            return int(place)
    return None


def _stated(header: bytes) -> int:
    try:
        return min(int(header[_CHECKSUM].strip(b" \0") or b"-1", 8), BLOCK * 256)
    except ValueError:
        return -1
