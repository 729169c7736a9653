"""Batches of a set that lies on the training device: a GPU's loader is the GPU.

A fast GPU can wait longer for a loader than it computes. A set of small images fits on it as bytes, and there
picking, cropping, flipping and normalising a whole batch are one gather and two multiplications. What is
drawn for a sample is what `augment` draws for it, so the numbers are those of the loader in memory: the same
bits on a CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from petractl.data.normalisation import Normalisation
from petractl.data.order import Pick
from petractl.data.preparation import Preparation, draw_crops
from petractl.data.randomness import Purpose, stream_key
from petractl.data.values import Batch, Samples
from petractl.errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ResidentSamples:
    """Prepares batches of `samples`, which are copied to the device once, where they stay as uint8."""

    def __init__(
        self,
        samples: Samples,
        *,
        preparation: Preparation,
        device: torch.device,
        seed: int = 0,
        augment: bool,
    ) -> None:
        """Raise `DataError` where the device has no room for them."""
        self._images, self._labels = _moved(samples, device)
        self._preparation = preparation
        self._normalisation = Normalisation(preparation.mean, preparation.std)
        self._seed = seed
        self._augment = augment and (preparation.pad > 0 or preparation.flip)

    def prepare(self, pick: Pick) -> Batch:
        """Return uint8 images on the device, to be normalised there."""
        samples = _to_device(pick.samples, self._images.device)
        images = self._cropped(pick, samples) if self._augment else self._images.index_select(0, samples)
        return Batch(
            images=images,
            labels=self._labels.index_select(0, samples),
            index=pick.index,
            normalisation=self._normalisation,
        )

    def _cropped(self, pick: Pick, samples: Tensor) -> Tensor:
        """Return the images cropped and flipped: each pixel gathered from where it lies, or black."""
        how, device = self._preparation, self._images.device
        _, channels, height, width = self._images.shape
        key = stream_key(Purpose.AUGMENTATION, self._seed, pick.pass_number)
        drawn = draw_crops(key, pick.samples, pad=how.pad)
        y = drawn.rows[:, None] + np.arange(height) - how.pad
        x = drawn.columns[:, None] + np.arange(width) - how.pad
        if how.flip:
            x = np.where(drawn.flipped[:, None], x[:, ::-1], x)
        inside_y, inside_x = (y >= 0) & (y < height), (x >= 0) & (x < width)
        y, x = y.clip(0, height - 1) * width, x.clip(0, width - 1)
        rows, columns = _to_device(y, device)[:, None, :, None], _to_device(x, device)[:, None, None, :]
        planes = _to_device(np.arange(channels) * (height * width), device)[None, :, None, None]
        firsts = (samples * (channels * height * width))[:, None, None, None]
        images = self._images.view(-1).take(firsts + planes + (rows + columns))
        if how.pad:
            inside = _to_device(inside_y, device)[:, None, :, None], _to_device(inside_x, device)
            images *= inside[0] & inside[1][:, None, None, :]
        return images


def _moved(samples: Samples, device: torch.device) -> tuple[Tensor, Tensor]:
    import torch

    try:
        images = torch.from_numpy(np.ascontiguousarray(samples.images)).to(device)
        return images, torch.from_numpy(samples.labels).to(device)
    except torch.OutOfMemoryError as error:
        raise DataError(
            f"{samples.images.nbytes / 2**30:.1f} GiB of images have no room on {device}",
            where="data.resident",
            hint="set data.resident = false, or smaller images",
        ) from error


def _to_device(values: NDArray[np.int64] | NDArray[np.bool_], device: torch.device) -> Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)
