import numpy as np
import pytest

from petractl.data import DataInfo, describe_data, open_data
from petractl.errors import DataError


def test_any_size() -> None:
    info = DataInfo(name="fake", classes=7, channels=1, height=17, width=17, train_samples=50, val_samples=12)
    data = open_data("fake", train="", val="", seed=0, fake_samples=50, image_size=17, channels=1, classes=7)
    assert data.info == info
    assert data.train.images.shape == (50, 1, 17, 17)
    assert len(data.val) == 12
    assert (
        describe_data("fake", train="", val="", fake_samples=50, image_size=17, channels=1, classes=7) == info
    )


def test_defaults_are_cifar_size() -> None:
    assert describe_data("fake", train="", val="") == DataInfo(
        name="fake", classes=10, channels=3, height=32, width=32, train_samples=1024, val_samples=256
    )


def test_the_seed_decides_every_pixel() -> None:
    one, same, other = (open_data("fake", train="", val="", seed=seed, fake_samples=8) for seed in (1, 1, 2))
    assert np.array_equal(one.train.images, same.train.images)
    assert np.array_equal(one.val.images, same.val.images)
    assert not np.array_equal(one.train.images, other.train.images)
    assert not np.array_equal(one.train.images[:2], one.val.images)


def test_class_means_of_training_classify_the_validation_images() -> None:
    data = open_data("fake", train="", val="", seed=0, fake_samples=200, image_size=8)
    train, val = (part.images.reshape(len(part), -1).astype(float) for part in (data.train, data.val))
    means = np.stack([train[data.train.labels == label].mean(axis=0) for label in range(10)])
    distances = ((val[:, None] - means) ** 2).sum(axis=-1)
    assert (distances.argmin(axis=1) == data.val.labels).mean() > 0.95


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(DataError, match="3 samples are too few"):
        describe_data("fake", train="", val="", fake_samples=3)


def test_files_are_refused() -> None:
    with pytest.raises(DataError, match="fake reads no files"):
        describe_data("fake", train="x.tar", val="")


def test_loaders_of_replicas_share_the_set() -> None:
    data = open_data("fake", train="", val="", seed=0, fake_samples=40, image_size=8)
    whole = list(data.train_loader(batch_size=8).epoch(0))
    for replica in range(2):
        share = list(data.train_loader(batch_size=8, replica=replica, replicas=2).epoch(0))
        expected = [batch.labels.tolist() for batch in whole[replica::2]]
        assert [batch.labels.tolist() for batch in share] == expected
    whole = list(data.eval_loader(batch_size=3))
    share = list(data.eval_loader(batch_size=3, replica=1, replicas=2))
    assert [batch.index for batch in share] == [batch.index for batch in whole[1::2]]
