"""How well an estimate agrees with the truth: cosine and ratio of norms, over a row of tensors.

Sums are taken in float64 and stay on the device until the end: one transfer for each comparison.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from petractl.models.units import Streams


@dataclass(frozen=True, slots=True)
class Agreement:
    """Cosine of the angle between estimate and truth, and |estimate| / |truth|; None where undefined."""

    cosine: float | None = None
    norm_ratio: float | None = None


def agreement(estimate: Sequence[Tensor | None], truth: Sequence[Tensor | None]) -> Agreement:
    """Compare two rows of tensors of the same shapes as two long vectors; None stands for zeros."""
    dot, of_estimate, of_truth = (
        _inner(estimate, truth),
        _inner(estimate, estimate),
        _inner(truth, truth),
    )
    if not of_truth:
        return Agreement()
    norm_ratio = (of_estimate / of_truth) ** 0.5
    return Agreement(dot / (of_estimate * of_truth) ** 0.5 if of_estimate else None, norm_ratio)


def mean_agreement(several: Sequence[Agreement]) -> Agreement:
    """Return the means of what is defined."""
    cosines = [one.cosine for one in several if one.cosine is not None]
    ratios = [one.norm_ratio for one in several if one.norm_ratio is not None]
    return Agreement(fmean(cosines) if cosines else None, fmean(ratios) if ratios else None)


def relative_error(value: Streams, truth: Streams) -> Tensor:
    """Return |value - truth| / |truth| over all streams, in float64, without waiting for the device."""
    difference = [a.double() - b.double() for a, b in zip(value, truth, strict=True)]
    squares = [torch.stack([(x.double() ** 2).sum() for x in row]).sum() for row in (difference, truth)]
    return (squares[0] / squares[1]).sqrt()


def _inner(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float:
    products = [
        (x.double() * y.double()).sum() for x, y in zip(a, b, strict=True) if x is not None and y is not None
    ]
    return float(torch.stack(products).sum()) if products else 0.0
