"""What a set of shards holds, by the headers of its archives and the labels; images are not decoded.

The headers of a million samples are read in seconds. Image sizes stand in the images, which on a slow disk
takes as long as reading the set: where the index does not say them, some images, spread evenly, are looked
at, and the report says of how many it speaks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from petractl.data.decoding import image_size
from petractl.data.encoded import bad_size
from petractl.data.sample_table import SampleTable
from petractl.data.writing.checking import OpenedShard, open_shard, working
from petractl.data.writing.existing import Fault, find_set
from petractl.data.writing.watching import Unwatched, Watch

SIZES_LOOKED_AT = 1000

_NUMBER = re.compile(r"[-_.]?\d*\.(tar|tgz|tar\.gz|tar\.zst)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ImageSizes:
    """(Height, width) of the images with the fewest, the middle and the most pixels of `looked_at`.

    `looked_at` 0: all have the one size that the index says.
    """

    smallest: tuple[int, int]
    median: tuple[int, int]
    largest: tuple[int, int]
    looked_at: int


@dataclass(frozen=True, slots=True)
class Part:
    """The shards whose names differ in the number only, and what they hold together.

    `per_class` are the good samples of each label from 0.
    """

    name: str
    shards: tuple[str, ...]
    samples: int
    bytes: int
    sizes: ImageSizes | None
    per_class: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """What is at a place; `classes` 0: no index says it. `faults` are what was met on the way, not all."""

    parts: tuple[Part, ...]
    classes: int
    class_names: tuple[str, ...]
    faults: tuple[Fault, ...]


def survey_shards(place: str, *, workers: int = 0, watch: Watch | None = None) -> Survey:
    """Look through all shards at a place; raises `UserError` where there is none."""
    watch = watch or Unwatched()
    found = find_set(place)
    watch.begin("reading headers", sum(shard.entry.samples for shard in found.shards if shard.entry))
    with working(workers) as (pool, _):
        shards = []
        for shard in pool.map(open_shard, found.shards):
            shards.append(shard)
            watch.advance(shard.samples)
    several = len({shard.found.place.folder for shard in shards}) > 1
    parts = groupby(sorted(shards, key=_part_of), key=_part_of)
    return Survey(
        parts=tuple(
            _part(f"{folder.rpartition('/')[2]}/{name}" if several else name, list(members))
            for (folder, name), members in parts
        ),
        classes=found.classes,
        class_names=found.class_names,
        faults=(*found.faults, *(fault for shard in shards for fault in _faults(shard))),
    )


def _part_of(shard: OpenedShard) -> tuple[str, str]:
    name = shard.found.place.name
    return shard.found.place.folder, _NUMBER.sub("", name) or name


def _part(name: str, shards: Sequence[OpenedShard]) -> Part:
    tables = [shard.table for shard in shards if shard.table is not None]
    labels = np.concatenate([np.zeros(0, np.int64), *(table.labels for table in tables)])
    # A label of a billion is damage, not a reason to count a billion classes.
    labels = labels[(labels >= 0) & (labels < 2**20)]
    return Part(
        name=name,
        shards=tuple(shard.found.place.text for shard in shards),
        samples=sum(map(len, tables)),
        bytes=sum(_bytes(shard) for shard in shards),
        sizes=_sizes(shards),
        per_class=tuple(np.bincount(labels).tolist()),
    )


def _bytes(shard: OpenedShard) -> int:
    try:
        return os.stat(shard.path).st_size
    except OSError:
        return 0


def _sizes(shards: Sequence[OpenedShard]) -> ImageSizes | None:
    said = {shard.found.index.image_size if shard.found.index else None for shard in shards}
    size = said.pop() if len(said) == 1 else None
    if size is not None:
        return ImageSizes(size, size, size, looked_at=0)
    total = sum(shard.samples for shard in shards)
    chosen = np.unique(np.linspace(0, total - 1, min(total, SIZES_LOOKED_AT)).astype(np.int64))
    found: list[tuple[int, int]] = []
    start = 0
    for shard in shards:
        rows = chosen[(chosen >= start) & (chosen < start + shard.samples)] - start
        start += shard.samples
        if shard.table is not None and len(rows):
            found += _sizes_in(shard, shard.table, rows)
    found.sort(key=lambda size: (size[0] * size[1], size))
    if not found:
        return None
    return ImageSizes(found[0], found[len(found) // 2], found[-1], looked_at=len(found))


def _sizes_in(shard: OpenedShard, table: SampleTable, rows: NDArray[np.int64]) -> list[tuple[int, int]]:
    found = []
    with shard.path.open("rb", buffering=0) as file:
        for row in map(int, rows):
            if row in table.reasons or bad_size(int(table.sizes[row])):
                continue
            try:
                image = os.pread(file.fileno(), int(table.sizes[row]), int(table.offsets[row]))
                found.append(image_size(image))
            except (OSError, ValueError):
                continue
    return found


def _faults(shard: OpenedShard) -> list[Fault]:
    bad = len(shard.table.reasons) if shard.table else 0
    told = list(shard.faults)
    if bad:
        what = "1 sample is" if bad == 1 else f"{bad} samples are"
        told.append(Fault(shard.found.place.text, "", f"{what} damaged"))
    return told
