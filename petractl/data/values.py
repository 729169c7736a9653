"""The values that pass between a data set, a loader and the engine.

Images rest in memory as uint8 and are turned into normalised float32 one batch at a time, so that CIFAR takes
150 MB and not 600; those that are decoded as they are read stay uint8 until they are where the net is.
Nothing here imports torch: naming and describing a set should not cost its import.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from petractl.data.encoded import BadSample
    from petractl.data.normalisation import Normalisation

UNKNOWN = -1
"""A number of samples that is not known without reading the whole set."""


@dataclass(frozen=True, slots=True)
class DataInfo:
    """What a model needs to know of a data set; a number of samples may be `UNKNOWN` when only described."""

    name: str
    classes: int
    channels: int
    height: int
    width: int
    train_samples: int
    val_samples: int


@dataclass(frozen=True, slots=True)
class Samples:
    """Images, uint8 (n, channels, height, width), and their labels, int64 (n,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        assert self.images.ndim == 4, self.images.shape
        assert self.images.dtype == np.uint8, self.images.dtype
        assert self.labels.shape == self.images.shape[:1], (self.labels.shape, self.images.shape)

    def __len__(self) -> int:
        return len(self.labels)


def joined(parts: Sequence[Samples]) -> Samples:
    """Return the samples of one or more parts of equal image shape as one."""
    if len(parts) == 1:
        return parts[0]
    return Samples(
        images=np.concatenate([part.images for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
    )


@dataclass(frozen=True, slots=True)
class Batch:
    """One microbatch.

    `images` (n, channels, height, width) are float32 and normalised; or uint8, where `normalisation` says
    what is still to be done to them where the net is. `labels` is int64 (n,); `index` is the microbatch's
    place in its epoch, from 0. `skipped` are the bad samples that were left out of it (in evaluation, maybe
    all).
    """

    images: Tensor
    labels: Tensor
    index: int
    normalisation: Normalisation | None = None
    skipped: tuple[BadSample, ...] = ()

    def pin_memory(self) -> Batch:
        """Return the batch in memory from which a GPU can copy while the CPU goes on."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())
