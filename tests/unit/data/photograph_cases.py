"""A small set of encoded images without files, for the tests of what reads them; pickles by its module."""

import io
import os
import signal
import time
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from petractl.data.dataset import PhotographData
from petractl.data.encoded import BadSample, Encoded
from petractl.data.pixels import Pixels
from petractl.data.values import DataInfo
from petractl.errors import DataError

SIDE = 16


class EncodedImages:
    """Images in shards of the given sizes; the label of each is its index.

    `bad` samples are damaged: "image" cannot be decoded, "label" is told by the store, "set" is the set's
    fault, "bug" is ours, and "killed" ends the process that reads it. `slow_s` is how long each takes.
    """

    def __init__(self, sizes: tuple[int, ...], *, bad: dict[int, str] | None = None, slow_s: float = 0.0):
        self.sizes = sizes
        self.classes = sum(sizes)
        self._bad = bad or {}
        self._slow_s = slow_s

    def read(self, index: int) -> Encoded:
        assert 0 <= index < self.classes
        time.sleep(self._slow_s)
        key, place, image = f"{index:04}", "train-0.tar", _jpeg(index)
        match self._bad.get(index, ""):
            case "image":
                image = image[: len(image) // 3]
            case "label":
                raise BadSample(place, key, "its label 'x' is not a number")
            case "set":
                raise DataError("the shard is gone", where=place, hint="put it back")
            case "bug":
                raise KeyError("a bug of ours")
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        return Encoded(key=key, image=image, label=index, place=place)

    def close(self) -> None:
        pass


@lru_cache(maxsize=512)
def _jpeg(index: int) -> bytes:
    generator = np.random.default_rng(index)
    height, width = generator.integers(SIDE, 2 * SIDE, 2)
    coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((int(width), int(height))).save(file, format="JPEG")
    return file.getvalue()


def photograph_data(
    *sizes: int, bad: dict[int, str] | None = None, val: int = 10, slow_s: float = 0.0, **options: Any
) -> PhotographData:
    """Return a set with training shards of these sizes."""
    train = EncodedImages(sizes, bad=bad, slow_s=slow_s)
    info = DataInfo("fake-photographs", train.classes, 3, SIDE, SIDE, train.classes, val)
    return PhotographData(
        info=info,
        train=train,
        val=EncodedImages((val,), bad=options.pop("bad_val", None)),
        pixels=Pixels(size=SIDE),
        seed=7,
        **options,
    )
