"""A data set that is open, and what a named set has to say to be opened.

A named set is a builder function that turns a `Request` (what the recipe's [data] section asks for) into a
`Source`: two functions, one that describes the set cheaply and one that reads it into memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from petractl.data.loader import EvalLoader, TrainLoader
from petractl.data.preparation import Preparation
from petractl.data.values import DataInfo, Samples
from petractl.errors import DataError

DEFAULT_FAKE_SAMPLES = 1024


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a named set: places (none: the set's own), the seed, and sizes (0: the set's own).

    With `test_only` a set that lies in files leaves its training files alone, and has no training samples.
    """

    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    seed: int = 0
    fake_samples: int = DEFAULT_FAKE_SAMPLES
    image_size: int = 0
    channels: int = 0
    classes: int = 0
    test_only: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """A named set before it is read. Both functions raise `DataError` for what is missing or damaged."""

    describe: Callable[[], DataInfo]
    load: Callable[[], Data]


@dataclass(frozen=True, slots=True)
class Data:
    """A set in memory: what it is, its two splits, and how its images become batches."""

    info: DataInfo
    train: Samples
    val: Samples
    preparation: Preparation
    seed: int = 0

    def train_loader(
        self,
        *,
        batch_size: int,
        steps_per_epoch: int = 0,
        augment: bool = True,
        drop_last: bool = False,
        workers: int = 0,
        replica: int = 0,
        replicas: int = 1,
    ) -> TrainLoader:
        """Return the loader of the training split, or of one replica's share of it.

        Raises `DataError` for a batch size that does not suit the number of samples.
        """
        return TrainLoader(
            self.train,
            preparation=self.preparation,
            batch_size=batch_size,
            seed=self.seed,
            steps_per_epoch=steps_per_epoch,
            augment=augment,
            drop_last=drop_last,
            workers=workers,
            replica=replica,
            replicas=replicas,
        )

    def eval_loader(
        self,
        *,
        batch_size: int,
        split: Literal["train", "val"] = "val",
        workers: int = 0,
        replica: int = 0,
        replicas: int = 1,
    ) -> EvalLoader:
        """Return a loader that visits every sample of `split` once, in order, without augmentation.

        With replicas: every sample of this one's share.
        """
        return EvalLoader(
            self.val if split == "val" else self.train,
            preparation=self.preparation,
            batch_size=batch_size,
            workers=workers,
            replica=replica,
            replicas=replicas,
        )


def require_fixed_shape(request: Request, info: DataInfo) -> None:
    """Raise `DataError` where `request` asks a set of real images for a shape that is not its own."""
    asked = {
        "image_size": (request.image_size, info.height),
        "channels": (request.channels, info.channels),
        "classes": (request.classes, info.classes),
    }
    for key, (value, own) in asked.items():
        if value not in (0, own):
            raise DataError(
                f"{info.name} has {key} {own}, not {value}",
                where=f"data.{key}",
                hint=f"leave data.{key} out (only the set 'fake' can be given one)",
            )
    if request.fake_samples != DEFAULT_FAKE_SAMPLES:
        raise DataError(
            f"{info.name} is not made up: its number of samples is its own",
            where="data.fake_samples",
            hint="leave data.fake_samples out (only the set 'fake' can be given one)",
        )


def require_no_places(request: Request, name: str) -> None:
    """Raise `DataError` where `request` names files for a set that has none."""
    for key, places in (("train", request.train), ("val", request.val)):
        if places:
            raise DataError(
                f"{name} reads no files, so {', '.join(map(repr, places))} would be ignored",
                where=f"data.{key}",
                hint=f"leave data.{key} out, or name another set in data.name",
            )
