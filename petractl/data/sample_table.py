"""The samples of one shard: `{key}.jpg` and `{key}.cls` (an ASCII number) side by side in a tar.

As in WebDataset, members that share a key and stand together are one sample; only the entries named in the
recipe count, whatever else is there is never read. A sample that lacks its image or its label, has it twice,
has no number for a label, or has a link in its place, keeps its place in the table, with the reason, so that
it can be counted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from petractl.data.encoded import IMAGE_ENTRIES, LABEL_ENTRY
from petractl.data.tar_index import Member, scan_tar

_MAX_LABEL_BYTES = 32
_LABEL = re.compile(rb"\s*([0-9]{1,18})\s*")

FileStamp = tuple[int, int]
"""Bytes and time of change (ns) of a file, to notice that it has become another."""


@dataclass(frozen=True, slots=True)
class SampleTable:
    """The samples of a shard: keys, where their images' bytes are, labels (-1: see `reasons`).

    `damage` says what ended the shard before its end ("": nothing); the samples before it are good. `path` is
    the file that the offsets are of. `overlooked` counts the members that end like an entry, but belong to no
    sample since their keys hold a dot; `overlooked_name` is the first of them.
    """

    # Objects, since an array of bytes would give every key the width of the longest.
    keys: NDArray[np.object_]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]
    reasons: dict[int, str] = field(default_factory=dict)
    damage: str = ""
    path: Path = Path()
    stamp: FileStamp = (0, 0)
    overlooked: int = 0
    overlooked_name: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, row: int) -> str:
        """Return a sample's key."""
        return os.fsdecode(self.keys[row])


def read_table(
    path: Path, *, image_entries: Sequence[str] = IMAGE_ENTRIES, label_entry: str = LABEL_ENTRY
) -> SampleTable:
    """Find the samples of an uncompressed tar; of several images of one sample the first named entry counts.

    Raises `OSError` where the file itself cannot be read.
    """
    # First, so that a change while it is read is noticed afterwards.
    stamp = file_stamp(os.stat(path))
    scan = scan_tar(path)
    wanted = {entry.lower(): rank for rank, entry in enumerate((label_entry, *image_entries))}
    rows = _Rows()
    # The scan has opened the file without waiting; what it gave members for can be opened.
    if scan.members:
        with path.open("rb", buffering=0) as file:
            _group(scan.members, wanted, rows, file.fileno())
    damage = scan.damage
    if damage:
        rows.drop_unfinished()
    if not damage and not rows.labels:
        damage = _nothing_found(image_entries, label_entry, rows.overlooked)
    return rows.table(path, damage=damage, stamp=stamp)


def file_stamp(status: os.stat_result) -> FileStamp:
    """Return what tells a file from another that took its place."""
    return status.st_size, status.st_mtime_ns


def lost_table(damage: str) -> SampleTable:
    """Return the table of a shard of which nothing can be read."""
    return _Rows().table(Path(), damage=damage, stamp=(0, 0))


class _Rows:
    """A table that grows."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.offsets: list[int] = []
        self.sizes: list[int] = []
        self.labels: list[int] = []
        self.reasons: dict[int, str] = {}
        self.overlooked: list[str] = []

    def drop_unfinished(self) -> None:
        """Forget the last sample if it lacks a part: that was lost with what followed."""
        if self.reasons.pop(len(self.labels) - 1, None):
            for column in (self.keys, self.offsets, self.sizes, self.labels):
                del column[-1]

    def table(self, path: Path, *, damage: str, stamp: FileStamp) -> SampleTable:
        return SampleTable(
            keys=np.array(self.keys, dtype=np.object_),
            offsets=np.array(self.offsets, dtype=np.int64),
            sizes=np.array(self.sizes, dtype=np.int64),
            labels=np.array(self.labels, dtype=np.int64),
            reasons=self.reasons,
            damage=damage,
            path=path,
            stamp=stamp,
            overlooked=len(self.overlooked),
            overlooked_name=next(iter(self.overlooked), ""),
        )


def _group(members: Sequence[Member], wanted: dict[str, int], rows: _Rows, descriptor: int) -> None:
    """Make samples of members that stand together; entry 0 is the label, the others images by preference."""
    current, parts, twice = "", dict[int, Member](), ""
    endings, dotted = tuple(f".{entry}" for entry in wanted), list[tuple[str, str]]()
    for member in members:
        name = member.name
        start = name.rfind("/") + 1
        dot = name.find(".", start)
        # A name that begins with its dot has no key: so are called the forks that macOS adds to archives.
        if dot <= start:
            continue
        rank = wanted.get(name[dot + 1 :].lower())
        if rank is None:
            if name.lower().endswith(endings):
                dotted.append((name[:dot], name))
            continue
        key = name[:dot]
        if key != current:
            if parts:
                _add(rows, current, parts, twice, wanted, descriptor)
            current, parts, twice = key, {}, ""
        if rank in parts:
            twice = name[dot + 1 :]
        parts[rank] = member
    if parts:
        _add(rows, current, parts, twice, wanted, descriptor)
    if dotted:
        # One more entry of a sample (0.mask.png beside 0.jpg) is nobody's loss.
        known = {os.fsdecode(key) for key in rows.keys}
        rows.overlooked = [name for key, name in dotted if key not in known]


def _add(
    rows: _Rows, key: str, parts: dict[int, Member], twice: str, wanted: dict[str, int], descriptor: int
) -> None:
    label, reason = -1, ""
    image = parts[min(rank for rank in parts if rank)] if len(parts) > (0 in parts) else None
    faulty = next(((rank, part) for rank, part in parts.items() if part.fault), None)
    if faulty:
        reason = f"its entry .{list(wanted)[faulty[0]]} cannot be read: {faulty[1].fault}"
    elif twice:
        reason = f"it has two entries .{twice}"
    elif image is None:
        reason = f"it has no image ({_entry_names(list(wanted)[1:], key)})"
    elif 0 not in parts:
        reason = f"it has no label ({_entry_names(list(wanted)[:1], key)})"
    else:
        label, reason = _label(parts[0], descriptor)
    if reason:
        rows.reasons[len(rows.labels)] = reason
    rows.keys.append(os.fsencode(key))
    rows.offsets.append(image.offset if image else 0)
    rows.sizes.append(image.size if image else 0)
    rows.labels.append(label)


def _entry_names(entries: Sequence[str], key: str) -> str:
    base = key.rpartition("/")[2]
    return " or ".join(f"{base}.{entry}" for entry in entries) + " beside it in the tar"


def _label(member: Member, descriptor: int) -> tuple[int, str]:
    """Return (the label, "") or (-1, what is wrong with it)."""
    if member.size > _MAX_LABEL_BYTES:
        return -1, f"its label is {member.size} bytes, not a short number"
    text = os.pread(descriptor, member.size, member.offset)
    number = _LABEL.fullmatch(text)
    if number is None:
        return -1, f"its label {text.decode('ascii', 'replace')!r} is not a number from 0"
    return int(number[1]), ""


def _nothing_found(image_entries: Sequence[str], label_entry: str, overlooked: Sequence[str]) -> str:
    what = f"it holds no sample with {' or '.join('.' + entry for entry in image_entries)} and .{label_entry}"
    if overlooked:
        what += f" ({overlooked[0]!r}: a key ends at its first dot, all that follows is the entry)"
    return what
