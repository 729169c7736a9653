"""The files in which the CIFAR sets were published: pickled batches of Python 2, and raw binary batches.

Both hold one row per image, 3 x 32 x 32 bytes in the order channel, row, column. The binary rows open with
one label byte (CIFAR-10) or two (CIFAR-100: the coarse label, then the fine one).

Source: Krizhevsky, "Learning multiple layers of features from tiny images", technical report, 2009; the
formats stand on the CIFAR page of the University of Toronto.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from petractl.data.unpickle import array_of, read_pickle
from petractl.data.values import Samples
from petractl.errors import DataError

SIDE = 32
TRAIN_IMAGES, VAL_IMAGES = 50_000, 10_000
_PIXELS = 3 * SIDE * SIDE


@dataclass(frozen=True, slots=True)
class CifarFormat:
    """What differs between the two sets: names, classes and files (binary ones end in .bin as well)."""

    name: str
    title: str
    classes: int
    label_name: str
    label_bytes: int
    pickled_folder: str
    binary_folder: str
    train_files: tuple[str, ...]
    val_files: tuple[str, ...]


CIFAR10 = CifarFormat(
    name="cifar10",
    title="CIFAR-10",
    classes=10,
    label_name="labels",
    label_bytes=1,
    pickled_folder="cifar-10-batches-py",
    binary_folder="cifar-10-batches-bin",
    train_files=tuple(f"data_batch_{number}" for number in range(1, 6)),
    val_files=("test_batch",),
)
CIFAR100 = CifarFormat(
    name="cifar100",
    title="CIFAR-100",
    classes=100,
    label_name="fine_labels",
    label_bytes=2,
    pickled_folder="cifar-100-python",
    binary_folder="cifar-100-binary",
    train_files=("train",),
    val_files=("test",),
)


def read_pickled_batch(path: Path, *, kind: CifarFormat) -> Samples:
    """Read a pickled batch; raises `DataError` for what is not one."""
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise _bad(path, f"it holds a {type(content).__name__}, not a table of data and labels")
    # The original is a pickle of Python 2, whose names are read as bytes; one written anew has strings.
    table = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
    missing = [name for name in ("data", kind.label_name) if name not in table]
    if missing:
        raise _bad(path, f"it has no {' and no '.join(map(repr, missing))}")
    try:
        pixels, labels = array_of(table["data"]), array_of(table[kind.label_name])
    except ValueError as error:
        raise _bad(path, str(error)) from error
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
        raise _bad(path, f"its data are {pixels.dtype} {pixels.shape}, not uint8 (n, {_PIXELS})")
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu":
        raise _bad(path, f"its labels are {labels.dtype} {labels.shape}, not {len(pixels)} integers")
    return _samples(path, pixels, labels, kind=kind)


def read_binary_batch(path: Path, *, kind: CifarFormat) -> Samples:
    """Read a binary batch; raises `DataError` for what is not one."""
    count = count_binary_batch(path, kind=kind)
    rows = np.fromfile(path, dtype=np.uint8).reshape(count, kind.label_bytes + _PIXELS)
    return _samples(path, rows[:, kind.label_bytes :], rows[:, kind.label_bytes - 1], kind=kind)


def count_pickled_batch(path: Path, *, kind: CifarFormat) -> int:
    """Return the number of images, for which it must be read; raises `DataError` as reading does."""
    return len(read_pickled_batch(path, kind=kind))


def count_binary_batch(path: Path, *, kind: CifarFormat) -> int:
    """Return the number of images by the file's size; raises `DataError` where it is not whole rows."""
    size, row = path.stat().st_size, kind.label_bytes + _PIXELS
    if size == 0 or size % row:
        raise _bad(path, f"its {size} bytes are not whole rows of {row} bytes")
    return size // row


def _samples(
    path: Path, pixels: NDArray[np.uint8], labels: NDArray[np.integer], *, kind: CifarFormat
) -> Samples:
    if len(labels) == 0:
        raise _bad(path, "it holds no image")
    wrong = np.flatnonzero((labels < 0) | (labels >= kind.classes))
    if len(wrong):
        first = int(wrong[0])
        raise _bad(path, f"image {first} has label {labels[first]}, outside 0 ... {kind.classes - 1}")
    images = np.ascontiguousarray(pixels).reshape(-1, 3, SIDE, SIDE)
    return Samples(images=images, labels=labels.astype(np.int64))


def _bad(path: Path, what: str) -> DataError:
    return DataError(what, where=str(path), hint="get the set again from its authors")
