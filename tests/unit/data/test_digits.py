import numpy as np
import pytest

from petractl.data import DataInfo, describe_data, open_data
from petractl.errors import DataError


def test_sizes_shapes_and_values() -> None:
    data = open_data("digits", train="", val="", seed=0)
    assert data.info == DataInfo(
        name="digits", classes=10, channels=1, height=8, width=8, train_samples=1437, val_samples=360
    )
    assert data.train.images.shape == (1437, 1, 8, 8)
    assert data.val.images.shape == (360, 1, 8, 8)
    assert data.train.images.min() == 0
    assert data.train.images.max() == 255
    assert describe_data("digits", train="", val="") == data.info


def test_classes_are_balanced_in_both_splits() -> None:
    data = open_data("digits", train="", val="", seed=0)
    train, val = np.bincount(data.train.labels), np.bincount(data.val.labels)
    share = (train + val) * 360 / 1797
    assert (np.abs(val - share) <= 1).all(), (val, share)


def test_the_split_is_one_of_all_digits_and_does_not_depend_on_the_seed() -> None:
    from sklearn.datasets import load_digits

    data, other = (open_data("digits", train="", val="", seed=seed) for seed in (0, 7))
    assert np.array_equal(data.train.images, other.train.images)
    assert np.array_equal(data.val.labels, other.val.labels)
    both = np.concatenate([data.train.images, data.val.images]).reshape(1797, 64)
    # 16 grey levels, 15.9375 apart.
    original = np.rint(load_digits().data * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, both)) == sorted(map(bytes, original))


def test_training_batches_are_centred() -> None:
    data = open_data("digits", train="", val="", seed=0)
    batch = next(iter(data.eval_loader(batch_size=1437, split="train")))
    assert abs(float(batch.images.mean())) < 1e-3
    assert abs(float(batch.images.std()) - 1.0) < 1e-3
    assert not data.preparation.flip


@pytest.mark.parametrize(("train", "val", "key"), [("x", "", "train"), ("", "x", "val")])
def test_files_are_refused(train: str, val: str, key: str) -> None:
    with pytest.raises(DataError, match="digits reads no files") as caught:
        open_data("digits", train=train, val=val, seed=0)
    assert caught.value.where == f"data.{key}"
