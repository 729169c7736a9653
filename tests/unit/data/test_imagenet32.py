import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from petractl.data import UNKNOWN, Data, Samples, describe_data, open_data
from petractl.data.imagenet32 import find_imagenet32, read_imagenet32_batch
from petractl.errors import DataError

TRAIN = [f"train_data_batch_{number}" for number in range(1, 11)]


def table(count: int, *, seed: int = 0, pixels: int = 3072) -> dict[str, object]:
    generator = np.random.default_rng(seed)
    return {
        "data": generator.integers(0, 256, (count, pixels), dtype=np.uint8),
        "labels": [int(label) for label in generator.integers(1, 1001, count)],
        "mean": generator.random(pixels),
    }


def write(path: Path, content: object, *, protocol: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def write_set(folder: Path, *, train: str = "", val: str = "") -> dict[str, dict[str, object]]:
    tables = {name: table(2, seed=seed) for seed, name in enumerate([*TRAIN, "val_data"])}
    for name, content in tables.items():
        write(folder / (val if name == "val_data" else train) / name, content)
    return tables


def opened(**places: object) -> Data:
    data = open_data("imagenet32", **{"train": "", "val": "", "seed": 0, **places})
    assert isinstance(data, Data)
    return data


@pytest.mark.parametrize(
    ("train", "val"), [("", ""), ("Imagenet32_train", "Imagenet32_val"), ("train", "val")]
)
def test_the_authors_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: str, val: str) -> None:
    monkeypatch.chdir(tmp_path)
    tables = write_set(tmp_path / "data" / "imagenet32", train=train, val=val)
    data = opened()
    assert (data.info.classes, data.info.channels, data.info.height) == (1000, 3, 32)
    expected = np.concatenate([np.asarray(tables[name]["data"]) for name in TRAIN])
    np.testing.assert_array_equal(data.train.images.reshape(20, -1), expected)
    labels = [label - 1 for name in TRAIN for label in tables[name]["labels"]]  # type: ignore[union-attr]
    assert data.train.labels.tolist() == labels
    assert (len(data.val), data.preparation.pad, data.preparation.flip) == (2, 4, True)


def test_it_is_described_without_being_read(tmp_path: Path) -> None:
    for name in [*TRAIN, "val_data"]:
        (tmp_path / name).write_bytes(b"not read")
    info = describe_data("imagenet32", train=str(tmp_path), val="")
    assert (info.train_samples, info.val_samples) == (1_281_167, 50_000)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_batch_of_any_protocol(tmp_path: Path, protocol: int) -> None:
    content = table(3)
    samples = read_imagenet32_batch(write(tmp_path / "x", content, protocol=protocol))
    np.testing.assert_array_equal(samples.images.reshape(3, -1), content["data"])


def test_a_batch_of_python_2_and_labels_as_an_array(tmp_path: Path) -> None:
    content = table(3)
    as_bytes = {key.encode(): value for key, value in content.items()} | {
        b"labels": np.array(content["labels"])
    }
    samples = read_imagenet32_batch(write(tmp_path / "x", as_bytes))
    assert (samples.labels + 1).tolist() == content["labels"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([1, 2], "no 'data' and no 'labels'"),
        ({"data": [1, 2], "labels": [1, 2]}, "not uint8"),
        ({**table(2), "labels": [1]}, "not 2 integers"),
        ({**table(2), "labels": [0, 1]}, "image 0 has label 0, outside 1 ... 1000"),
        ({**table(2), "labels": [5, 1001]}, "image 1 has label 1001"),
        (table(2, pixels=3 * 64 * 64), "not uint8 (n, 3072)"),
        (table(0), "it holds no image"),
        ({"data": Path("x"), "labels": [1]}, "which no data set needs"),
    ],
)
def test_what_is_not_a_batch(tmp_path: Path, content: object, what: str) -> None:
    path = write(tmp_path / "train_data_batch_1", content, protocol=4)
    with pytest.raises(DataError) as caught:
        read_imagenet32_batch(path)
    assert what in caught.value.what
    assert caught.value.where == str(path)


def test_missing_batches_are_named(tmp_path: Path) -> None:
    assert find_imagenet32(tmp_path, "train") == []
    write_set(tmp_path)
    (tmp_path / "train_data_batch_10").unlink()
    with pytest.raises(DataError, match="train_data_batch_10 missing beside the other"):
        find_imagenet32(tmp_path, "train")
    assert find_imagenet32(tmp_path, "val") == [tmp_path / "val_data"]


def test_a_missing_set_says_what_to_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="train split of ImageNet32 is not in data/imagenet32") as caught:
        opened()
    assert "Imagenet32_train.zip" in caught.value.hint
    assert "image-net.org" in caught.value.hint


def test_shards(tmp_path: Path, write_cifar_shard: Callable[..., Samples]) -> None:
    train = write_cifar_shard(tmp_path / "train-0.tar", 6, classes=1000)
    write_cifar_shard(tmp_path / "val-0.tar", 2, classes=1000)
    data = opened(train=str(tmp_path))
    np.testing.assert_array_equal(data.train.images, train.images)
    assert len(data.val) == 2
    assert describe_data("imagenet32", train=str(tmp_path), val="") == data.info


def test_a_test_set_alone(tmp_path: Path) -> None:
    write(tmp_path / "val_data", table(3))
    data = opened(val=str(tmp_path / "val_data"), test_only=True)
    assert (data.info.train_samples, data.info.val_samples) == (0, 3)
    assert UNKNOWN not in (data.info.train_samples, data.info.val_samples)
