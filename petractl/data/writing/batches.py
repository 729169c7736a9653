"""The pickled or binary batches of CIFAR and ImageNet32 as a set of encoded samples: every image a PNG.

PNG loses nothing, so shards made of them give the pixels of the batches. The batches are held in memory
(CIFAR 180 MB, ImageNet32 3.9 GB), since shuffling takes images from all of them.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

from petractl.data.cifar_batches import (
    CIFAR10,
    CIFAR100,
    CifarFormat,
    read_binary_batch,
    read_pickled_batch,
)
from petractl.data.encoded import Encoded
from petractl.data.imagenet32 import CLASSES as IMAGENET32_CLASSES
from petractl.data.imagenet32 import find_imagenet32, read_imagenet32_batch
from petractl.data.places import Split
from petractl.data.unpickle import read_pickle
from petractl.data.values import Samples
from petractl.errors import DataError

ReadBatch = Callable[[Path], Samples]

_NAME_FILES = {
    "cifar10": ("batches.meta", "label_names", "batches.meta.txt"),
    "cifar100": ("meta", "fine_label_names", "fine_label_names.txt"),
}


class Batches:
    """The images of batches, each encoded as it is read; see `EncodedSamples`."""

    def __init__(self, files: Sequence[Path], read: ReadBatch, *, classes: int) -> None:
        self.classes = classes
        self.places = tuple(map(str, files))
        self._names = [file.name.removesuffix(".bin") for file in files]
        self._batches = [read(file) for file in files]
        self.sizes = tuple(map(len, self._batches))
        self._ends = tuple(accumulate(self.sizes))

    def read(self, index: int) -> Encoded:
        """Return a sample, its image as PNG."""
        from PIL import Image

        number = bisect_right(self._ends, index)
        batch, row = self._batches[number], index - (self._ends[number] - self.sizes[number])
        file = io.BytesIO()
        Image.fromarray(batch.images[row].transpose(1, 2, 0)).save(file, format="PNG")
        key = f"{self._names[number]}_{row}"
        return Encoded(key, file.getvalue(), int(batch.labels[row]), self.places[number])

    def close(self) -> None:
        """Do nothing: no file is open."""


def find_cifar(folder: Path, split: Split) -> tuple[CifarFormat, list[Path]] | None:
    """Return which CIFAR set a folder holds and the batches of a split, None if none.

    Raises `DataError` where only some of the batches are there.
    """
    for kind in (CIFAR10, CIFAR100):
        names = kind.train_files if split == "train" else kind.val_files
        for base in (folder / kind.pickled_folder, folder / kind.binary_folder, folder):
            for suffix in ("", ".bin"):
                files = [base / (name + suffix) for name in names]
                missing = [file.name for file in files if not file.is_file()]
                if len(missing) == len(files):
                    continue
                if missing:
                    raise DataError(
                        f"{', '.join(missing)} missing beside the other batches of {kind.title}",
                        where=str(base),
                        hint="unpack the authors' archive again",
                    )
                return kind, files
    return None


def open_cifar(kind: CifarFormat, files: Sequence[Path]) -> Batches:
    """Read the batches of a split of a CIFAR set; raises `DataError`."""
    read = read_binary_batch if files[0].suffix == ".bin" else read_pickled_batch
    return Batches(files, partial(read, kind=kind), classes=kind.classes)


def cifar_class_names(kind: CifarFormat, folder: Path) -> tuple[str, ...]:
    """Return the names that lie beside the batches; none where they do not, or are not one per class."""
    pickled, key, text = _NAME_FILES[kind.name]
    names: list[str] = []
    if (folder / pickled).is_file():
        content = read_pickle(folder / pickled)
        table = {_text(key): value for key, value in content.items()} if isinstance(content, dict) else {}
        found = table.get(key)
        names = [_text(name) for name in found] if isinstance(found, list) else []
    elif (folder / text).is_file():
        names = (folder / text).read_text("utf-8", "replace").split()
    return tuple(names) if len(names) == kind.classes else ()


def open_imagenet32(folder: Path, split: Split) -> Batches | None:
    """Read the batches of a split of ImageNet32, None if there are none; raises `DataError`."""
    files = find_imagenet32(folder, split)
    return Batches(files, read_imagenet32_batch, classes=IMAGENET32_CLASSES) if files else None


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
