"""Loaders: the batches of an epoch, prepared in the foreground or by background threads.

A loader holds no position. `TrainLoader.epoch(epoch, start=...)` is a pure function of (seed, epoch, index),
to the bit, whatever the number of workers; resuming is asking for the right epoch and start. With replicas a
loader yields one replica's share, and all shares together are what a loader without them yields.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from petractl.data.order import Pick, TrainOrder
from petractl.data.prefetch import prepared
from petractl.data.preparation import Preparation, augment, normalise
from petractl.data.randomness import Purpose, stream_key
from petractl.data.values import Batch, Samples

J = TypeVar("J")


class TrainLoader:
    """Shuffled, augmented batches of a training set.

    `steps_per_epoch` is the number of microbatches in an epoch, the largest over the replicas; `microbatches`
    that of this replica; `wait_s` the seconds, over all epochs so far, that the consumer has waited for a
    batch.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        preparation: Preparation,
        batch_size: int,
        seed: int,
        steps_per_epoch: int = 0,
        augment: bool = True,
        drop_last: bool = False,
        workers: int = 0,
        replica: int = 0,
        replicas: int = 1,
    ) -> None:
        """Raise `DataError` when the batch size does not suit the number of samples (see `TrainOrder`)."""
        self._samples = samples
        self._preparation = preparation
        self._seed = seed
        self._augment = augment and (preparation.pad > 0 or preparation.flip)
        self._workers = workers
        self._order = TrainOrder(
            len(samples),
            batch_size=batch_size,
            seed=seed,
            steps_per_epoch=steps_per_epoch,
            drop_last=drop_last,
            replica=replica,
            replicas=replicas,
        )
        self.steps_per_epoch = self._order.steps_per_epoch
        self.microbatches = self._order.microbatches
        self.wait_s = 0.0

    def epoch(self, epoch: int, *, start: int = 0) -> Generator[Batch, None, None]:
        """Yield the batches `start` ... `microbatches - 1` of `epoch` (any number from 0).

        Closing or dropping the iterator early ends its workers.
        """
        assert 0 <= start <= self.steps_per_epoch, start
        picks = (self._order.pick(epoch, index) for index in range(start, self.microbatches))
        return _batches(picks, self._prepare, workers=self._workers, count_wait=self._count_wait)

    def _count_wait(self, seconds: float) -> None:
        self.wait_s += seconds

    def _prepare(self, pick: Pick) -> Batch:
        how = self._preparation
        images = self._samples.images[pick.samples]
        if self._augment:
            key = stream_key(Purpose.AUGMENTATION, self._seed, pick.pass_number)
            images = augment(images, key=key, samples=pick.samples, pad=how.pad, flip=how.flip)
        return _batch(images, self._samples.labels[pick.samples], how, index=pick.index)


class EvalLoader:
    """Every sample once, in order and not augmented; the last batch holds what is left over.

    Of R replicas, r has the batches r, r + R, ... `samples` is the number of its samples, `wait_s` the
    seconds, over all uses so far, that the consumer has waited for a batch.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        preparation: Preparation,
        batch_size: int,
        workers: int = 0,
        replica: int = 0,
        replicas: int = 1,
    ) -> None:
        assert batch_size >= 1, batch_size
        assert 0 <= replica < replicas, (replica, replicas)
        self._samples = samples
        self._preparation = preparation
        self._batch_size = batch_size
        self._workers = workers
        self._indices = range(replica, -(-len(samples) // batch_size), replicas)
        self.samples = sum(min(batch_size, len(samples) - index * batch_size) for index in self._indices)
        self.wait_s = 0.0

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._indices)

    def __iter__(self) -> Generator[Batch, None, None]:
        """Yield the batches in order."""
        return _batches(self._indices, self._prepare, workers=self._workers, count_wait=self._count_wait)

    def _count_wait(self, seconds: float) -> None:
        self.wait_s += seconds

    def _prepare(self, index: int) -> Batch:
        rows = slice(index * self._batch_size, (index + 1) * self._batch_size)
        labels = self._samples.labels[rows].copy()
        return _batch(self._samples.images[rows], labels, self._preparation, index=index)


def _batch(images: NDArray[np.uint8], labels: NDArray[np.int64], how: Preparation, *, index: int) -> Batch:
    # Imported here because a set can be named and described without torch, which takes seconds to import.
    import torch

    pixels = normalise(images, mean=how.mean, std=how.std)
    return Batch(images=torch.from_numpy(pixels), labels=torch.from_numpy(labels), index=index)


def _batches(
    jobs: Iterable[J],
    prepare: Callable[[J], Batch],
    *,
    workers: int,
    count_wait: Callable[[float], None],
) -> Generator[Batch, None, None]:
    """Yield each prepared batch, counting the seconds waited for it; closing this ends the workers."""
    with closing(prepared(jobs, prepare, workers=workers)) as batches:
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            count_wait(time.perf_counter() - began)
            yield batch
