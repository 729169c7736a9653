"""Which part of a photograph is seen: the random crop of training, the centre of evaluation.

In training, a part of random area (a share of the image's, uniform within `scale`) and random aspect ratio
(log-uniform), anywhere in the image, mirrored half of the time: the "Inception crop", by the same law as
torchvision's RandomResizedCrop. But what is drawn is a function of a key and the sample's index, not of what
was drawn before. In evaluation, the centre after the short side was resized.

Only numbers here: no pixel is touched.

Source: Szegedy et al., "Going deeper with convolutions", CVPR 2015, section 6.
"""

import math
from typing import NamedTuple

import numpy as np

from petractl.data.randomness import random_words

_TRIES = 10
# Two words for each try, then top, left and flip; a power of two keeps the samples' words apart.
_WORDS = 2 * _TRIES + 3
_STRIDE = 32

MAX_ASPECT = 32
"""An image longer than this many times its short side is cut to it before it is resized as a whole."""


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def random_box(
    height: int,
    width: int,
    *,
    key: int,
    sample: int,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[Box, bool]:
    """Return the crop of an image of this size and whether it is flipped: a function of `key` and `sample`.

    `scale` bounds the crop's share of the area, `ratio` its width over its height.
    """
    words = random_words(key, np.arange(sample * _STRIDE, sample * _STRIDE + _WORDS))
    draws: list[float] = ((words >> np.uint64(11)) * 2.0**-53).tolist()
    top, left, flip = draws[-3:]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for place in range(0, 2 * _TRIES, 2):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[place])
        aspect = math.exp(low + (high - low) * draws[place + 1])
        rows, columns = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < rows <= height and 0 < columns <= width:
            box = Box(int(top * (height - rows + 1)), int(left * (width - columns + 1)), rows, columns)
            return box, flip < 0.5
    return _largest_box(height, width, ratio=ratio), flip < 0.5


def _largest_box(height: int, width: int, *, ratio: tuple[float, float]) -> Box:
    """Return the largest centred box within the ratios: what is taken when no try fits the image."""
    rows, columns = height, width
    if width < ratio[0] * height:
        rows = max(1, round(width / ratio[0]))
    elif width > ratio[1] * height:
        columns = round(height * ratio[1])
    return Box((height - rows) // 2, (width - columns) // 2, rows, columns)


def resized(height: int, width: int, *, short: int) -> tuple[int, int]:
    """Return (height, width) after the short side became `short`, the long one rounded down."""
    if width <= height:
        return int(short * height / width), short
    return short, int(short * width / height)


def centre_box(height: int, width: int, *, side: int) -> Box:
    """Return the centred square of `side`, which the image must not be smaller than."""
    assert min(height, width) >= side, (height, width, side)
    return Box(round((height - side) / 2), round((width - side) / 2), side, side)


def bounded_box(height: int, width: int) -> Box:
    """Return the whole image, or the centre of one so long that resizing it would take much memory."""
    rows, columns = min(height, MAX_ASPECT * width), min(width, MAX_ASPECT * height)
    return Box((height - rows) // 2, (width - columns) // 2, rows, columns)


def default_resize(side: int) -> int:
    """Return the short side before the centre crop of `side`: the usual 256 for 224, in proportion."""
    return round(side * 256 / 224)
