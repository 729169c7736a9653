"""From uint8 samples to a float32 batch: random crop, random flip, normalisation, a whole batch at a time.

The crop pads with zeros (black) before normalising, and flips half of the images left to right: the
augmentation of He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2, which
PETRA's authors use as well. What is drawn for a sample depends on the key and the sample's index only. NumPy
rather than torch: it starts no threads of its own in the background workers that call this.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from petractl.data.randomness import random_words

_31_BITS = np.uint64((1 << 31) - 1)


@dataclass(frozen=True, slots=True)
class Preparation:
    """How a set's images are augmented and normalised.

    `pad` pixels of black on each side before cropping back to size (0: no crop); `flip` left to right, of
    half of the images; `mean` and `std` per channel, of pixels scaled to 0 ... 1.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int = 0
    flip: bool = False


@dataclass(frozen=True, slots=True)
class Crops:
    """Where the crop of each image (n,) begins in the padded one, and whether it is flipped."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    flipped: NDArray[np.bool_]


def draw_crops(key: int, samples: NDArray[np.int64], *, pad: int) -> Crops:
    """Return what is drawn for the images with indices `samples` (n,)."""
    words = random_words(key, samples)
    # The word's 62 low bits hold the two offsets, its highest bit the flip.
    offsets = np.uint64(2 * pad + 1)
    rows = ((words & _31_BITS) * offsets) >> np.uint64(31)
    columns = (((words >> np.uint64(31)) & _31_BITS) * offsets) >> np.uint64(31)
    return Crops(
        rows=rows.astype(np.int64),
        columns=columns.astype(np.int64),
        flipped=(words >> np.uint64(63)).astype(np.bool_),
    )


def augment(
    images: NDArray[np.uint8], *, key: int, samples: NDArray[np.int64], pad: int, flip: bool
) -> NDArray[np.uint8]:
    """Return images (n, c, h, w) cropped and flipped at random by `key` and the indices `samples` (n,)."""
    drawn = draw_crops(key, samples, pad=pad)
    if pad:
        images = _crop(images, drawn.rows, drawn.columns, pad=pad)
    if flip:
        images = images if pad else images.copy()
        images[drawn.flipped] = images[drawn.flipped, ..., ::-1]
    return images


def normalise(
    images: NDArray[np.uint8], *, mean: tuple[float, ...], std: tuple[float, ...]
) -> NDArray[np.float32]:
    """Return (image / 255 - mean) / std as new float32 images (n, c, h, w)."""
    centre = np.asarray(mean, dtype=np.float64).reshape(1, -1, 1, 1)
    spread = np.asarray(std, dtype=np.float64).reshape(1, -1, 1, 1)
    result = images.astype(np.float32, order="C")
    result *= (1.0 / (255.0 * spread)).astype(np.float32)
    result -= (centre / spread).astype(np.float32)
    return result


def _crop(
    images: NDArray[np.uint8], rows: NDArray[np.int64], columns: NDArray[np.int64], *, pad: int
) -> NDArray[np.uint8]:
    count, channels, height, width = images.shape
    padded = np.zeros((count, channels, height + 2 * pad, width + 2 * pad), dtype=np.uint8)
    padded[:, :, pad : pad + height, pad : pad + width] = images
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    cropped: NDArray[np.uint8] = windows[np.arange(count), :, rows, columns]
    return cropped
