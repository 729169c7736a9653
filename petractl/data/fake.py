"""Made-up images of any size, for benchmarks and smoke tests that need no files.

An image is the pattern of its class (a coarse grid of grey levels per channel) plus noise of the same
strength, so that a net can learn it and a loss that does not fall means a bug. All of it is a function of the
seed.
"""

import math

import numpy as np
from numpy.typing import NDArray

from petractl.data.dataset import Data, Source
from petractl.data.preparation import Preparation
from petractl.data.randomness import Purpose, random_words, stream_key
from petractl.data.registry import register_dataset
from petractl.data.request import Request, require_no_places
from petractl.data.values import DataInfo, Samples
from petractl.errors import DataError

_GRID = 4
_MIN_SAMPLES = 4
_MAX_BYTES = 2**40


@register_dataset
def fake(request: Request) -> Source:
    """Random images with class-dependent means, any size (image_size, channels, classes, fake_samples)."""
    require_no_places(request, "fake")
    if request.fake_samples < _MIN_SAMPLES:
        raise DataError(
            f"{request.fake_samples} samples are too few: a quarter as many again are made to validate with",
            where="data.fake_samples",
            hint=f"set data.fake_samples to at least {_MIN_SAMPLES}",
        )
    side = request.image_size or 32
    info = DataInfo(
        name="fake",
        classes=request.classes or 10,
        channels=request.channels or 3,
        height=side,
        width=side,
        train_samples=request.fake_samples,
        val_samples=request.fake_samples // 4,
    )
    _check_size(info)
    return Source(describe=lambda: info, load=lambda: _load(info, request))


def _check_size(info: DataInfo) -> None:
    count, shape = info.train_samples + info.val_samples, (info.channels, info.height, info.width)
    size = count * math.prod(shape)
    if size > _MAX_BYTES:
        raise DataError(
            f"{count:,} images of {' x '.join(map(str, shape))} are {size / 2**30:,.0f} GiB, "
            f"more than the {_MAX_BYTES >> 30:,} that are made up",
            where="data.fake_samples",
            hint="set data.fake_samples, data.image_size or data.channels lower",
        )


def _load(info: DataInfo, request: Request) -> Data:
    seed = request.seed
    return Data(
        info=info,
        train=_samples(info, seed, split=0, count=info.train_samples),
        val=_samples(info, seed, split=1, count=info.val_samples),
        preparation=Preparation(mean=(0.5,) * info.channels, std=(0.25,) * info.channels),
        seed=seed,
        resident=request.resident,
    )


def _samples(info: DataInfo, seed: int, *, split: int, count: int) -> Samples:
    labels = np.arange(count, dtype=np.int64) % info.classes
    images = _noise(seed, split=split, shape=(count, info.channels, info.height, info.width))
    rows = np.arange(info.height) * _GRID // info.height
    columns = np.arange(info.width) * _GRID // info.width
    images += _patterns(info, seed)[labels][:, :, rows[:, None], columns]
    return Samples(images=images, labels=labels)


def _patterns(info: DataInfo, seed: int) -> NDArray[np.uint8]:
    """Return levels 0 ... 127 (classes, channels, grid, grid), the same for both splits."""
    # Higher classes have no images: sample i is of class i.
    shape = (min(info.classes, info.train_samples), info.channels, _GRID, _GRID)
    words = random_words(stream_key(Purpose.FAKE_PATTERN, seed), np.arange(np.prod(shape)))
    return (words >> np.uint64(57)).astype(np.uint8).reshape(shape)


def _noise(seed: int, *, split: int, shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Return noise 0 ... 127 of `shape`, eight pixels from each random word."""
    size = int(np.prod(shape))
    words = random_words(stream_key(Purpose.FAKE_NOISE, seed, split), np.arange(-(-size // 8)))
    pixels = words.astype("<u8", copy=False).view(np.uint8)[:size].reshape(shape)
    return pixels >> np.uint8(1)
