"""What each step from a JPEG to a training square costs, by library, and how far the pixels are apart.

Every way gets the same crops of the same images. The plain way is Pillow's: decode in full, crop, resize
(bilinear, antialiased). "away" is the mean absolute difference from it, in grey levels.
"""

import argparse
import io
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import photographs
import torch
from numpy.typing import NDArray
from PIL import Image

from petractl.data.crops import Box, random_box
from petractl.data.decoding import decode, image_size
from petractl.data.pixels import resample

Result = NDArray[np.uint8]
Way = Callable[[int], Result]


class Ways:
    """Each way to do a step for image `number`; squares are (3, size, size)."""

    def __init__(self, images: list[bytes], size: int) -> None:
        self._images = images
        self._size = size
        self._decoded = [decode(image) for image in images]
        self._opened = [Image.fromarray(pixels) for pixels in self._decoded]
        sizes = [image_size(image) for image in images]
        self._boxes = [
            random_box(*size, key=1, sample=number, scale=(0.08, 1.0))[0] for number, size in enumerate(sizes)
        ]

    def steps(self) -> dict[str, list[tuple[str, Way]]]:
        """Return the ways of each step; the first is the plain one."""
        return {
            "decode": [
                ("Pillow", lambda number: decode(self._images[number], decoder="pillow")),
                ("torchvision", lambda number: decode(self._images[number], decoder="torchvision")),
            ],
            "crop and resize": [
                ("Pillow, crop then resize", lambda number: self._plain(self._opened[number], number)),
                ("Pillow, resize(box=)", self._resized_in_box),
                ("torch", lambda number: self._by_torch(self._decoded[number], self._boxes[number])),
            ],
            "all of it": [
                ("Pillow", self._all_by_pillow),
                ("Pillow at 1/2, 1/4 or 1/8 where the crop allows it, torch", self._reduced),
                ("Pillow, torch", lambda number: self._all_by_torch(number, "pillow")),
                ("torchvision, torch", lambda number: self._all_by_torch(number, "torchvision")),
            ],
        }

    def _plain(self, image: Image.Image, number: int) -> Result:
        part = image.crop(_corners(self._boxes[number]))
        return _planes(part.resize((self._size, self._size), Image.Resampling.BILINEAR))

    def _resized_in_box(self, number: int) -> Result:
        corners = _corners(self._boxes[number])
        square = (self._size, self._size)
        return _planes(self._opened[number].resize(square, Image.Resampling.BILINEAR, box=corners))

    def _by_torch(self, pixels: Result, box: Box) -> Result:
        return resample(pixels, box, height=self._size, width=self._size)

    def _all_by_pillow(self, number: int) -> Result:
        return self._plain(Image.open(io.BytesIO(self._images[number])).convert("RGB"), number)

    def _all_by_torch(self, number: int, decoder: str) -> Result:
        return self._by_torch(decode(self._images[number], decoder=decoder), self._boxes[number])

    def _reduced(self, number: int) -> Result:
        box = self._boxes[number]
        enough = min(box.height, box.width) // self._size
        factor = max(step for step in (1, 2, 4, 8) if step <= max(1, enough))
        image = Image.open(io.BytesIO(self._images[number]))
        image.draft("RGB", (image.width // factor, image.height // factor))
        return self._by_torch(np.array(image.convert("RGB")), Box(*(round(side / factor) for side in box)))


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    # torchvision announces the end of its decoders at each call.
    warnings.simplefilter("ignore")
    if options.shards:
        images = photographs.of_shards(options.shards, options.images)
    else:
        images = photographs.made_up(options.images, height=options.height, width=options.width)
    for step, ways in Ways(images, options.size).steps().items():
        print(step)
        plain = ways[0][1]
        for name, way in ways:
            cost = timed(way, len(images), options.repeats)
            away = statistics.fmean(distance(plain(number), way(number)) for number in range(len(images)))
            print(f"  {name:58} {cost}   away {away:.4f}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", type=Path, help="folder of shards to take JPEGs from, not made-up ones")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def timed(way: Way, count: int, repeats: int) -> str:
    """Return the milliseconds per image, median and range over the repeats."""
    costs = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        for number in range(count):
            way(number)
        costs.append((time.perf_counter() - began) / count * 1e3)
    costs = costs[1:]
    return f"{statistics.median(costs):7.3f} ms ({min(costs):.3f} to {max(costs):.3f})"


def distance(one: Result, other: Result) -> float:
    return float(np.abs(one.astype(np.int16) - other).mean())


def _corners(box: Box) -> tuple[int, int, int, int]:
    return box.left, box.top, box.left + box.width, box.top + box.height


def _planes(image: Image.Image) -> Result:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


if __name__ == "__main__":
    main()
