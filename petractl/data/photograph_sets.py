"""Sets of photographs, of any size and number: ImageNet, and any set in shards or in folders of classes.

A split is looked for in this order: what its key names; for validation, beside a training folder;
`data/<name>`. In a folder that is shards, a folder for the split, or (where its own key names it) one folder
per class. Images are decoded as they are needed and cropped at a random size; small ones of one size (CIFAR's
or ImageNet32's in shards) are cropped after padding, as the paper does. With `resident` all are decoded once
and kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from petractl.data.dataset import AnyData, PhotographData, Source
from petractl.data.decoding import formats_of
from petractl.data.download import SetMissing
from petractl.data.image_folder import class_folders
from petractl.data.photograph_places import (
    FoundSplit,
    SplitFacts,
    describe_split,
    find_split,
    open_split,
    warn_of_shared,
)
from petractl.data.pixels import Pixels
from petractl.data.places import Split
from petractl.data.registry import register_dataset
from petractl.data.request import Request, require_real
from petractl.data.values import DataInfo
from petractl.errors import DataError

IMAGENET_CLASSES = 1000
DEFAULT_SIDE = 224
PADDED_SIDE = 64
"""The largest side of images that are cropped after padding rather than at a random size."""

_IMAGENET_REMEDY = (
    "download ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from image-net.org, which asks for an "
    "account, and unpack them, one folder per class, in data/imagenet/train and data/imagenet/val; or set "
    "data.train and data.val to shards: those that `petractl shards build` makes of these folders, or "
    "'timm/imagenet-1k-wds' of Hugging Face"
)
_SHARDS_REMEDY = (
    "set data.train and data.val to shards (path, pattern, folder, URL) or folders of classes; "
    "`petractl shards build` makes shards"
)


@dataclass(frozen=True, slots=True)
class _Known:
    """A split, and what is known of it."""

    found: FoundSplit
    facts: SplitFacts


@register_dataset
def imagenet(request: Request) -> Source:
    """ImageNet-1k: 1,281,167 + 50,000 photographs, 1,000 classes, from shards or one folder per class."""
    asked = replace(request, classes=request.classes or IMAGENET_CLASSES)
    return _source("imagenet", asked, remedy=_IMAGENET_REMEDY)


@register_dataset
def shards(request: Request) -> Source:
    """Any photographs in WebDataset shards or one folder per class; classes stated or from their index."""
    return _source("shards", request, remedy=_SHARDS_REMEDY)


def _source(name: str, request: Request, *, remedy: str) -> Source:
    require_real(request, name)
    if request.channels not in (0, 3):
        raise DataError(
            f"photographs become RGB, 3 channels, not {request.channels}",
            where="data.channels",
            hint="leave data.channels out (only the set 'fake' can be given it)",
        )

    def find(split: Split, class_names: Sequence[str] = ()) -> _Known:
        found = find_split(name, split, request, remedy=remedy)
        return _Known(found, describe_split(found, request, class_names=class_names))

    def names_elsewhere() -> Sequence[str]:
        # A test set alone has the training set's numbers, if that is still there.
        with contextlib.suppress(DataError, OSError):
            found = find_split(name, "train", request, remedy=remedy)
            return class_folders(found.folder) if found.folder else describe_split(found, request).class_names
        return ()

    def describe() -> tuple[DataInfo, _Known | None, _Known]:
        # Both are found before either is described: that can take a while.
        try:
            found = [find_split(name, split, request, remedy=remedy) for split in _splits(request)]
        except SetMissing:
            # A wrong training set is told first: the test set may be missed only because of it.
            if request.train and not request.test_only:
                find("train")
            raise
        train = None if request.test_only else find("train")
        facts = train.facts if train else None
        names = () if found[-1].folder is None else facts.class_names if facts else names_elsewhere()
        val = find("val", names)
        return _info(name, request, facts, val.facts, elsewhere=lambda: find("train").facts), train, val

    def load() -> AnyData:
        info, train, val = describe()
        if train:
            warn_of_shared(train.found, val.found, request)
        return _open(replace(request, classes=info.classes), info, train, val)

    return Source(describe=lambda: describe()[0], load=load)


def _splits(request: Request) -> tuple[Split, ...]:
    return ("val",) if request.test_only else ("train", "val")


def _info(
    name: str,
    request: Request,
    train: SplitFacts | None,
    val: SplitFacts,
    *,
    elsewhere: Callable[[], SplitFacts],
) -> DataInfo:
    _check_classes(request, train, val)
    classes = request.classes or (train.classes if train else 0) or val.classes
    if not classes and train is None:
        # A test set with no index of its own has the classes of the training set, if that is still there.
        with contextlib.suppress(DataError):
            classes = elsewhere().classes
    if not classes:
        raise DataError(
            "nothing says how many classes the shards have",
            where="data.classes",
            hint="set data.classes; shards made by `petractl shards build` have an index.json that says it",
        )
    side = _side(request, val)
    if 0 < request.resize < side:
        raise DataError(
            f"{request.resize} is less than the side of what is cut out of it, {side}",
            where="data.resize",
            hint=f"give at least {side}, or 0 for the usual margin",
        )
    samples = 0 if train is None else train.samples
    return DataInfo(name, classes, 3, side, side, samples, val.samples)


def _check_classes(request: Request, train: SplitFacts | None, val: SplitFacts) -> None:
    for split, facts in (("train", train), ("val", val)):
        if facts and facts.classes > request.classes > 0:
            raise DataError(
                f"the {split} split has {facts.classes} classes, more than {request.classes}",
                where="data.classes",
                hint=f'set data.classes = {facts.classes}, and data.name = "shards" where it is not ImageNet',
            )
    if train and train.class_names and val.class_names and train.class_names != val.class_names:
        different = sorted(set(train.class_names) ^ set(val.class_names))
        shown = ", ".join(different[:5]) + (" ..." if len(different) > 5 else "")
        what = f"only one of them has {shown}" if different else "their order differs"
        raise DataError(
            f"the classes of train and val are not the same: {what}",
            where="data.val",
            hint="both need the same classes, since a label is the place of its class among them",
        )


def _own_side(val: SplitFacts) -> int:
    """Return the side of images that are all of one size, 0 where that is not known."""
    return min(val.image_size) if val.image_size else 0


def _is_padded(request: Request, val: SplitFacts) -> bool:
    """Whether images are cropped after padding; by what is known of the test set, which is always there."""
    if request.crop != "auto":
        return request.crop == "pad"
    return request.resident or 0 < _own_side(val) <= PADDED_SIDE


def _side(request: Request, val: SplitFacts) -> int:
    own = _own_side(val) if _is_padded(request, val) else 0
    return request.image_size or own or DEFAULT_SIDE


def _open(request: Request, info: DataInfo, known_train: _Known | None, known_val: _Known) -> AnyData:
    train = open_split(known_train.found, known_train.facts, request) if known_train else None
    val = open_split(known_val.found, known_val.facts, request)
    counted = replace(info, train_samples=sum(train.sizes) if train else 0, val_samples=sum(val.sizes))
    # Images that have the right size already are not to lose their edges to the margin of photographs.
    is_own_size = known_val.facts.image_size == (info.height, info.width)
    data = PhotographData(
        info=counted,
        train=train,
        val=val,
        pixels=Pixels(
            size=info.height,
            resize=request.resize or (info.height if is_own_size else 0),
            scale=(request.crop_scale, 1.0),
            decoder=request.decoder,
            formats=formats_of(entry.rpartition(".")[2] for entry in request.image_entries),
        ),
        crop="pad" if _is_padded(request, known_val.facts) else "random-resized",
        seed=request.seed,
        shuffle_buffer=request.shuffle_buffer,
        on_error=request.on_error,
        max_skipped=request.max_skipped,
    )
    return data.in_memory(resident=True) if request.resident else data
