"""From an encoded photograph to the square of pixels that a net sees.

In training a random crop is resized to the square and flipped half of the time; in evaluation the short side
is resized and the centre taken (see `petractl.data.crops`). The pixels stay uint8: a quarter of the bytes to
move, normalised only where the net is.

Resampling is bilinear with antialiasing, by torch's kernel for uint8: it is what torchvision's transforms v2
use on tensors, and faster than Pillow's (whose pixels differ from it by rounding only). JPEG is decoded at
its full size: decoding at a half or a quarter changes what the crop still shows, by 3 to 7 grey levels, and
saves time on images of several megapixels only. benchmarks/data has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from petractl.data.crops import Box, bounded_box, centre_box, default_resize, random_box, resized
from petractl.data.decoding import ALL_FORMATS, DECODERS, decode

PHOTOGRAPH_MEAN = (0.485, 0.456, 0.406)
PHOTOGRAPH_STD = (0.229, 0.224, 0.225)
"""Mean and standard deviation per channel of ImageNet's pixels, scaled to 0 ... 1."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """What is done to each photograph of a set.

    `size` is the side of the square; `resize` the short side before the centre crop of evaluation (0:
    `default_resize`); `scale` bounds the share of the area of a training crop. `decoder` and `formats` are
    those of `petractl.data.decoding.decode`.
    """

    size: int = 224
    resize: int = 0
    scale: tuple[float, float] = (0.08, 1.0)
    decoder: str = "auto"
    formats: tuple[str, ...] = ALL_FORMATS

    def __post_init__(self) -> None:
        assert self.size >= 1, self.size
        assert self.resize == 0 or self.resize >= self.size, (self.resize, self.size)
        assert 0 < self.scale[0] <= self.scale[1] <= 1, self.scale
        assert self.decoder in DECODERS, self.decoder

    def train(self, image: bytes, *, key: int, sample: int) -> NDArray[np.uint8]:
        """Return the random crop of `image` for `key` and index `sample`, uint8 (3, size, size), contiguous.

        Raises `ValueError` with the reason where the image cannot be decoded.
        """
        pixels = decode(image, decoder=self.decoder, formats=self.formats)
        height, width, _ = pixels.shape
        box, flip = random_box(height, width, key=key, sample=sample, scale=self.scale)
        return resample(pixels, box, height=self.size, width=self.size, flip=flip)

    def eval(self, image: bytes) -> NDArray[np.uint8]:
        """Return the centre of `image`, resized, uint8 (3, size, size), contiguous.

        Raises `ValueError` with the reason where the image cannot be decoded.
        """
        pixels = decode(image, decoder=self.decoder, formats=self.formats)
        part = bounded_box(*pixels.shape[:2])
        height, width = resized(part.height, part.width, short=self.resize or default_resize(self.size))
        whole = resample(pixels, part, height=height, width=width)
        top, left, rows, columns = centre_box(height, width, side=self.size)
        return np.ascontiguousarray(whole[:, top : top + rows, left : left + columns])


def resample(
    pixels: NDArray[np.uint8], box: Box, *, height: int, width: int, flip: bool = False
) -> NDArray[np.uint8]:
    """Return the part `box` of an image (h, w, 3) resized, uint8 (3, height, width), contiguous.

    With `flip` its left and right are exchanged.
    """
    # Imported here because a set can be named and described without torch, which takes seconds to import.
    import torch
    from torch.nn.functional import interpolate

    top, left, rows, columns = box
    part = torch.from_numpy(pixels[top : top + rows, left : left + columns]).permute(2, 0, 1)
    if (rows, columns) != (height, width):
        part = interpolate(
            part[None], size=(height, width), mode="bilinear", align_corners=False, antialias=True
        )[0]
    # NumPy would mirror byte by byte: thirty times slower.
    part = part.flip(-1) if flip else part
    result: NDArray[np.uint8] = part.contiguous().numpy()
    return result
