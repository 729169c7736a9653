"""Random numbers that are a function of what they are for, not of what was drawn before.

The order of a pass and the crop of a sample must not depend on the number of workers, the batch size or the
place where a run was resumed. A generator with a state would make them; so every number here is a hash of a
key (seed, purpose, pass ...) and a counter (the sample's index): SplitMix64 started at the key and read at
the counter's place. Plain 64-bit integer arithmetic gives the same numbers on every machine and with every
version of NumPy.

Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


class Purpose(IntEnum):
    """What random numbers are for, so that no two uses share a stream."""

    ORDER = 1
    AUGMENTATION = 2
    SPLIT = 3
    FAKE_PATTERN = 4
    FAKE_NOISE = 5
    SHARD_ORDER = 6


def stream_key(purpose: Purpose, *parts: int) -> int:
    """Return the 64-bit key of the stream for `purpose` and integers (a seed, a pass) in that order."""
    key = int(purpose)
    for part in parts:
        key = _mix((key + _GOLDEN + _mix((part + _GOLDEN) & _MASK)) & _MASK)
    return key


def random_words(key: int, counters: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return one uniform 64-bit word per counter (any shape, values >= 0), independent of the others."""
    words = counters.astype(np.uint64)
    words += np.uint64(1)
    words *= np.uint64(_GOLDEN)
    words += np.uint64(key)
    words ^= words >> np.uint64(30)
    words *= np.uint64(_MIX_1)
    words ^= words >> np.uint64(27)
    words *= np.uint64(_MIX_2)
    words ^= words >> np.uint64(31)
    return words


def random_order(key: int, length: int) -> NDArray[np.int64]:
    """Return a permutation of 0 ... length-1, int64: the indices sorted by their random words."""
    return np.argsort(random_words(key, np.arange(length)), kind="stable").astype(np.int64, copy=False)


def _mix(word: int) -> int:
    word = ((word ^ (word >> 30)) * _MIX_1) & _MASK
    word = ((word ^ (word >> 27)) * _MIX_2) & _MASK
    return word ^ (word >> 31)
