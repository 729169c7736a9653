"""Which sample goes into which shard, decided before anything is written.

The samples are put in one random order (a set sorted by classes would teach one class at a time: a loader's
buffer mixes only neighbours), and the order is cut into shards of equal number. Both are functions of the
seed and the source, so that shards can be written in any order, by any number of workers, and later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from petractl.data.encoded import BadSample
from petractl.data.randomness import Purpose, random_order, stream_key
from petractl.data.writing.destination import shard_prefix
from petractl.data.writing.recoding import Recoding
from petractl.data.writing.sources import SMALL_SIDE, SourceSplit
from petractl.errors import UserError

SAMPLES_PER_SHARD = 1_000
SMALL_SAMPLES_PER_SHARD = 10_000

_TRIED = 500
_TAR_BYTES = 4 * 512
"""Of a sample, at most: two headers, the label's block, and what fills up the image's last block."""
_TAR_END_BYTES = 10_240


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One shard to be written: its name, and which samples of which split, in order."""

    name: str
    source: SourceSplit
    rows: NDArray[np.int64]


def default_samples_per_shard(sources: Sequence[SourceSplit], recoding: Recoding) -> int:
    """Return how many samples a shard holds where nobody says: many where the images are thumbnails."""
    is_small = all(source.is_small for source in sources) or 0 < recoding.resize <= SMALL_SIDE
    return SMALL_SAMPLES_PER_SHARD if is_small else SAMPLES_PER_SHARD


def samples_within(
    max_bytes: int, sources: Sequence[SourceSplit], recoding: Recoding, *, seed: int | None
) -> int:
    """Return the most samples that fit into a shard, by the sizes of some of them spread over the set.

    Six standard deviations are left free, so that a shard of samples in random order does not exceed it.
    Raises `UserError` where not even one fits.
    """
    sizes = np.array([size for source in sources for size in _some_sizes(source, recoding, seed)], float)
    if not len(sizes):
        raise UserError("none of the samples looked at can be read", where="--max-mb")
    mean, spread = float(sizes.mean()), float(sizes.std())
    room = max(max_bytes - _TAR_END_BYTES, 0)
    # The root of n * mean + 6 * sqrt(n) * spread = room.
    root = (-6 * spread + math.sqrt(36 * spread**2 + 4 * mean * room)) / (2 * mean)
    if root < 1:
        raise UserError(
            f"a sample has about {mean / 1e6:.2g} MB: not one is sure to fit",
            where="--max-mb",
            hint="give more",
        )
    return int(root**2)


def plan_shards(
    sources: Sequence[SourceSplit], *, name: str, samples_per_shard: int, seed: int | None
) -> list[ShardPlan]:
    """Return the shards of all splits; `seed` None keeps the source's order."""
    plans = []
    for source in sources:
        prefix = shard_prefix(name, source.split)
        order = sample_order(source.count, seed)
        count = -(-source.count // samples_per_shard)
        # Even shares: the last shard is not left with a handful.
        plans += [
            ShardPlan(f"{prefix}-{number:06}.tar", source, rows)
            for number, rows in enumerate(np.array_split(order, count))
        ]
    return plans


def sample_order(count: int, seed: int | None) -> NDArray[np.int64]:
    """Return the order in which samples are laid into shards."""
    if seed is None:
        return np.arange(count, dtype=np.int64)
    return random_order(stream_key(Purpose.SHARD_ORDER, seed, count), count)


def _some_sizes(source: SourceSplit, recoding: Recoding, seed: int | None) -> Iterator[int]:
    order = sample_order(source.count, 0 if seed is None else seed)
    for row in order[:_TRIED]:
        try:
            yield len(recoding(source.samples.read(int(row)).image).content) + _TAR_BYTES
        # Whether it stops the build is decided when its shard is written.
        except (BadSample, ValueError):
            continue
