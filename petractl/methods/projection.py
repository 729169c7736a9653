"""Projections: from guesses, and derivatives of the target along them, to an estimate of the target.

A *slot* is what shares a coefficient: the streams of an activation, a parameter tensor, or all parameters of
a block. Its vectors are tuples of tensors; with a coefficient for every sample their first dimension counts
the samples (m = n rows), without, the whole tuple is one vector (m = 1 row). Everything here works on one
slot, with D guesses in it, and is pure.

The estimate along a guess g with coefficient c = <t, g> is c / ||g||^2 g, and 0 where g = 0; a random guess
is unbiased undivided: c g (Fournier et al., ICML 2023, section 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from petractl.estimator import Projection

Vectors = tuple[Tensor, ...]
"""The vectors of one slot: each row (or all of it) is one."""


@dataclass(frozen=True, slots=True)
class Projector:
    """How coefficients become estimates; see `petractl.estimator.Estimator` for the choices.

    `per_sample`: a row is a vector. A guess that is not random is divided by its squared norm, a random one
    where `normalise_random` says so.
    """

    projection: Projection
    per_sample: bool
    is_random: bool = False
    normalise_random: bool = False

    def coefficients(self, target: Vectors, guesses: Sequence[Vectors]) -> Tensor:
        """Return <t, g> of every guess and row, (D, m); for "span" with rows of all guesses, (D*m, m)."""
        if self.projection == "span":
            return self._spanning(guesses) @ self._matrix(target).T
        return torch.stack([self._inner(target, guess) for guess in guesses])

    def estimate(self, guesses: Sequence[Vectors], coefficients: Tensor | None) -> Vectors:
        """Return the estimate in the slot, from what `coefficients` gives, or signs (D, m), or None.

        None: target and guess are one, and the guess is its own projection.
        """
        if coefficients is None:
            return guesses[0]
        if self.projection == "span":
            return self._least_squares(guesses, coefficients)
        pairs = list(zip(guesses, coefficients, strict=True))
        scaled = [self._scaled(g, self._weight(g, c) / len(pairs)) for g, c in pairs]
        return tuple(_sum(parts) for parts in zip(*scaled, strict=True))

    def _weight(self, guess: Vectors, coefficient: Tensor) -> Tensor:
        """Return what the guess is multiplied by, (m,)."""
        if self.projection != "exact":
            # A sign leaves the guess its length; a random one that is normalised has length 1.
            signs = torch.sign(coefficient)
            return signs * _inverse(self._inner(guess, guess).sqrt()) if self.normalise_random else signs
        if self.is_random and not self.normalise_random:
            return coefficient
        return coefficient * _inverse(self._inner(guess, guess))

    def _inner(self, a: Vectors, b: Vectors) -> Tensor:
        """Return the inner products of the rows, (m,)."""
        products = [x * y for x, y in zip(a, b, strict=True)]
        if self.per_sample:
            return torch.stack([p.reshape(len(p), -1).sum(1) for p in products]).sum(0)
        return torch.stack([p.sum() for p in products]).sum(0)[None]

    def _scaled(self, vectors: Vectors, weight: Tensor) -> Vectors:
        return tuple(x * weight.reshape(-1, *(1,) * (x.dim() - 1)) for x in vectors)

    def _matrix(self, vectors: Vectors) -> Tensor:
        """Return the vectors as rows, (m, dimension)."""
        rows = len(vectors[0]) if self.per_sample else 1
        return torch.cat([x.reshape(rows, -1) for x in vectors], dim=1)

    def _spanning(self, guesses: Sequence[Vectors]) -> Tensor:
        return torch.cat([self._matrix(guess) for guess in guesses])

    def _least_squares(self, guesses: Sequence[Vectors], coefficients: Tensor) -> Vectors:
        """Return the point of the span nearest to each row of the target, from its inner products."""
        spanning = self._spanning(guesses)
        gram = (spanning @ spanning.T).double()
        weights = torch.linalg.pinv(gram, hermitian=True, rtol=_RANK_TOLERANCE) @ coefficients.double()
        nearest = weights.T.to(spanning.dtype) @ spanning
        first = guesses[0]
        parts = nearest.split([x.numel() // nearest.shape[0] for x in first], dim=1)
        return tuple(part.reshape(x.shape) for part, x in zip(parts, first, strict=True))


_RANK_TOLERANCE = 1e-6


def _inverse(x: Tensor) -> Tensor:
    """Return 1/x, and 0 where x = 0."""
    return torch.where(x == 0, torch.zeros_like(x), 1 / torch.where(x == 0, torch.ones_like(x), x))


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).sum(0)
