import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from petractl.data.cifar_batches import (
    CIFAR10,
    CIFAR100,
    CifarFormat,
    count_binary_batch,
    count_pickled_batch,
    read_binary_batch,
    read_pickled_batch,
)
from petractl.data.values import Samples
from petractl.errors import DataError

_ROWS = np.zeros((2, 3072), dtype=np.uint8)


@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100], ids=lambda kind: str(kind.name))
def test_both_formats_give_what_was_written(
    tmp_path: Path, write_cifar_batches: Callable[..., dict[str, Samples]], kind: CifarFormat
) -> None:
    written = write_cifar_batches(tmp_path, ["a", "b.bin"], classes=kind.classes)
    for name, samples in (
        ("a", read_pickled_batch(tmp_path / "a", kind=kind)),
        ("b.bin", read_binary_batch(tmp_path / "b.bin", kind=kind)),
    ):
        assert np.array_equal(samples.images, written[name].images)
        assert np.array_equal(samples.labels, written[name].labels)
        assert samples.images.flags.c_contiguous
    assert count_pickled_batch(tmp_path / "a", kind=kind) == 4
    assert count_binary_batch(tmp_path / "b.bin", kind=kind) == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "it holds a list"),
        ({"data": _ROWS}, "it has no 'labels'"),
        ({}, "it has no 'data' and no 'labels'"),
        ({"data": _ROWS, "labels": [0]}, "its labels are"),
        ({"data": _ROWS, "labels": [0, 10]}, r"image 1 has label 10, outside 0 \.\.\. 9"),
        ({"data": _ROWS, "labels": [-1, 0]}, "image 0 has label -1"),
        ({"data": _ROWS, "labels": "ab"}, "expected an array"),
        ({"data": _ROWS.astype(float), "labels": [0, 1]}, "its data are float64"),
        ({"data": _ROWS[:, :99], "labels": [0, 1]}, "its data are uint8"),
        ({"data": _ROWS[:0], "labels": _ROWS[:0, 0]}, "no image"),
    ],
)
def test_a_bad_pickled_batch_is_named(tmp_path: Path, content: object, said: str) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(DataError, match=said) as caught:
        read_pickled_batch(path, kind=CIFAR10)
    assert caught.value.where == str(path)


def test_a_bad_binary_batch_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data_batch_1.bin"
    for content in (b"", bytes(3072), bytes(3074)):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not whole rows of 3073 bytes"):
            read_binary_batch(path, kind=CIFAR10)
    path.write_bytes(b"\x0a" + bytes(3072))
    with pytest.raises(DataError, match="image 0 has label 10"):
        read_binary_batch(path, kind=CIFAR10)
