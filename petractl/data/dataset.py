"""A data set that is open, and what a named set has to say to be opened.

A named set is a builder function that turns a `Request` (what the recipe's [data] section asks for) into a
`Source`: two functions, one that describes the set cheaply and one that opens it. What is open is `Data`, a
set whose pixels are in memory, or `PhotographData`, one that is decoded as it is read; loaders are made of
both in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from petractl.data.decoded import decoded
from petractl.data.encoded import EncodedSamples, OnError
from petractl.data.loader import EvalLoader, Preparer, TrainLoader
from petractl.data.memory import MemorySamples
from petractl.data.normalisation import Normalisation
from petractl.data.order import TrainOrder
from petractl.data.photographs import Crop, Photographs
from petractl.data.pixels import PHOTOGRAPH_MEAN, PHOTOGRAPH_STD, Pixels
from petractl.data.preparation import Preparation
from petractl.data.request import (
    DEFAULT_FAKE_SAMPLES,
    Request,
    require_fixed_shape,
    require_no_places,
)
from petractl.data.resident import ResidentSamples
from petractl.data.shuffle import ShardShuffle
from petractl.data.skips import DEFAULT_LIMIT, Skips
from petractl.data.values import DataInfo, Samples
from petractl.data.worker_processes import prepared_by_processes, start_server, usable_cores

if TYPE_CHECKING:
    import torch

__all__ = [
    "DEFAULT_FAKE_SAMPLES",
    "AnyData",
    "Data",
    "PhotographData",
    "Request",
    "Source",
    "require_fixed_shape",
    "require_no_places",
]

PHOTOGRAPH_NORMALISATION = Normalisation(PHOTOGRAPH_MEAN, PHOTOGRAPH_STD)

Split = Literal["train", "val"]


@dataclass(frozen=True, slots=True)
class Source:
    """A named set before it is read. Both functions raise `DataError` for what is missing or damaged."""

    describe: Callable[[], DataInfo]
    load: Callable[[], AnyData]


@dataclass(frozen=True, slots=True)
class Data:
    """A set in memory: what it is, its two splits, and how its images become batches.

    `resident`: the loaders keep the images on the training device and make the batches there.
    """

    info: DataInfo
    train: Samples
    val: Samples
    preparation: Preparation
    seed: int = 0
    resident: bool = False

    @property
    def decodes(self) -> bool:
        """Tell whether images are decoded as they are read, so that worker processes help."""
        return False

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
        device: torch.device | None = None,
    ) -> TrainLoader:
        """Return the loader of the training split, or of one replica's share of it.

        `device` is where a resident set lives (None: the CPU). Raises `DataError` for a batch size that does
        not suit the number of samples.
        """
        order = TrainOrder(
            len(self.train),
            batch_size=batch_size,
            seed=self.seed,
            steps_per_epoch=steps_per_epoch,
            drop_last=drop_last,
            replica=replica,
            replicas=replicas,
        )
        return TrainLoader(
            self._preparer(self.train, augment=augment, device=device),
            order=order,
            workers=0 if self.resident else workers,
            slow_hint=self._slow_hint(workers),
        )

    def eval_loader(
        self,
        *,
        batch_size: int,
        split: Split = "val",
        workers: int = 0,
        replica: int = 0,
        replicas: int = 1,
        device: torch.device | None = None,
    ) -> EvalLoader:
        """Return a loader that visits every sample of `split` once, in order, without augmentation.

        With replicas: every sample of this one's share.
        """
        samples = self.val if split == "val" else self.train
        return EvalLoader(
            self._preparer(samples, augment=False, device=device),
            samples=len(samples),
            batch_size=batch_size,
            workers=0 if self.resident else workers,
            replica=replica,
            replicas=replicas,
        )

    def _preparer(self, samples: Samples, *, augment: bool, device: torch.device | None) -> Preparer:
        how = self.preparation
        if not self.resident:
            return MemorySamples(samples, preparation=how, seed=self.seed, augment=augment)
        import torch

        place = device or torch.device("cpu")
        return ResidentSamples(samples, preparation=how, device=place, seed=self.seed, augment=augment)

    def _slow_hint(self, workers: int) -> str:
        if self.resident:
            return "the images are on the device already: set a larger data.batch_size"
        return f"set data.resident = true (images stay on the device), or data.workers = {2 * workers or 1}"


@dataclass(frozen=True, slots=True)
class PhotographData:
    """A set of encoded images, decoded as they are read: where it is, and how an image becomes pixels.

    `train` may be missing where only the other split is wanted. `shuffle_buffer` is how far a sample may move
    from its shard's place (0: anywhere). Bad samples stop the run or are left out, up to `max_skipped`
    different ones.
    """

    info: DataInfo
    train: EncodedSamples | None
    val: EncodedSamples
    pixels: Pixels
    normalisation: Normalisation = PHOTOGRAPH_NORMALISATION
    crop: Crop = "random-resized"
    pad: int = 4
    seed: int = 0
    shuffle_buffer: int = 10_000
    on_error: OnError = "stop"
    max_skipped: int = DEFAULT_LIMIT
    _skips: Skips = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # One count for all loaders of the set.
        object.__setattr__(self, "_skips", Skips(self.max_skipped))

    @property
    def decodes(self) -> bool:
        """Tell whether images are decoded as they are read, so that worker processes help."""
        return True

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
        device: torch.device | None = None,
    ) -> TrainLoader:
        """Return the loader of the training split, or of one replica's share of it.

        With a CUDA `device`, batches lie in pinned memory. Raises `DataError` for a batch size that does not
        suit the number of samples.
        """
        train = self._split("train")
        if workers:
            start_server()
        order = TrainOrder(
            ShardShuffle(train.sizes, buffer=self.shuffle_buffer),
            batch_size=batch_size,
            seed=self.seed,
            steps_per_epoch=steps_per_epoch,
            drop_last=drop_last,
            replica=replica,
            replicas=replicas,
        )
        return TrainLoader(
            self._photographs(train, training=True, augment=augment),
            order=order,
            workers=workers,
            ahead=partial(prepared_by_processes, pin=_is_cuda(device)),
            skips=self._skips,
            slow_hint=self._slow_hint(workers),
        )

    def eval_loader(
        self,
        *,
        batch_size: int,
        split: Split = "val",
        workers: int = 0,
        replica: int = 0,
        replicas: int = 1,
        device: torch.device | None = None,
    ) -> EvalLoader:
        """Return a loader that visits every sample of `split` once, in order, without augmentation.

        With replicas: every sample of this one's share.
        """
        samples = self._split(split)
        return EvalLoader(
            self._photographs(samples, training=False),
            samples=sum(samples.sizes),
            batch_size=batch_size,
            workers=workers,
            replica=replica,
            replicas=replicas,
            ahead=partial(prepared_by_processes, pin=_is_cuda(device)),
            skips=self._skips,
        )

    def in_memory(self, *, workers: int | None = None, resident: bool = False) -> Data:
        """Decode every image once, scaled and cropped as for evaluation, and return the set in memory.

        Its crop is then that of "pad". `workers` processes help (None: as many as suit the cores). Raises
        `DataError` for a bad sample that is not to be left out, and where the memory is too small.
        """
        decode = partial(
            decoded,
            prepare=partial(self._photographs, training=False),
            size=self.pixels.size,
            workers=workers,
            skips=self._skips,
        )
        how = self.normalisation
        return Data(
            info=self.info,
            train=decode(self.train),
            val=decode(self.val),
            preparation=Preparation(mean=how.mean, std=how.std, pad=self.pad, flip=True),
            seed=self.seed,
            resident=resident,
        )

    def _split(self, split: Split) -> EncodedSamples:
        samples = self.val if split == "val" else self.train
        assert samples is not None, "the training split was not opened"
        return samples

    def _photographs(self, samples: EncodedSamples, *, training: bool, augment: bool = True) -> Photographs:
        return Photographs(
            samples,
            pixels=self.pixels,
            normalisation=self.normalisation,
            crop=self.crop,
            pad=self.pad,
            training=training,
            augment=augment,
            seed=self.seed,
            on_error=self.on_error,
        )

    def _slow_hint(self, workers: int) -> str:
        cores = usable_cores()
        if workers < cores - 1:
            return (
                f"set data.workers = {min(2 * workers or 2, cores)} (of {cores} cores), or data.resident = "
                "true where the set fits in memory"
            )
        smaller = "store smaller images (`petractl shards build --resize`)"
        faster = "" if self.pixels.decoder == "auto" else ', set data.decoder = "auto"'
        return f"{smaller}{faster}, or set data.resident = true where the set fits in memory"


AnyData = Data | PhotographData
"""A set that is open."""


def _is_cuda(device: torch.device | None) -> bool:
    return device is not None and device.type == "cuda"
