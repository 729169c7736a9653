from collections.abc import Callable
from pathlib import Path

import pytest

from petractl.data.cifar_batches import CIFAR10
from petractl.data.writing.sources import Wanted, kind_of, open_sources
from petractl.errors import DataError, UserError


def found(source: Path, **wanted) -> list[tuple[str | None, int]]:
    sources = open_sources(str(source), kind_of(str(source)), Wanted(**wanted))
    return [(split.split, split.count) for split in sources]


def test_a_folder_of_both_splits(both_splits: Path) -> None:
    assert kind_of(str(both_splits)) == "folder"
    assert found(both_splits) == [("train", 12), ("val", 4)]
    assert found(both_splits, split="val") == [("val", 4)]


def test_val_is_numbered_by_the_classes_of_train(both_splits: Path) -> None:
    val = open_sources(str(both_splits), "folder", Wanted())[1]
    assert val.class_names == ("ant", "bee", "cat")
    assert sorted({val.samples.read(index).label for index in range(4)}) == [0, 2]


def test_a_folder_of_classes_says_its_split_by_its_name(
    both_splits: Path, tmp_path: Path, write_folder
) -> None:
    assert found(both_splits / "train") == [("train", 12)]
    assert found(write_folder(tmp_path / "photographs")) == [(None, 12)]
    assert found(tmp_path / "photographs", split="val") == [("val", 12)]


def test_test_is_as_good_as_val(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    write_folder(tmp_path / "src" / "train")
    write_folder(tmp_path / "src" / "test")
    assert found(tmp_path / "src") == [("train", 12), ("val", 12)]


def test_batches(tmp_path: Path, write_cifar_batches) -> None:
    write_cifar_batches(tmp_path, (*CIFAR10.train_files, "test_batch"))
    assert kind_of(str(tmp_path)) == "cifar"
    assert found(tmp_path) == [("train", 20), ("val", 4)]


def test_shards(tmp_path: Path, write_cifar_shard) -> None:
    for name in ("a-train-0.tar", "a-train-1.tar", "a-test-0.tar"):
        write_cifar_shard(tmp_path / name, 3)
    assert found(tmp_path, classes=10) == [("train", 6), ("val", 3)]
    assert found(tmp_path / "a-train-{0..1}.tar", classes=10) == [("train", 6)]
    assert found(tmp_path / "a-test-0.tar", classes=10) == [("val", 3)]


def test_compressed_shards_of_folders_named_for_the_split(tmp_path: Path, write_cifar_shard) -> None:
    write_cifar_shard(tmp_path / "src" / "train" / "0.tar.gz", 3)
    write_cifar_shard(tmp_path / "src" / "val" / "0.tar.gz", 2)
    cache = tmp_path / "cache"
    assert found(tmp_path / "src", classes=10, cache=str(cache)) == [("train", 3), ("val", 2)]
    assert len(list(cache.glob("*.tar"))) == 2


def test_shards_that_name_no_split(tmp_path: Path, write_cifar_shard) -> None:
    write_cifar_shard(tmp_path / "data" / "0.tar", 3)
    assert found(tmp_path / "data", classes=10) == [(None, 3)]
    assert found(tmp_path / "data", classes=10, split="train") == [("train", 3)]


def test_shards_need_a_number_of_classes(tmp_path: Path, write_cifar_shard) -> None:
    write_cifar_shard(tmp_path / "0.tar", 3)
    with pytest.raises(UserError, match="--classes: must be given"):
        found(tmp_path)


def test_what_is_missing(tmp_path: Path, both_splits: Path, write_cifar_shard) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds nothing that shards are made of"):
        found(tmp_path / "empty")
    with pytest.raises(DataError, match="no such file"):
        found(tmp_path / "nothing")
    with pytest.raises(DataError, match="there is no folder"):
        open_sources(str(tmp_path / "nothing"), "folder", Wanted())
    write_cifar_shard(tmp_path / "shards" / "train-0.tar", 3)
    with pytest.raises(DataError, match="holds no shard of the val split"):
        found(tmp_path / "shards", split="val", classes=10)
    with pytest.raises(DataError, match="no batches of cifar of the val split"):
        open_sources(str(both_splits), "cifar", Wanted(split="val"))


def test_classes_that_are_known_need_not_be_said(both_splits: Path) -> None:
    assert found(both_splits, classes=3) == found(both_splits)
    with pytest.raises(UserError, match=r"--classes: 4, but .* has 3"):
        found(both_splits, classes=4)
