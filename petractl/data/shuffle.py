"""In which order a pass visits the samples: a permutation that is a function of a key, not of what was drawn.

A set in memory is shuffled whole. A set in shards lies on a disk or behind a network, where neighbours are
cheap and leaps are dear; reading it through a shuffle buffer keeps only a few shards alive at a time, but the
order of a buffer with a state can be neither computed nor resumed. `ShardShuffle` does what such a buffer
does by arithmetic: the shards in random order, then every sample moved by at most `buffer` places, namely
sorted by its place plus a random number between 0 and `buffer`.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from petractl.data.randomness import Purpose, random_order, random_words, stream_key

# Places below 2^39 are left room beside the fraction, which is far more samples than a disk holds.
_FRACTION_BITS = np.uint64(24)


class Shuffle(Protocol):
    """How a pass over `samples` samples is shuffled."""

    @property
    def samples(self) -> int:
        """Number of samples of a pass."""
        ...

    def order(self, key: int) -> NDArray[np.int64]:
        """Return the permutation of 0 ... samples - 1 that belongs to `key`."""
        ...


class WholeShuffle:
    """Every order of the whole set is as likely as any other."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def order(self, key: int) -> NDArray[np.int64]:
        """Return the permutation of `key`."""
        return random_order(key, self.samples)


class ShardShuffle:
    """Shards in random order, and every sample at most `buffer` places from where that puts it.

    `sizes` are the samples of each shard; sample indices count through them in that order. A buffer of 0, or
    one that holds the whole set, shuffles it whole; so does a set of one shard (a folder of images counts as
    one), where no shard could be left for later.
    """

    def __init__(self, sizes: Sequence[int], *, buffer: int) -> None:
        assert buffer >= 0, buffer
        assert all(size >= 0 for size in sizes), "a shard cannot hold less than nothing"
        self.samples = int(sum(sizes))
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._buffer = buffer
        self.is_whole = buffer == 0 or buffer >= self.samples or len(sizes) <= 1

    def order(self, key: int) -> NDArray[np.int64]:
        """Return the permutation of `key`."""
        if self.is_whole:
            return random_order(key, self.samples)
        samples = self._by_shard(key)
        fractions = random_words(key, samples) >> (np.uint64(64) - _FRACTION_BITS)
        places = np.arange(self.samples, dtype=np.uint64) << _FRACTION_BITS
        return samples[np.argsort(places + fractions * np.uint64(self._buffer), kind="stable")]

    def _by_shard(self, key: int) -> NDArray[np.int64]:
        """Return all samples, the shards in random order, each in its own."""
        shards = random_order(stream_key(Purpose.SHARD_ORDER, key), len(self._sizes))
        sizes = self._sizes[shards]
        firsts = (np.cumsum(self._sizes) - self._sizes)[shards]
        begins = np.cumsum(sizes) - sizes
        steps = np.arange(self.samples, dtype=np.int64) - np.repeat(begins, sizes)
        return np.repeat(firsts, sizes) + steps
