import numpy as np
import pytest
import torch

from petractl.data.dataset import Data
from petractl.data.preparation import Preparation
from petractl.data.values import Batch, DataInfo, Samples


def _data(*, resident: bool, pad: int = 2, flip: bool = True, height: int = 8, width: int = 6) -> Data:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (53, 3, height, width), dtype=np.uint8)
    samples = Samples(images=images, labels=np.arange(53))
    how = Preparation(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), pad=pad, flip=flip)
    info = DataInfo("made-up", 53, 3, height, width, 53, 53)
    return Data(info=info, train=samples, val=samples, preparation=how, seed=3, resident=resident)


def _normalised(batch: Batch) -> torch.Tensor:
    return batch.images if batch.normalisation is None else batch.normalisation(batch.images)


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize(("pad", "flip"), [(0, False), (0, True), (1, False), (4, True)])
def test_the_batches_are_those_of_the_loader_in_memory(pad: int, flip: bool, augment: bool) -> None:
    loaders = [
        _data(resident=resident, pad=pad, flip=flip).train_loader(batch_size=8, augment=augment)
        for resident in (False, True)
    ]
    for epoch in (0, 2):
        for mine, other in zip(loaders[0].epoch(epoch), loaders[1].epoch(epoch), strict=True):
            assert other.images.dtype == torch.uint8
            assert other.index == mine.index
            assert torch.equal(other.labels, mine.labels)
            assert torch.equal(_normalised(other), _normalised(mine))


def test_evaluation_sees_the_images_as_they_are() -> None:
    mine, other = (_data(resident=resident).eval_loader(batch_size=20) for resident in (False, True))
    assert len(mine) == len(other) == 3
    for left, right in zip(mine, other, strict=True):
        assert torch.equal(left.labels, right.labels)
        assert torch.equal(_normalised(left), _normalised(right))


def test_a_batch_shares_no_memory_with_the_set() -> None:
    data = _data(resident=True)
    for batch in data.eval_loader(batch_size=53):
        batch.images.zero_()
        batch.labels.zero_()
    assert data.val.images.any()
    assert data.val.labels.tolist() == list(range(53))


def test_workers_have_nothing_to_do() -> None:
    loader = _data(resident=True).train_loader(batch_size=8, workers=3)
    assert sum(len(batch.labels) for batch in loader.epoch(0)) == 53
    assert "data.batch_size" in loader.slow_hint


def test_on_every_device_here_the_pixels_are_the_same() -> None:
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    for device in devices:
        mine = _data(resident=False).train_loader(batch_size=8)
        other = _data(resident=True).train_loader(batch_size=8, device=device)
        for left, right in zip(mine.epoch(1), other.epoch(1), strict=True):
            assert right.images.device.type == right.labels.device.type == device.type
            torch.testing.assert_close(_normalised(right).cpu(), left.images, rtol=0, atol=1e-6)
