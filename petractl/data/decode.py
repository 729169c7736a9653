"""From a shard of small PNG images to arrays: images decoded, labels read and checked.

Pillow, by its PNG reader only, so that nothing but a PNG is ever parsed; the size is checked before a pixel
is decoded, so that a small file cannot claim the memory of a huge image. Pillow lets go of the interpreter
lock while it inflates: a few threads help a little.
"""

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from petractl.data.shards import RawSample, read_shard
from petractl.data.values import Samples
from petractl.errors import DataError

_CHUNK = 256
_MAX_THREADS = 4
_EIGHT_BIT_MODES = ("RGB", "RGBA", "L", "LA", "P", "1")


def decode_shard(path: Path, *, side: int, classes: int) -> Samples:
    """Return a shard's samples, images uint8 (n, 3, side, side) with grey and palette turned into RGB.

    Raises `DataError` with shard, key and reason: no sample, an image that is not a PNG of side x side
    pixels, a label that is not a number below `classes`, or a damaged shard.
    """
    raw = list(read_shard(path))
    if not raw:
        raise DataError(
            "no sample in it",
            where=str(path),
            hint="each sample needs {key}.png and {key}.cls in the tar",
        )
    labels = np.array([_label(sample, classes=classes, shard=path) for sample in raw], dtype=np.int64)
    return Samples(images=_decode_images(raw, side=side, shard=path), labels=labels)


def _label(sample: RawSample, *, classes: int, shard: Path) -> int:
    text = sample.label.decode("ascii", errors="replace").strip()
    if text.isdecimal() and int(text) < classes:
        return int(text)
    raise DataError(
        f"sample {sample.key!r}: its label {text[:40]!r} is not a number 0 ... {classes - 1}",
        where=str(shard),
        hint="check that data.name names the set that the shards hold",
    )


def _decode_images(samples: Sequence[RawSample], *, side: int, shard: Path) -> NDArray[np.uint8]:
    images = np.empty((len(samples), 3, side, side), dtype=np.uint8)
    decode = partial(_decode_chunk, samples, images, shard=shard)
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        # list() raises the error of the first bad chunk.
        list(pool.map(decode, range(0, len(samples), _CHUNK)))
    return images


def _decode_chunk(
    samples: Sequence[RawSample], images: NDArray[np.uint8], first: int, *, shard: Path
) -> None:
    side = images.shape[-1]
    for place in range(first, min(first + _CHUNK, len(samples))):
        sample = samples[place]
        try:
            images[place] = _decode(sample.image, side=side).transpose(2, 0, 1)
        # Pillow raises OSError, SyntaxError, ValueError, struct.error ... for a damaged file.
        except Exception as error:
            raise DataError(
                f"sample {sample.key!r}: cannot decode its image: {error}",
                where=str(shard),
                hint="leave the sample out, or make the shard again",
            ) from error


def _decode(data: bytes, *, side: int) -> NDArray[np.uint8]:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
    except UnidentifiedImageError:
        raise ValueError(f"its {len(data)} bytes are not a PNG") from None
    if image.size != (side, side):
        raise ValueError(f"it is {image.width}x{image.height}, not {side}x{side}")
    if image.mode not in _EIGHT_BIT_MODES:
        raise ValueError(f"its pixel format {image.mode} is not 8 bits per channel")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
