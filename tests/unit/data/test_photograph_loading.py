"""Every sample once per epoch, and the same batches to the bit, wherever begun and by whomever prepared."""

from functools import lru_cache

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from photograph_cases import photograph_data

from petractl.data.dataset import PhotographData
from petractl.data.loader import TrainLoader
from petractl.data.values import Batch
from petractl.errors import DataError

_SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple)


@lru_cache(maxsize=64)
def _data(sizes: tuple[int, ...], buffer: int) -> PhotographData:
    return photograph_data(*sizes, shuffle_buffer=buffer)


def _same(left: list[Batch], right: list[Batch]) -> None:
    assert [batch.index for batch in left] == [batch.index for batch in right]
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, other.images)


def _loaders(data: PhotographData, *, batch_size: int, replicas: int, workers: int) -> list[TrainLoader]:
    try:
        return [
            data.train_loader(batch_size=batch_size, replica=replica, replicas=replicas, workers=workers)
            for replica in range(replicas)
        ]
    except DataError:
        assume(False)
        raise


@settings(deadline=None, max_examples=60)
@given(
    sizes=_SIZES,
    buffer=st.sampled_from([0, 1, 4, 10_000]),
    batch_size=st.integers(1, 7),
    replicas=st.integers(1, 3),
    epoch=st.integers(0, 50),
    place=st.floats(0, 1),
)
def test_every_sample_once_per_epoch_and_resumed_to_the_bit(
    sizes: tuple[int, ...], buffer: int, batch_size: int, replicas: int, epoch: int, place: float
) -> None:
    data = _data(sizes, buffer)
    seen: list[int] = []
    for loader in _loaders(data, batch_size=batch_size, replicas=replicas, workers=0):
        whole = list(loader.epoch(epoch))
        start = round(place * len(whole))
        _same(whole[start:], list(loader.epoch(epoch, start=start)))
        seen += [int(label) for batch in whole for label in batch.labels]
    assert sorted(seen) == list(range(sum(sizes)))


@settings(deadline=None, max_examples=6)
@given(
    sizes=_SIZES,
    buffer=st.sampled_from([0, 3]),
    batch_size=st.integers(2, 6),
    workers=st.integers(1, 3),
    replicas=st.integers(1, 2),
    place=st.floats(0, 1),
)
def test_whatever_the_number_of_workers(
    sizes: tuple[int, ...], buffer: int, batch_size: int, workers: int, replicas: int, place: float
) -> None:
    data = _data(sizes, buffer)
    alone = _loaders(data, batch_size=batch_size, replicas=replicas, workers=0)
    helped = _loaders(data, batch_size=batch_size, replicas=replicas, workers=workers)
    seen: list[int] = []
    for mine, other in zip(alone, helped, strict=True):
        whole = list(mine.epoch(3))
        start = round(place * len(whole))
        _same(whole[start:], list(other.epoch(3, start=start)))
        seen += [int(label) for batch in whole for label in batch.labels]
    assert sorted(seen) == list(range(sum(sizes)))


@settings(deadline=None, max_examples=30)
@given(sizes=_SIZES, batch_size=st.integers(1, 7), replicas=st.integers(1, 3), steps=st.integers(1, 6))
def test_endless_epochs_see_every_sample_equally_often(
    sizes: tuple[int, ...], batch_size: int, replicas: int, steps: int
) -> None:
    data = _data(sizes, 4)
    assume(sum(sizes) >= 2)
    try:
        loaders = [
            data.train_loader(batch_size=batch_size, steps_per_epoch=steps, replica=r, replicas=replicas)
            for r in range(replicas)
        ]
    except DataError:
        assume(False)
        raise
    batches = [[batch for epoch in range(3) for batch in loader.epoch(epoch)] for loader in loaders]
    in_order = [batch.labels.tolist() for row in zip(*batches, strict=True) for batch in row]
    samples = [sample for labels in in_order for sample in labels]
    total = sum(sizes)
    for first in range(0, len(samples) - total + 1, total):
        assert sorted(samples[first : first + total]) == list(range(total))
