"""Which samples make up a microbatch: a pure function of (seed, epoch, index).

A pass visits every sample once, in an order of its own: that of a `Shuffle`, over the whole set, or one that
keeps near each other what lies in one shard. With `steps_per_epoch = 0` an epoch is one pass; with
`steps_per_epoch = S` epochs are windows of S microbatches on the endless chain of passes, so that a short or
a long epoch still sees every sample equally often. Nothing is remembered between calls but the last
permutation, which is only a cache: any microbatch of any epoch can be asked for at any time, which is what
resuming needs.

R replicas deal the same microbatches among them, in rows of R: row i of an epoch gives number i x R + r to
replica r. Then S counts rows, and an epoch that is one pass may end with a row too short for the last
replicas.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from petractl.data.randomness import Purpose, stream_key
from petractl.data.shuffle import Shuffle, WholeShuffle
from petractl.errors import DataError


@dataclass(frozen=True, slots=True)
class Pick:
    """The samples of one microbatch: their indices, int64 (n,), and the pass that they belong to."""

    index: int
    pass_number: int
    samples: NDArray[np.int64]


class TrainOrder:
    """The order of a training set as one of its replicas sees it; see the module's docstring.

    `steps_per_epoch` is the number of an epoch's rows, `microbatches` how many of them hold one for this
    replica: the same in every epoch, and all of them or all but the last.
    """

    def __init__(
        self,
        samples: int | Shuffle,
        *,
        batch_size: int,
        seed: int,
        steps_per_epoch: int = 0,
        drop_last: bool = False,
        replica: int = 0,
        replicas: int = 1,
    ) -> None:
        """`samples` is how many there are, or how they are shuffled (a number: all of them at once).

        Raise `DataError` when a pass would hold no microbatch, or a last one of a single sample. So too when
        an epoch of one pass would leave a replica with nothing.
        """
        assert batch_size >= 1, batch_size
        assert steps_per_epoch >= 0, steps_per_epoch
        assert 0 <= replica < replicas, (replica, replicas)
        self._shuffle = WholeShuffle(samples) if isinstance(samples, int) else samples
        self._batch_size = batch_size
        self._seed = seed
        self._steps_per_pass = _steps_per_pass(self._shuffle.samples, batch_size, drop_last=drop_last)
        self._replica = replica
        self._replicas = replicas
        rows = -(-self._steps_per_pass // replicas)
        self.steps_per_epoch = steps_per_epoch or rows
        self._is_one_pass = steps_per_epoch == 0
        if self._is_one_pass and self._steps_per_pass < replicas:
            raise _too_many_replicas(self._shuffle.samples, self._steps_per_pass, batch_size, replicas)
        lacks_last = self._is_one_pass and (rows - 1) * replicas + replica >= self._steps_per_pass
        self.microbatches = self.steps_per_epoch - lacks_last
        self._cached: tuple[int, NDArray[np.int64]] | None = None

    def pick(self, epoch: int, index: int) -> Pick:
        """Return the samples of this replica's microbatch `index` (from 0) of `epoch` (any number from 0)."""
        assert epoch >= 0, epoch
        assert 0 <= index < self.microbatches, index
        if self._is_one_pass:
            pass_number, place = epoch, index * self._replicas + self._replica
        else:
            number = (epoch * self.steps_per_epoch + index) * self._replicas + self._replica
            pass_number, place = divmod(number, self._steps_per_pass)
        first = place * self._batch_size
        chosen = self._permutation(pass_number)[first : first + self._batch_size]
        return Pick(index=index, pass_number=pass_number, samples=chosen)

    def _permutation(self, pass_number: int) -> NDArray[np.int64]:
        if self._cached is None or self._cached[0] != pass_number:
            key = stream_key(Purpose.ORDER, self._seed, pass_number)
            self._cached = (pass_number, self._shuffle.order(key))
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


def _too_many_replicas(samples: int, steps: int, batch_size: int, replicas: int) -> DataError:
    return DataError(
        f"{samples} samples in microbatches of {batch_size} are {steps} per pass: "
        f"replicas({replicas}) would leave {replicas - steps} with nothing to do",
        where="engine.replicas",
        hint=f"set engine.replicas to at most {steps}, a smaller data.batch_size, or data.steps_per_epoch",
    )
