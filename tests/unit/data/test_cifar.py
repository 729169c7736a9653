from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from petractl.data import UNKNOWN, DataInfo, describe_data, open_data
from petractl.data.values import Samples
from petractl.errors import DataError


def test_shards_from_the_usual_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_cifar_shard: Callable[..., Samples]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("data/cifar10")
    parts = [write_cifar_shard(folder / f"c-train-0{seed}.tar", 5, seed=seed) for seed in range(2)]
    val = write_cifar_shard(folder / "c-val-00.tar.gz", 4, seed=9)
    data = open_data("cifar10", train="", val="", seed=3)
    assert data.info == DataInfo(
        name="cifar10", classes=10, channels=3, height=32, width=32, train_samples=10, val_samples=4
    )
    assert np.array_equal(data.train.images, np.concatenate([part.images for part in parts]))
    assert np.array_equal(data.val.images, val.images)
    assert describe_data("cifar10", train="", val="") == data.info


def test_shards_by_list_and_pattern(tmp_path: Path, write_cifar_shard: Callable[..., Samples]) -> None:
    for seed in range(3):
        write_cifar_shard(tmp_path / f"x-{seed}.tar", 2, classes=100, seed=seed)
    data = open_data("cifar100", train=f"{tmp_path}/x-{{0..1}}.tar", val=[str(tmp_path / "x-2.tar")], seed=0)
    assert (data.info.classes, data.info.train_samples, data.info.val_samples) == (100, 4, 2)


def test_the_authors_batches(tmp_path: Path, write_cifar_batches: Callable[..., dict[str, Samples]]) -> None:
    written = write_cifar_batches(tmp_path / "cifar-100-python", ["train", "test"], classes=100)
    data = open_data("cifar100", train=str(tmp_path), val="", seed=0)
    assert np.array_equal(data.train.labels, written["train"].labels)
    assert np.array_equal(data.val.images, written["test"].images)
    assert describe_data("cifar100", train=str(tmp_path), val="") == data.info


def test_the_papers_augmentation(tmp_path: Path, write_cifar_shard: Callable[..., Samples]) -> None:
    write_cifar_shard(tmp_path / "train.tar", 8)
    write_cifar_shard(tmp_path / "val.tar", 8)
    data = open_data("cifar10", train=str(tmp_path), val="", seed=0)
    assert (data.preparation.pad, data.preparation.flip) == (4, True)
    batch = next(data.train_loader(batch_size=8).epoch(0))
    assert batch.images.shape == (8, 3, 32, 32)
    still = next(data.train_loader(batch_size=8, augment=False).epoch(0))
    assert batch.labels.tolist() == still.labels.tolist()
    assert not np.array_equal(batch.images.numpy(), still.images.numpy())


def test_labels_of_another_set_are_refused(tmp_path: Path, write_cifar_shard: Callable[..., Samples]) -> None:
    write_cifar_shard(tmp_path / "train.tar", 50, classes=100)
    write_cifar_shard(tmp_path / "test.tar", 2)
    with pytest.raises(DataError, match=r"is not a number 0 \.\.\. 9") as caught:
        open_data("cifar10", train=str(tmp_path), val="", seed=0)
    assert "data.name" in caught.value.hint


def test_a_missing_validation_split_is_found_missing_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "train.tar").write_bytes(b"not even a tar")
    with pytest.raises(DataError, match="the val split of CIFAR-10"):
        open_data("cifar10", train=str(tmp_path), val="", seed=0)


def test_a_count_that_is_not_known_is_said_to_be_so(
    tmp_path: Path, write_cifar_shard: Callable[..., Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar_shard(tmp_path / "train-0.tar", 30)
    write_cifar_shard(tmp_path / "train-1.tar", 1)
    write_cifar_shard(tmp_path / "test.tar", 1)
    monkeypatch.setattr("petractl.data.shards.COUNT_LIMIT_BYTES", 50_000)
    info = describe_data("cifar10", train=str(tmp_path), val="")
    assert (info.train_samples, info.val_samples) == (UNKNOWN, 1)


def test_the_test_data_alone(tmp_path: Path, write_cifar_shard: Callable[..., Samples]) -> None:
    """What evaluates a net needs no training data, not even that they are there."""
    val = write_cifar_shard(tmp_path / "c-val.tar", 4)
    places = {"train": str(tmp_path / "gone"), "val": str(tmp_path / "c-val.tar"), "test_only": True}
    data = open_data("cifar10", seed=0, **places)
    assert (len(data.train), len(data.val)) == (0, 4)
    assert np.array_equal(data.val.images, val.images)
    assert describe_data("cifar10", **places) == data.info
