from pathlib import Path

import numpy as np
import pytest
from fashion_mnist_cases import idx, images_of, write

from petractl.data import Data, describe_data, open_data
from petractl.data.fashion_mnist import read_idx
from petractl.errors import DataError


def opened(**places: object) -> Data:
    data = open_data("fashion-mnist", **{"train": "", "val": "", "seed": 3, **places})
    assert isinstance(data, Data)
    return data


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("inner", ["", "FashionMNIST/raw", "raw"])
def test_the_authors_files(tmp_path: Path, zipped: bool, inner: str) -> None:
    write(tmp_path / inner, zipped=zipped)
    data = opened(train=str(tmp_path))
    assert (data.info.channels, data.info.height, data.info.classes) == (1, 28, 10)
    np.testing.assert_array_equal(data.train.images[:, 0], images_of("train"))
    np.testing.assert_array_equal(data.val.images[:, 0], images_of("t10k"))
    assert data.train.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert describe_data("fashion-mnist", train=str(tmp_path), val="") == data.info


def test_the_usual_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "fashion-mnist")
    data = opened()
    assert (len(data.train), len(data.val), data.seed, data.resident) == (12, 5, 3, False)
    batch = next(iter(data.train_loader(batch_size=4).epoch(0)))
    assert batch.images.shape == (4, 1, 28, 28)
    assert opened(resident=True).resident


def test_the_test_files_alone(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    data = opened(val=str(tmp_path), test_only=True)
    assert (data.info.train_samples, data.info.val_samples) == (0, 5)


def test_a_missing_set_says_what_to_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="train split of Fashion-MNIST is not in data/") as caught:
        opened()
    assert caught.value.where == "data.train"
    for word in ("download = true", "zalandoresearch/fashion-mnist", "train-images-idx3-ubyte.gz"):
        assert word in caught.value.hint


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "not an IDX file"),
        (b"\x1f\x8b\x08", "cannot be read"),
        (idx(np.zeros((3, 28, 28)))[:-1], "holds 2351 bytes"),
        (idx(np.zeros(3)), "not an IDX file of bytes with 3 dimensions"),
        (idx(np.zeros((12, 28, 27))), "not (12, 28, 28)"),
        (idx(np.zeros((11, 28, 28))), "not (12, 28, 28)"),
    ],
)
def test_damaged_images(tmp_path: Path, content: bytes, what: str) -> None:
    write(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        opened(train=str(tmp_path))
    assert what in caught.value.what
    assert caught.value.where == str(path)


def test_labels_out_of_range(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(np.array([0, 1, 2, 3, 10])))
    with pytest.raises(DataError, match="not 10 classes"):
        opened(train=str(tmp_path))


def test_other_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one folder, not in 2 places"):
        opened(train=["a", "b"])
    with pytest.raises(DataError, match="has image_size 28, not 32"):
        opened(train=str(tmp_path), image_size=32)


def test_reading_a_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(idx(np.arange(6).reshape(2, 3)))
    assert read_idx(path, dimensions=2).tolist() == [[0, 1, 2], [3, 4, 5]]
