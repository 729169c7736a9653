import threading
import time
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from petractl.data.loader import EvalLoader, TrainLoader
from petractl.data.memory import MemorySamples
from petractl.data.order import TrainOrder
from petractl.data.preparation import Preparation, normalise
from petractl.data.values import Batch, Samples

_PREPARATION = Preparation(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), pad=2, flip=True)


@pytest.fixture
def samples() -> Samples:
    images = np.random.default_rng(0).integers(0, 256, (53, 3, 8, 8), dtype=np.uint8)
    # The label tells which sample it is.
    return Samples(images=images, labels=np.arange(53))


def _loader(
    samples: Samples,
    *,
    batch_size: int = 8,
    workers: int = 0,
    augment: bool = True,
    steps_per_epoch: int = 0,
    drop_last: bool = False,
    replica: int = 0,
    replicas: int = 1,
) -> TrainLoader:
    order = TrainOrder(
        len(samples),
        batch_size=batch_size,
        seed=5,
        steps_per_epoch=steps_per_epoch,
        drop_last=drop_last,
        replica=replica,
        replicas=replicas,
    )
    preparer = MemorySamples(samples, preparation=_PREPARATION, seed=5, augment=augment)
    return TrainLoader(preparer, order=order, workers=workers)


def _eval_loader(samples: Samples, **options: int) -> EvalLoader:
    preparer = MemorySamples(samples, preparation=_PREPARATION, augment=False)
    return EvalLoader(preparer, samples=len(samples), **options)


def _assert_same(left: Iterable[Batch], right: Iterable[Batch]) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.index == other.index
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, other.images)


def _by_sample(batches: Iterable[Batch]) -> dict[int, torch.Tensor]:
    return {
        int(label): image
        for batch in batches
        for label, image in zip(batch.labels, batch.images, strict=True)
    }


def test_batches_are_normalised_float32_with_int64_labels(samples: Samples) -> None:
    batches = list(_loader(samples).epoch(0))
    assert [batch.index for batch in batches] == list(range(7))
    assert [len(batch.labels) for batch in batches] == [8] * 6 + [5]
    assert batches[0].images.shape == (8, 3, 8, 8)
    assert batches[0].images.dtype == torch.float32
    assert batches[0].images.is_contiguous()
    assert batches[0].labels.dtype == torch.int64


def test_without_augmentation_images_are_the_samples(samples: Samples) -> None:
    found = _by_sample(_loader(samples, augment=False).epoch(3))
    expected = torch.from_numpy(normalise(samples.images, mean=_PREPARATION.mean, std=_PREPARATION.std))
    assert sorted(found) == list(range(53))
    assert all(torch.equal(found[index], expected[index]) for index in found)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("steps_per_epoch", [0, 10])
def test_workers_change_no_bit(samples: Samples, workers: int, steps_per_epoch: int) -> None:
    alone = _loader(samples, steps_per_epoch=steps_per_epoch)
    helped = _loader(samples, steps_per_epoch=steps_per_epoch, workers=workers)
    for epoch in (0, 1, 4):
        _assert_same(alone.epoch(epoch), helped.epoch(epoch))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_gives_the_rest_to_the_bit(samples: Samples, workers: int) -> None:
    whole = list(_loader(samples).epoch(2))
    for start in range(len(whole) + 1):
        _assert_same(whole[start:], _loader(samples, workers=workers).epoch(2, start=start))


def test_augmentation_does_not_depend_on_the_batch_size(samples: Samples) -> None:
    small = _by_sample(_loader(samples, batch_size=3).epoch(1))
    large = _by_sample(_loader(samples, batch_size=20).epoch(1))
    assert all(torch.equal(small[index], large[index]) for index in range(53))


def test_augmentation_and_order_change_from_epoch_to_epoch(samples: Samples) -> None:
    loader = _loader(samples)
    first, second = list(loader.epoch(0)), list(loader.epoch(1))
    assert first[0].labels.tolist() != second[0].labels.tolist()
    images = _by_sample(first), _by_sample(second)
    assert sum(torch.equal(images[0][index], images[1][index]) for index in range(53)) < 10


def test_drop_last_and_steps_per_epoch_set_the_length(samples: Samples) -> None:
    assert _loader(samples, drop_last=True).steps_per_epoch == 6
    loader = _loader(samples, steps_per_epoch=11)
    assert loader.steps_per_epoch == 11
    assert len(list(loader.epoch(0))) == 11


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("replicas", [1, 2, 3, 7])
def test_replicas_share_the_batches_of_one_loader(samples: Samples, replicas: int, workers: int) -> None:
    whole = list(_loader(samples).epoch(2))
    for replica in range(replicas):
        loader = _loader(samples, workers=workers, replica=replica, replicas=replicas)
        share = list(loader.epoch(2))
        assert loader.steps_per_epoch == -(-len(whole) // replicas)
        assert loader.microbatches == len(share)
        assert [batch.index for batch in share] == list(range(len(share)))
        for batch, expected in zip(share, whole[replica::replicas], strict=True):
            assert torch.equal(batch.labels, expected.labels)
            assert torch.equal(batch.images, expected.images)
        _assert_same(share[1:], loader.epoch(2, start=1))
        assert list(loader.epoch(2, start=loader.steps_per_epoch)) == []


def _data_threads() -> int:
    return sum(thread.name.startswith("petractl-data") for thread in threading.enumerate())


def test_abandoning_an_epoch_leaves_no_thread(samples: Samples) -> None:
    for _ in _loader(samples, workers=3).epoch(0):
        assert _data_threads() == 3
        break
    assert _data_threads() == 0


def test_an_epoch_that_is_never_begun_starts_no_thread(samples: Samples) -> None:
    epoch = _loader(samples, workers=3).epoch(0)
    assert _data_threads() == 0
    epoch.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_wait_s_counts_the_waiting_and_not_the_use(samples: Samples, workers: int) -> None:
    loader = _loader(samples, workers=workers)
    began = time.perf_counter()
    for _ in loader.epoch(0):
        time.sleep(0.01)
    assert 0.0 < loader.wait_s < time.perf_counter() - began - 7 * 0.01 + 1e-3
    assert 0.0 < loader.start_s < loader.wait_s


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 13, 26, 53, 100])
def test_evaluation_sees_every_sample_once_in_order(samples: Samples, batch_size: int, workers: int) -> None:
    loader = _eval_loader(samples, batch_size=batch_size, workers=workers)
    expected = torch.from_numpy(normalise(samples.images, mean=_PREPARATION.mean, std=_PREPARATION.std))
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader)
        assert [batch.index for batch in batches] == list(range(len(loader)))
        assert torch.equal(torch.cat([batch.labels for batch in batches]), torch.arange(53))
        assert torch.equal(torch.cat([batch.images for batch in batches]), expected)
    assert loader.samples == 53
    assert loader.wait_s > 0.0


@pytest.mark.parametrize("replicas", [2, 3, 9])
def test_replicas_evaluate_every_sample_once(samples: Samples, replicas: int) -> None:
    whole = list(_eval_loader(samples, batch_size=8))
    loaders = [
        _eval_loader(samples, batch_size=8, replica=replica, replicas=replicas) for replica in range(replicas)
    ]
    for replica, loader in enumerate(loaders):
        assert len(loader) == len(whole[replica::replicas])
        assert loader.samples == sum(len(batch.labels) for batch in whole[replica::replicas])
        _assert_same(whole[replica::replicas], loader)
    assert sum(loader.samples for loader in loaders) == 53


def test_batches_share_no_memory_with_the_set(samples: Samples) -> None:
    loader = _eval_loader(samples, batch_size=53)
    batch = next(iter(loader))
    batch.labels.zero_()
    batch.images.zero_()
    assert samples.labels.tolist() == list(range(53))
