"""Proving a set of shards: everything that a run would stumble over, found before it, and all of it.

Of every shard: its bytes and checksum, its archive, the number of its samples, their labels and keys, files
that a run would pass over, and whether another shard is the same. Of every sample: its image, decoded as a
run would decode it. Threads do it, shard by shard and then in small lots of samples, so that one big shard
keeps all of them busy; faults are told in the order of the shards.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import numpy as np

from petractl.data.decoding import decode
from petractl.data.encoded import bad_size
from petractl.data.sample_table import SampleTable, read_table
from petractl.data.shard_cache import ShardCache
from petractl.data.shard_index import INDEX_NAME
from petractl.data.writing.existing import Fault, FoundShard, find_set
from petractl.data.writing.shard_file import sha256_of
from petractl.data.writing.watching import Unwatched, Watch
from petractl.errors import UserError

MOST_WORKERS = 32

_LOT = 128


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check found; `classes` 0: nowhere said, so that labels could not be compared with it."""

    shards: int
    samples: int
    classes: int
    faults: tuple[Fault, ...]


@dataclass(frozen=True, slots=True)
class OpenedShard:
    """A shard whose samples were found: the tar that they are in, and its table (None: it has none)."""

    found: FoundShard
    path: Path
    table: SampleTable | None
    faults: tuple[Fault, ...]

    @property
    def samples(self) -> int:
        """Number of samples, the bad ones too."""
        return len(self.table) if self.table else 0


def check_shards(
    place: str, *, classes: int = 0, workers: int = 0, watch: Watch | None = None
) -> CheckReport:
    """Check all shards at a place; `classes` 0 is what their index says.

    Raises `UserError` where there is no shard, or where `classes` is not what the index says.
    """
    watch = watch or Unwatched()
    found = find_set(place)
    if classes and found.classes and classes != found.classes:
        raise UserError(
            f"{classes}, but the index says {found.classes}", where="--classes", hint="leave it out"
        )
    classes = classes or found.classes
    with working(workers) as (pool, stop):
        check = _Check(classes, watch, stop)
        watch.begin("checking files", sum(shard.entry.samples for shard in found.shards if shard.entry))
        shards = list(pool.map(check.open, found.shards))
        twins = list(_same_files(shards, pool, check.sha256))
        watch.begin("decoding", sum(shard.samples for shard in shards))
        lots = [
            (shard, rows)
            for shard in shards
            for rows in np.array_split(np.arange(shard.samples), -(-shard.samples // _LOT) or 1)
        ]
        in_samples = list(pool.map(check.decode, lots))
    by_shard: dict[int, list[Fault]] = {}
    for shard, other in twins:
        what = f"it is the same as {other.found.place.text}, so that its samples count twice"
        by_shard.setdefault(id(shard), []).append(Fault(shard.found.place.text, "", what))
    for (shard, _), faults in zip(lots, in_samples, strict=True):
        by_shard.setdefault(id(shard), []).extend(faults)
    ordered = [fault for shard in shards for fault in (*shard.faults, *by_shard.get(id(shard), ()))]
    samples = sum(shard.samples for shard in shards)
    return CheckReport(len(shards), samples, classes, (*found.faults, *ordered))


@contextmanager
def working(workers: int) -> Iterator[tuple[ThreadPoolExecutor, Event]]:
    """Give threads, and an event that is set when their work is to end early."""
    stop = Event()
    pool = ThreadPoolExecutor(workers or min(MOST_WORKERS, len(os.sched_getaffinity(0))))
    try:
        yield pool, stop
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def open_shard(found: FoundShard) -> OpenedShard:
    """Find the samples of a shard; what keeps from it is told in the faults."""
    place = found.place.text
    try:
        path = ShardCache().local(found.place, entry=found.entry)
        table = read_table(path)
    except UserError as error:
        return OpenedShard(found, Path(place), None, (Fault(place, "", error.what),))
    except OSError as error:
        what = f"it cannot be read: {error.strerror or error}"
        return OpenedShard(found, Path(place), None, (Fault(place, "", what),))
    faults = (Fault(place, "", table.damage),) if table.damage else ()
    return OpenedShard(found, path, table, faults)


class _Check:
    """The pieces of one check, each for any thread."""

    def __init__(self, classes: int, watch: Watch, stop: Event) -> None:
        self._classes = classes
        self._watch = watch
        self._stop = stop
        self._digests: dict[str, str] = {}

    def open(self, found: FoundShard) -> OpenedShard:
        """Compare a shard with its index, and find its samples."""
        opened = open_shard(found)
        place = found.place.text
        faults = [*opened.faults, *(Fault(place, "", what) for what in self._compare(opened))]
        faults += [Fault(place, key, "its key stands in the shard more than once") for key in _twice(opened)]
        faults += [Fault(place, key, reason) for key, reason in _overlooked(opened)]
        self._watch.advance(found.entry.samples if found.entry else 0)
        return OpenedShard(found, opened.path, opened.table, tuple(faults))

    def _compare(self, shard: OpenedShard) -> Iterator[str]:
        entry, place = shard.found.entry, shard.found.place
        if entry is None:
            return
        try:
            # What was fetched from a URL has been compared as it was.
            if place.kind == "file" and entry.bytes is not None:
                size = Path(place.text).stat().st_size
                if size != entry.bytes:
                    yield f"it has {size} bytes, and {INDEX_NAME} says {entry.bytes}"
            if place.kind == "file" and entry.sha256:
                digest = self.sha256(Path(place.text))
                if digest != entry.sha256:
                    yield f"its SHA-256 is {digest[:12]}..., and {INDEX_NAME} says {entry.sha256[:12]}..."
        except OSError as error:
            yield f"it cannot be read: {error.strerror or error}"
        if shard.table and len(shard.table) != entry.samples:
            yield f"it has {len(shard.table)} samples, and {INDEX_NAME} says {entry.samples}"

    def sha256(self, path: Path) -> str:
        """Return a file's checksum; it is read once."""
        if str(path) not in self._digests:
            self._digests[str(path)] = sha256_of(path, stopped=self._check_stop)
        return self._digests[str(path)]

    def decode(self, lot: tuple[OpenedShard, Sequence[int]]) -> list[Fault]:
        """Decode some samples of a shard."""
        shard, rows = lot
        table = shard.table
        if table is None or not len(rows):
            return []
        place, faults = shard.found.place.text, list[Fault]()
        with shard.path.open("rb", buffering=0) as file:
            for row in map(int, rows):
                self._check_stop()
                reasons = self._reasons(shard, table, row, file.fileno())
                faults += [Fault(place, table.key(row), reason) for reason in reasons]
                self._watch.advance(1)
        return faults

    def _reasons(self, shard: OpenedShard, table: SampleTable, row: int, descriptor: int) -> Iterator[str]:
        reason = table.reasons.get(row) or bad_size(int(table.sizes[row]))
        if reason:
            yield reason
            return
        label = int(table.labels[row])
        if self._classes and label >= self._classes:
            yield f"its label {label} is not a number 0 ... {self._classes - 1}"
        index = shard.found.index
        try:
            image = os.pread(descriptor, int(table.sizes[row]), int(table.offsets[row]))
            height, width, _ = decode(image).shape
        except OSError as error:
            yield f"it cannot be read: {error.strerror or error}"
        except ValueError as error:
            yield str(error)
        else:
            if index and index.image_size not in (None, (height, width)):
                said_height, said_width = index.image_size or (0, 0)
                yield f"its image is {width}x{height}, and {INDEX_NAME} says {said_width}x{said_height}"

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise InterruptedError


def _twice(shard: OpenedShard) -> list[str]:
    """Return the keys that several samples of a shard have: WebDataset makes one sample of neighbours."""
    if shard.table is None or not len(shard.table):
        return []
    _, first, counts = np.unique(shard.table.keys, return_index=True, return_counts=True)
    return [shard.table.key(int(row)) for row in np.sort(first[counts > 1])]


def _overlooked(shard: OpenedShard) -> Iterator[tuple[str, str]]:
    """Yield what looks like samples and is none to a run: WebDataset's keys end at the first dot."""
    table = shard.table
    if table is not None and table.overlooked:
        others = table.overlooked - 1
        more = f", and {others} more such file{'s' * (others > 1)}" if others else ""
        yield table.overlooked_name, f"a run passes it over, since its key would hold a dot{more}"


def _same_files(
    shards: Sequence[OpenedShard], pool: ThreadPoolExecutor, sha256: Callable[[Path], str]
) -> Iterator[tuple[OpenedShard, OpenedShard]]:
    """Yield each shard that has the bytes of an earlier one, and that one. Only equal sizes are compared."""
    by_size: dict[int, list[OpenedShard]] = {}
    for shard in shards:
        if shard.table is not None:
            by_size.setdefault(shard.table.stamp[0], []).append(shard)
    suspects = [shard for same in by_size.values() if len(same) > 1 for shard in same]
    first: dict[str, OpenedShard] = {}
    for shard, digest in zip(suspects, pool.map(sha256, [shard.path for shard in suspects]), strict=True):
        other = first.setdefault(digest, shard)
        if other is not shard:
            yield shard, other
