"""Which samples make up a microbatch: a pure function of (seed, epoch, index).

A pass visits every sample once, in an order of its own. With `steps_per_epoch = 0` an epoch is one pass; with
`steps_per_epoch = S` epochs are windows of S microbatches on the endless row of passes, so that a short or a
long epoch still sees every sample equally often. Nothing is remembered between calls but the last
permutation, which is only a cache: any microbatch of any epoch can be asked for at any time, which is what
resuming needs.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from petractl.data.randomness import Purpose, random_order, stream_key
from petractl.errors import DataError


@dataclass(frozen=True, slots=True)
class Pick:
    """The samples of one microbatch: their indices, int64 (n,), and the pass that they belong to."""

    index: int
    pass_number: int
    samples: NDArray[np.int64]


class TrainOrder:
    """The order of a training set; see the module's docstring."""

    def __init__(
        self, samples: int, *, batch_size: int, seed: int, steps_per_epoch: int = 0, drop_last: bool = False
    ) -> None:
        """Raise `DataError` when a pass would hold no microbatch, or a last one of a single sample."""
        assert batch_size >= 1, batch_size
        assert steps_per_epoch >= 0, steps_per_epoch
        self._samples = samples
        self._batch_size = batch_size
        self._seed = seed
        self._steps_per_pass = _steps_per_pass(samples, batch_size, drop_last=drop_last)
        self.steps_per_epoch = steps_per_epoch or self._steps_per_pass
        self._cached: tuple[int, NDArray[np.int64]] | None = None

    def pick(self, epoch: int, index: int) -> Pick:
        """Return the samples of microbatch `index` (from 0) of `epoch` (any number from 0)."""
        assert epoch >= 0, epoch
        assert 0 <= index < self.steps_per_epoch, index
        pass_number, place = divmod(epoch * self.steps_per_epoch + index, self._steps_per_pass)
        first = place * self._batch_size
        chosen = self._permutation(pass_number)[first : first + self._batch_size]
        return Pick(index=index, pass_number=pass_number, samples=chosen)

    def _permutation(self, pass_number: int) -> NDArray[np.int64]:
        if self._cached is None or self._cached[0] != pass_number:
            key = stream_key(Purpose.ORDER, self._seed, pass_number)
            self._cached = (pass_number, random_order(key, self._samples))
        return self._cached[1]


def _steps_per_pass(samples: int, batch_size: int, *, drop_last: bool) -> int:
    full, rest = divmod(samples, batch_size)
    if drop_last:
        if full == 0:
            raise DataError(
                f"{samples} samples fill no microbatch of {batch_size}, and drop_last leaves out the rest",
                where="data.batch_size",
                hint=f"set data.drop_last=false, or data.batch_size to at most {samples}",
            )
        return full
    # A whole run of single samples is the user's choice; one that happens at the end of each pass is an
    # accident.
    if rest == 1 and batch_size > 1:
        raise DataError(
            f"{samples} samples = {full} x {batch_size} + 1: the last microbatch would hold 1 sample, "
            "and batch norm cannot train on one sample",
            where="data.batch_size",
            hint="set data.drop_last=true, or another data.batch_size",
        )
    return full + (rest > 0)
