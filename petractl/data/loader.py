"""Loaders: the batches of an epoch, prepared in the foreground or ahead of their use in the background.

A loader holds no position. `TrainLoader.epoch(epoch, start=...)` is a pure function of (seed, epoch, index),
to the bit, whatever the number of workers; resuming is asking for the right epoch and start. With replicas a
loader yields one replica's share, and all shares together are what a loader without them yields.

What a batch is made of is a `Preparer`'s business (samples in memory, on the device, or photographs in
shards), who makes it that of `RunAhead` (threads or processes).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Protocol

import numpy as np

from petractl.data.order import Pick, TrainOrder
from petractl.data.prefetch import prepared
from petractl.data.skips import Skips
from petractl.data.values import Batch

if TYPE_CHECKING:
    from petractl.data.encoded import BadSample


class Preparer(Protocol):
    """Makes batches; the same pick gives the same batch, to the bit."""

    def prepare(self, pick: Pick) -> Batch:
        """Return the batch of the samples that `pick` names, in its order."""
        ...


class RunAhead(Protocol):
    """Runs `prepare` on the jobs, in the foreground with 0 workers; gives the results in order."""

    def __call__(
        self, jobs: Iterable[Pick], prepare: Callable[[Pick], Batch], *, workers: int
    ) -> Generator[Batch, None, None]:
        """Yield `prepare(job)` for each job; closing this ends the workers."""
        ...


class TrainLoader:
    """Batches of a training set in the order of `order`.

    `steps_per_epoch` is the number of microbatches in an epoch, the largest over the replicas; `microbatches`
    that of this replica; `wait_s` the seconds, over all epochs so far, that the consumer has waited for a
    batch, `start_s` those of them for the first batch of an epoch; `slow_hint` what to change where that is
    too long.
    """

    def __init__(
        self,
        preparer: Preparer,
        *,
        order: TrainOrder,
        workers: int = 0,
        ahead: RunAhead = prepared,
        skips: Skips | None = None,
        slow_hint: str = "",
    ) -> None:
        self._order = order
        self._source = _Source(preparer, ahead=ahead, workers=workers, skips=skips)
        self.steps_per_epoch = order.steps_per_epoch
        self.microbatches = order.microbatches
        self.slow_hint = slow_hint

    @property
    def wait_s(self) -> float:
        """Seconds waited so far."""
        return self._source.wait_s

    @property
    def start_s(self) -> float:
        """Seconds waited so far for the first batches of epochs, while workers start."""
        return self._source.start_s

    @property
    def skipped(self) -> list[BadSample]:
        """The bad samples left out so far by all loaders of the same data; it only grows."""
        return self._source.skips.samples

    @property
    def max_skipped(self) -> int:
        """How many different ones may be left out."""
        return self._source.skips.limit

    def epoch(self, epoch: int, *, start: int = 0) -> Generator[Batch, None, None]:
        """Yield the batches `start` ... `microbatches - 1` of `epoch` (any number from 0).

        Closing or dropping the iterator early ends its workers. Raises `DataError` for data that cannot be
        read, in its batch's turn.
        """
        assert 0 <= start <= self.steps_per_epoch, start
        return self._source.batches(
            self._order.pick(epoch, index) for index in range(start, self.microbatches)
        )


class EvalLoader:
    """Every sample once, in order and not augmented; the last batch holds what is left over.

    Of R replicas, r has the batches r, r + R, ... `samples` is the number of its samples, `wait_s` the
    seconds, over all uses so far, that the consumer has waited for a batch.
    """

    def __init__(
        self,
        preparer: Preparer,
        *,
        samples: int,
        batch_size: int,
        workers: int = 0,
        replica: int = 0,
        replicas: int = 1,
        ahead: RunAhead = prepared,
        skips: Skips | None = None,
    ) -> None:
        assert batch_size >= 1, batch_size
        assert 0 <= replica < replicas, (replica, replicas)
        self._source = _Source(preparer, ahead=ahead, workers=workers, skips=skips)
        self._all_samples = samples
        self._batch_size = batch_size
        self._indices = range(replica, -(-samples // batch_size), replicas)
        self.samples = sum(min(batch_size, samples - index * batch_size) for index in self._indices)

    @property
    def wait_s(self) -> float:
        """Seconds waited so far."""
        return self._source.wait_s

    @property
    def skipped(self) -> list[BadSample]:
        """The bad samples left out so far by all loaders of the same data; it only grows."""
        return self._source.skips.samples

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._indices)

    def __iter__(self) -> Generator[Batch, None, None]:
        """Yield the batches in order."""
        return self._source.batches(self._picks())

    def _picks(self) -> Iterator[Pick]:
        for index in self._indices:
            first = index * self._batch_size
            rows = np.arange(first, min(first + self._batch_size, self._all_samples), dtype=np.int64)
            yield Pick(index=index, pass_number=0, samples=rows)


class _Source:
    """Gives the batches of picks, counting what was waited for and what was left out."""

    def __init__(self, preparer: Preparer, *, ahead: RunAhead, workers: int, skips: Skips | None) -> None:
        self._preparer = preparer
        self._ahead = ahead
        self._workers = workers
        self.skips = skips or Skips()
        self.wait_s = 0.0
        self.start_s = 0.0

    def batches(self, picks: Iterable[Pick]) -> Generator[Batch, None, None]:
        """Yield each prepared batch; closing this ends the workers."""
        with closing(self._ahead(picks, self._preparer.prepare, workers=self._workers)) as batches:
            is_first = True
            while True:
                began = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    return
                waited_s = time.perf_counter() - began
                self.wait_s += waited_s
                self.start_s += waited_s if is_first else 0.0
                is_first = False
                self.skips.add(batch.skipped)
                yield batch
