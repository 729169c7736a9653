"""Fashion-MNIST as a named set, from the four files of its authors, gzipped or not.

The files have the IDX format: two zero bytes, the type of the numbers (8: bytes), the number of dimensions,
the length of each as a big-endian 32-bit integer, then the numbers, the last dimension the fastest.

Source: Xiao, Rasul and Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking machine learning
algorithms", 2017, arXiv 1708.07747.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from petractl.data.dataset import Data, Source
from petractl.data.download import SetMissing, fetch
from petractl.data.places import Split, listing
from petractl.data.preparation import Preparation
from petractl.data.registry import register_dataset
from petractl.data.request import Request, require_fixed_shape
from petractl.data.values import DataInfo, Samples
from petractl.errors import DataError

_SIDE = 28
_CLASSES = 10
_TRAIN_SAMPLES, _VAL_SAMPLES = 60_000, 10_000
_PREFIX: dict[Split, str] = {"train": "train", "val": "t10k"}
_SUBFOLDERS = ("", "raw", "FashionMNIST/raw")
_PLACE = Path("data/fashion-mnist")
# Mean and standard deviation of all pixels of the 60,000 training images.
_PREPARATION = Preparation(mean=(0.2860,), std=(0.3530,), pad=4, flip=True)


@register_dataset
def fashion_mnist(request: Request) -> Source:
    """Fashion-MNIST: 60,000 + 10,000 grey pictures of clothes, 28x28, 10 classes, from the authors' files."""
    require_fixed_shape(request, _info(0, 0))
    may_download = request.download and not request.train and not request.val

    def is_there() -> bool:
        try:
            _find(request)
        except SetMissing:
            return False
        return True

    def describe() -> DataInfo:
        if may_download and not is_there():
            return _info(0 if request.test_only else _TRAIN_SAMPLES, _VAL_SAMPLES)
        train, val = _find(request)
        return _info(0 if train is None else _count(train[1]), _count(val[1]))

    def load() -> Data:
        if may_download and not is_there():
            fetch("fashion-mnist", into=_PLACE, is_there=is_there)
        train, val = _find(request)
        splits = (_read_split(*train) if train else _nothing()), _read_split(*val)
        return Data(
            info=_info(len(splits[0]), len(splits[1])),
            train=splits[0],
            val=splits[1],
            preparation=_PREPARATION,
            seed=request.seed,
            resident=request.resident,
        )

    return Source(describe=describe, load=load)


def read_idx(path: Path, *, dimensions: int) -> NDArray[np.uint8]:
    """Return the bytes of an IDX file, gzipped or not; raises `DataError` for what is not one."""
    data = _content(path)
    header = 4 + 4 * dimensions
    if len(data) < header or data[:4] != bytes((0, 0, 8, dimensions)):
        raise _bad(path, f"it is not an IDX file of bytes with {dimensions} dimensions")
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, header, 4)]
    if len(data) - header != math.prod(shape):
        raise _bad(path, f"it says {' x '.join(map(str, shape))}, but holds {len(data) - header} bytes")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _content(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise _bad(path, f"it cannot be read: {error}") from error


def _find(request: Request) -> tuple[tuple[Path, Path] | None, tuple[Path, Path]]:
    train = None if request.test_only else _find_split("train", request.train)
    return train, _find_split("val", request.val or request.train)


def _find_split(split: Split, places: tuple[str, ...]) -> tuple[Path, Path]:
    """Return the files of the images and the labels of a split."""
    where = f"data.{split}"
    if len(places) > 1:
        raise DataError(f"fashion-mnist lies in one folder, not in {len(places)} places", where=where)
    folder = Path(places[0]).expanduser() if places else _PLACE
    for base in (folder / name for name in _SUBFOLDERS):
        for suffix in ("", ".gz"):
            images = base / f"{_PREFIX[split]}-images-idx3-ubyte{suffix}"
            labels = base / f"{_PREFIX[split]}-labels-idx1-ubyte{suffix}"
            if images.is_file() and labels.is_file():
                return images, labels
    names = f"{_PREFIX[split]}-images-idx3-ubyte.gz and {_PREFIX[split]}-labels-idx1-ubyte.gz"
    raise SetMissing(
        f"the {split} split of Fashion-MNIST is not in {folder}",
        where=where,
        hint=f"{listing(folder)}; set data.download = true, or download {names} from the repository "
        f"zalandoresearch/fashion-mnist on GitHub and put them in {_PLACE}",
    )


def _count(labels: Path) -> int:
    return len(read_idx(labels, dimensions=1))


def _read_split(image_file: Path, label_file: Path) -> Samples:
    images, labels = read_idx(image_file, dimensions=3), read_idx(label_file, dimensions=1)
    if images.shape != (len(labels), _SIDE, _SIDE):
        raise _bad(image_file, f"its images are {images.shape}, not {(len(labels), _SIDE, _SIDE)}")
    if len(labels) == 0 or labels.max() >= _CLASSES:
        raise _bad(label_file, f"its labels are not {_CLASSES} classes from 0")
    return Samples(images=images[:, None], labels=labels.astype(np.int64))


def _nothing() -> Samples:
    return Samples(np.zeros((0, 1, _SIDE, _SIDE), np.uint8), np.zeros(0, np.int64))


def _info(train_samples: int, val_samples: int) -> DataInfo:
    return DataInfo("fashion-mnist", _CLASSES, 1, _SIDE, _SIDE, train_samples, val_samples)


def _bad(path: Path, what: str) -> DataError:
    return DataError(what, where=str(path), hint="get the set again from its authors")
