import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from petractl.data.cifar_batches import CIFAR10, CIFAR100
from petractl.data.decoding import decode
from petractl.data.values import Samples
from petractl.data.writing.batches import cifar_class_names, find_cifar, open_cifar, open_imagenet32
from petractl.errors import DataError

Write = Callable[..., dict[str, Samples]]


@pytest.mark.parametrize("suffix", ["", ".bin"])
def test_the_pixels_of_cifar_survive(tmp_path: Path, write_cifar_batches: Write, suffix: str) -> None:
    names = [name + suffix for name in CIFAR10.train_files]
    folder = tmp_path / ("cifar-10-batches-bin" if suffix else "cifar-10-batches-py")
    written = write_cifar_batches(folder, names, count=3)
    found = find_cifar(tmp_path, "train")
    assert found is not None
    store = open_cifar(*found)
    assert (store.sizes, store.classes) == ((3,) * 5, 10)
    for index in range(15):
        sample, batch = store.read(index), written[names[index // 3]]
        assert np.array_equal(decode(sample.image).transpose(2, 0, 1), batch.images[index % 3])
        assert sample.label == batch.labels[index % 3]
        assert sample.key == f"data_batch_{index // 3 + 1}_{index % 3}"


def test_a_split_that_is_not_there(tmp_path: Path, write_cifar_batches: Write) -> None:
    write_cifar_batches(tmp_path, ["test"], classes=100)
    assert find_cifar(tmp_path, "train") is None
    found = find_cifar(tmp_path, "val")
    assert found is not None
    assert found[0] is CIFAR100


def test_a_batch_that_is_missing(tmp_path: Path, write_cifar_batches: Write) -> None:
    write_cifar_batches(tmp_path, CIFAR10.train_files[:4])
    with pytest.raises(DataError, match="data_batch_5 missing beside"):
        find_cifar(tmp_path, "train")


def test_the_names_of_classes(tmp_path: Path) -> None:
    assert cifar_class_names(CIFAR10, tmp_path) == ()
    (tmp_path / "batches.meta.txt").write_text("a b c d e f g h i j\n\n")
    assert cifar_class_names(CIFAR10, tmp_path) == tuple("abcdefghij")
    names = [f"name {number}".encode() for number in range(100)]
    (tmp_path / "meta").write_bytes(pickle.dumps({b"fine_label_names": names}, protocol=2))
    assert cifar_class_names(CIFAR100, tmp_path)[99] == "name 99"
    (tmp_path / "meta").write_bytes(pickle.dumps({b"fine_label_names": names[:9]}, protocol=2))
    assert cifar_class_names(CIFAR100, tmp_path) == ()


def test_imagenet32(tmp_path: Path) -> None:
    assert open_imagenet32(tmp_path, "val") is None
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    table = {"data": pixels, "labels": [1, 1000, 7, 7], "mean": np.zeros(3072)}
    (tmp_path / "val_data").write_bytes(pickle.dumps(table))
    store = open_imagenet32(tmp_path, "val")
    assert store is not None
    assert [store.read(index).label for index in range(4)] == [0, 999, 6, 6]
    image = decode(store.read(1).image)
    assert np.array_equal(image.transpose(2, 0, 1).reshape(-1), pixels[1])
