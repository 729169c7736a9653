import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from petractl.data.cifar_batches import CIFAR10, CIFAR100, CifarFormat
from petractl.data.cifar_files import Part, find_split
from petractl.data.places import Split
from petractl.data.values import Samples
from petractl.errors import DataError


def _labels(parts: list[Part]) -> list[int]:
    return [int(label) for part in parts for label in part.load().labels]


@pytest.fixture
def shards(tmp_path: Path, write_cifar_shard: Callable[..., Samples]) -> dict[str, list[int]]:
    """Three shards in `tmp_path / "shards"`; their labels by name."""
    names = ["c-train-00.tar", "c-train-01.tar.gz", "c-test-00.tar"]
    return {
        name: write_cifar_shard(tmp_path / "shards" / name, 3, seed=seed).labels.tolist()
        for seed, name in enumerate(names)
    }


def test_a_folder_of_shards_is_told_apart_by_names(tmp_path: Path, shards: dict[str, list[int]]) -> None:
    places = [str(tmp_path / "shards")]
    train = find_split(CIFAR10, "train", places=places)
    val = find_split(CIFAR10, "val", places=places)
    assert _labels(train) == shards["c-train-00.tar"] + shards["c-train-01.tar.gz"]
    assert _labels(val) == shards["c-test-00.tar"]
    assert [part.count() for part in train] == [3, 3]


def test_lists_and_patterns_keep_their_order(tmp_path: Path, shards: dict[str, list[int]]) -> None:
    folder = tmp_path / "shards"
    parts = find_split(
        CIFAR10, "train", places=[f"{folder}/c-train-01.tar.gz", f"{folder}/c-t{{rain,est}}-00.tar"]
    )
    assert _labels(parts) == [
        *shards["c-train-01.tar.gz"],
        *shards["c-train-00.tar"],
        *shards["c-test-00.tar"],
    ]


def test_shards_that_name_no_split_are_those_of_the_folder_given(
    tmp_path: Path, write_cifar_shard: Callable[..., Samples]
) -> None:
    expected = write_cifar_shard(tmp_path / "mine" / "part-0.tar", 3)
    parts = find_split(CIFAR10, "val", places=[str(tmp_path / "mine")])
    assert _labels(parts) == expected.labels.tolist()


def test_a_training_folder_is_never_validated_on_unasked(
    tmp_path: Path, write_cifar_shard: Callable[..., Samples]
) -> None:
    write_cifar_shard(tmp_path / "mine" / "part-0.tar", 3)
    with pytest.raises(DataError, match="the val split of CIFAR-10 is not in"):
        find_split(CIFAR10, "val", places=(), train_places=[str(tmp_path / "mine")])


def test_the_validation_split_stands_beside_the_training_split(
    tmp_path: Path, shards: dict[str, list[int]]
) -> None:
    parts = find_split(CIFAR10, "val", places=(), train_places=[str(tmp_path / "shards")])
    assert _labels(parts) == shards["c-test-00.tar"]


@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100], ids=lambda kind: str(kind.name))
@pytest.mark.parametrize("suffix", ["", ".bin"], ids=["pickled", "binary"])
@pytest.mark.parametrize("place", ["outer", "inner", "renamed"])
def test_the_authors_folders(
    tmp_path: Path,
    write_cifar_batches: Callable[..., dict[str, Samples]],
    kind: CifarFormat,
    suffix: str,
    place: str,
) -> None:
    folder = tmp_path / "outer" / (kind.binary_folder if suffix else kind.pickled_folder)
    names = [name + suffix for name in (*kind.train_files, *kind.val_files)]
    written = write_cifar_batches(folder, names, classes=kind.classes)
    if place == "renamed":
        shutil.move(folder, tmp_path / "renamed")
    given = {"outer": tmp_path / "outer", "inner": folder, "renamed": tmp_path / "renamed"}[place]
    splits: list[tuple[Split, tuple[str, ...]]] = [("train", kind.train_files), ("val", kind.val_files)]
    for split, files in splits:
        parts = find_split(kind, split, places=[str(given)])
        expected = np.concatenate([written[name + suffix].images for name in files])
        assert np.array_equal(np.concatenate([part.load().images for part in parts]), expected)
        assert sum(part.count() for part in parts) == len(expected)


def test_a_missing_batch_is_named(
    tmp_path: Path, write_cifar_batches: Callable[..., dict[str, Samples]]
) -> None:
    write_cifar_batches(tmp_path, ["data_batch_1", "data_batch_2", "data_batch_4"])
    with pytest.raises(DataError, match="data_batch_3, data_batch_5 missing"):
        find_split(CIFAR10, "train", places=[str(tmp_path)])


@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100], ids=lambda kind: str(kind.name))
def test_a_missing_set_says_what_to_get_and_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: CifarFormat
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=f"the train split of {kind.title} is not in data/{kind.name}"
    ) as caught:
        find_split(kind, "train", places=())
    assert caught.value.where == "data.train"
    for told in (
        "no folder",
        "python.tar.gz",
        "University of Toronto",
        f"data/{kind.name}",
        kind.pickled_folder,
    ):
        assert told in caught.value.hint


def test_an_archive_that_was_not_unpacked_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "cifar10"
    folder.mkdir(parents=True)
    (folder / "cifar-10-python.tar.gz").touch()
    with pytest.raises(DataError) as caught:
        find_split(CIFAR10, "train", places=())
    assert "data/cifar10 holds: cifar-10-python.tar.gz" in caught.value.hint
