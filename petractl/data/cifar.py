"""CIFAR-10 and CIFAR-100 as named sets.

Augmentation is that of the paper: crop after padding by 4, flip, normalise. Means and standard deviations are
those of all pixels of the 50,000 training images, to four places.
"""

from functools import partial
from pathlib import Path

import numpy as np

from petractl.data.cifar_batches import CIFAR10, CIFAR100, SIDE, TRAIN_IMAGES, VAL_IMAGES, CifarFormat
from petractl.data.cifar_files import Part, find_split
from petractl.data.dataset import Data, Source
from petractl.data.download import SetMissing, fetch
from petractl.data.preparation import Preparation
from petractl.data.registry import register_dataset
from petractl.data.request import Request, require_fixed_shape
from petractl.data.values import UNKNOWN, DataInfo, Samples, joined

_CIFAR10_PREPARATION = Preparation(
    mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), pad=4, flip=True
)
_CIFAR100_PREPARATION = Preparation(
    mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762), pad=4, flip=True
)


@register_dataset
def cifar10(request: Request) -> Source:
    """CIFAR-10: 50,000 + 10,000 photographs, 32x32, 10 classes, from shards or the authors' batches."""
    return _source(CIFAR10, _CIFAR10_PREPARATION, request)


@register_dataset
def cifar100(request: Request) -> Source:
    """CIFAR-100: 50,000 + 10,000 photographs, 32x32, 100 classes, from shards or the authors' batches."""
    return _source(CIFAR100, _CIFAR100_PREPARATION, request)


def _source(kind: CifarFormat, preparation: Preparation, request: Request) -> Source:
    require_fixed_shape(request, _info(kind, train_samples=UNKNOWN, val_samples=UNKNOWN))

    def describe() -> DataInfo:
        try:
            train, val = _find(kind, request)
        except SetMissing:
            if not _may_download(request):
                raise
            return _info(kind, train_samples=0 if request.test_only else TRAIN_IMAGES, val_samples=VAL_IMAGES)
        return _info(kind, train_samples=_count(train), val_samples=_count(val))

    def load() -> Data:
        if _may_download(request) and not _is_there(kind, request):
            fetch(kind.name, into=Path("data") / kind.name, is_there=partial(_is_there, kind, request))
        train, val = (_load(parts) for parts in _find(kind, request))
        info = _info(kind, train_samples=len(train), val_samples=len(val))
        return Data(
            info=info,
            train=train,
            val=val,
            preparation=preparation,
            seed=request.seed,
            resident=request.resident,
        )

    return Source(describe=describe, load=load)


def _may_download(request: Request) -> bool:
    return request.download and not request.train and not request.val


def _is_there(kind: CifarFormat, request: Request) -> bool:
    try:
        _find(kind, request)
    except SetMissing:
        return False
    return True


def _find(kind: CifarFormat, request: Request) -> tuple[list[Part], list[Part]]:
    """Find both splits before either is read: a missing one should not cost the reading of the other."""
    train = [] if request.test_only else find_split(kind, "train", places=request.train)
    return train, find_split(kind, "val", places=request.val, train_places=request.train)


def _count(parts: list[Part]) -> int:
    counts = [part.count() for part in parts]
    return UNKNOWN if UNKNOWN in counts else sum(counts)


def _load(parts: list[Part]) -> Samples:
    if not parts:
        return Samples(np.zeros((0, 3, SIDE, SIDE), np.uint8), np.zeros(0, np.int64))
    return joined([part.load() for part in parts])


def _info(kind: CifarFormat, *, train_samples: int, val_samples: int) -> DataInfo:
    return DataInfo(
        name=kind.name,
        classes=kind.classes,
        channels=3,
        height=SIDE,
        width=SIDE,
        train_samples=train_samples,
        val_samples=val_samples,
    )
