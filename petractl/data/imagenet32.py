"""ImageNet32 as a named set: ImageNet-1k at 32x32, from the authors' pickled batches or from shards.

The authors' ten training batches and one of validation are pickles of a table with "data" (n rows of 3 x 32 x
32 bytes), "labels" (1 ... 1000, in the authors' order of the classes) and "mean"; they are read by the
unpickler that knows arrays only. All of it is kept in memory, 3.9 GB.

Source: Chrabaszcz, Loshchilov and Hutter, "A downsampled variant of ImageNet as an alternative to the CIFAR
datasets", 2017, arXiv 1707.08819.
"""

from pathlib import Path

import numpy as np

from petractl.data.dataset import Data, Source
from petractl.data.decode import decode_shard
from petractl.data.download import SetMissing
from petractl.data.places import Split, is_shard, listing, shards_in
from petractl.data.preparation import Preparation
from petractl.data.registry import register_dataset
from petractl.data.request import Request, require_fixed_shape
from petractl.data.shards import count_samples, expand_place
from petractl.data.unpickle import array_of, read_pickle
from petractl.data.values import UNKNOWN, DataInfo, Samples, joined
from petractl.errors import DataError

SIDE = 32
CLASSES = 1000
_PIXELS = 3 * SIDE * SIDE
_TRAIN_SAMPLES, _VAL_SAMPLES = 1_281_167, 50_000
_FILES: dict[Split, tuple[str, ...]] = {
    "train": tuple(f"train_data_batch_{number}" for number in range(1, 11)),
    "val": ("val_data",),
}
_SUBFOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("", "Imagenet32_train", "train"),
    "val": ("", "Imagenet32_val", "val"),
}
# Mean and standard deviation are those in use for ImageNet's photographs.
_PREPARATION = Preparation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), pad=4, flip=True)


@register_dataset
def imagenet32(request: Request) -> Source:
    """ImageNet-1k at 32x32: 1,281,167 + 50,000 photographs, 1,000 classes, from batches or shards."""
    require_fixed_shape(request, _info(UNKNOWN, UNKNOWN))

    def describe() -> DataInfo:
        train, val = _find_both(request)
        return _info(_count(train, _TRAIN_SAMPLES), _count(val, _VAL_SAMPLES))

    def load() -> Data:
        train, val = (_load(paths) for paths in _find_both(request))
        return Data(
            info=_info(len(train), len(val)),
            train=train,
            val=val,
            preparation=_PREPARATION,
            seed=request.seed,
            resident=request.resident,
        )

    return Source(describe=describe, load=load)


def find_imagenet32(folder: Path, split: Split) -> list[Path]:
    """Return the authors' batches of a split in a folder, or in one of the usual folders in it; [] if none.

    Raises `DataError` where only some of them are there.
    """
    for name in _SUBFOLDERS[split]:
        files = [folder / name / file for file in _FILES[split]]
        missing = [file.name for file in files if not file.is_file()]
        if len(missing) < len(files):
            if missing:
                raise DataError(
                    f"{', '.join(missing)} missing beside the other batches of ImageNet32",
                    where=str(files[0].parent),
                    hint="unpack the authors' archive again",
                )
            return files
    return []


def read_imagenet32_batch(path: Path) -> Samples:
    """Read a pickled batch, labels from 0; raises `DataError` for what is not one."""
    content = read_pickle(path)
    table = {_text(key): value for key, value in content.items()} if isinstance(content, dict) else {}
    missing = [name for name in ("data", "labels") if name not in table]
    if missing:
        raise _bad(path, f"it has no {' and no '.join(map(repr, missing))}")
    try:
        pixels, labels = array_of(table["data"]), array_of(table["labels"])
    except ValueError as error:
        raise _bad(path, str(error)) from error
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
        raise _bad(path, f"its data are {pixels.dtype} {pixels.shape}, not uint8 (n, {_PIXELS})")
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu":
        raise _bad(path, f"its labels are {labels.dtype} {labels.shape}, not {len(pixels)} integers")
    if not len(labels):
        raise _bad(path, "it holds no image")
    wrong = np.flatnonzero((labels < 1) | (labels > CLASSES))
    if len(wrong):
        raise _bad(path, f"image {wrong[0]} has label {labels[wrong[0]]}, outside 1 ... {CLASSES}")
    return Samples(images=pixels.reshape(-1, 3, SIDE, SIDE), labels=labels.astype(np.int64) - 1)


def _text(key: object) -> object:
    return key.decode("latin1") if isinstance(key, bytes) else key


def _find_both(request: Request) -> tuple[list[Path], list[Path]]:
    train = [] if request.test_only else _find("train", request.train)
    return train, _find("val", request.val, beside=request.train)


def _find(split: Split, places: tuple[str, ...], *, beside: tuple[str, ...] = ()) -> list[Path]:
    """Return a split's files, shards or batches: at its own places, else beside those of training."""
    where = f"data.{split}"
    if places:
        paths = [path for place in places for path in expand_place(place, where=where)]
        return [file for path in paths for file in _files_at(path, split, where=where)]
    folders = [path for place in beside if (path := Path(place).expanduser()).is_dir()]
    folder = folders[0] if folders else Path("data/imagenet32")
    # Shards that name no split may be the training set's: never validate on them unasked.
    return _in_folder(folder, split, named_only=True) or _raise_missing(folder, split, where=where)


def _files_at(path: Path, split: Split, *, where: str) -> list[Path]:
    if not path.is_dir():
        return [path]
    return _in_folder(path, split, named_only=False) or _raise_missing(path, split, where=where)


def _in_folder(folder: Path, split: Split, *, named_only: bool) -> list[Path]:
    if not folder.is_dir():
        return []
    return shards_in(folder, split, named_only=named_only) or find_imagenet32(folder, split)


def _raise_missing(folder: Path, split: Split, *, where: str) -> list[Path]:
    raise SetMissing(
        f"the {split} split of ImageNet32 is not in {folder}",
        where=where,
        hint=f"{listing(folder)}; download Imagenet32_{split}.zip (downsampled images, 32x32) from "
        "image-net.org, which asks for an account, and unpack it in data/imagenet32; or set "
        f"{where} to shards that `petractl shards build` made of it",
    )


def _count(paths: list[Path], whole: int) -> int:
    """Return the number of samples: of batches, as published, since reading one takes seconds."""
    if not any(is_shard(path) for path in paths):
        return whole if paths else 0
    counts = [count_samples(path) if is_shard(path) else UNKNOWN for path in paths]
    return UNKNOWN if UNKNOWN in counts else sum(counts)


def _load(paths: list[Path]) -> Samples:
    """Read a split into one array; batches one after the other, so that only one is held twice."""
    if any(is_shard(path) for path in paths):
        return joined([_load_file(path) for path in paths])
    # A batch holds its pixels uncompressed. What is allocated and not written to takes no memory.
    most = sum(path.stat().st_size // _PIXELS for path in paths)
    images = np.empty((most, 3, SIDE, SIDE), dtype=np.uint8)
    labels = [np.zeros(0, np.int64)]
    count = 0
    for path in paths:
        batch = read_imagenet32_batch(path)
        images[count : count + len(batch)] = batch.images
        labels.append(batch.labels)
        count += len(batch)
    return Samples(images=images[:count], labels=np.concatenate(labels))


def _load_file(path: Path) -> Samples:
    return decode_shard(path, side=SIDE, classes=CLASSES) if is_shard(path) else read_imagenet32_batch(path)


def _info(train_samples: int, val_samples: int) -> DataInfo:
    return DataInfo("imagenet32", CLASSES, 3, SIDE, SIDE, train_samples, val_samples)


def _bad(path: Path, what: str) -> DataError:
    return DataError(what, where=str(path), hint="get the set again from its authors")
