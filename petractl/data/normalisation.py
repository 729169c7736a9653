"""Normalising where the net is: (image / 255 - mean) / std of uint8 images, on their device.

A batch of bytes is a quarter of one of floats, on the way from a worker process and to a GPU. The arithmetic
is that of `preparation.normalise`, operation by operation, so that the bits are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Mean and standard deviation per channel, of pixels scaled to 0 ... 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor, *, memory_format: torch.memory_format | None = None) -> Tensor:
        """Return uint8 images (n, c, h, w) as new normalised float32 ones (default: lying as they do)."""
        import torch

        scale, shift = _factors(self, images.device)
        pixels = images.to(torch.float32, memory_format=memory_format or torch.preserve_format, copy=True)
        return pixels.mul_(scale).sub_(shift)


@lru_cache(maxsize=16)
def _factors(how: Normalisation, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what to multiply by and what to subtract, (1, c, 1, 1) each, on the device."""
    import torch

    centre = np.asarray(how.mean, dtype=np.float64).reshape(1, -1, 1, 1)
    spread = np.asarray(how.std, dtype=np.float64).reshape(1, -1, 1, 1)
    pair = (1.0 / (255.0 * spread)).astype(np.float32), (centre / spread).astype(np.float32)
    scale, shift = (torch.from_numpy(factor).to(device) for factor in pair)
    return scale, shift
