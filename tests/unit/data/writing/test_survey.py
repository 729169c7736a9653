from collections.abc import Callable
from pathlib import Path

import pytest

from petractl.data.writing.building import BuildOptions, build_shards
from petractl.data.writing.survey import survey_shards
from petractl.errors import DataError


def test_parts_and_classes(both_splits: Path, tmp_path: Path) -> None:
    build_shards(str(both_splits), tmp_path / "out", BuildOptions(samples_per_shard=6, name="set"))
    survey = survey_shards(str(tmp_path / "out"))
    assert (survey.classes, survey.class_names, survey.faults) == (3, ("ant", "bee", "cat"), ())
    train, val = survey.parts
    assert (train.name, len(train.shards), train.samples, train.per_class) == ("set-train", 2, 12, (4, 4, 4))
    assert (val.name, len(val.shards), val.samples, val.per_class) == ("set-val", 1, 4, (2, 0, 2))
    assert train.bytes == sum(Path(shard).stat().st_size for shard in train.shards)
    assert train.sizes is not None
    assert (train.sizes.median, train.sizes.looked_at) == ((24, 32), 0)


def test_sizes_that_no_index_says(tmp_path: Path, write_shard, picture: Callable[..., bytes]) -> None:
    entries = []
    for number, size in enumerate([(10, 20), (30, 30), (40, 20)]):
        entries += [(f"{number}.jpg", picture(number, size=size)), (f"{number}.cls", b"1")]
    write_shard(tmp_path / "x.tar", [*entries, ("bad.jpg", b"bad"), ("bad.cls", b"0")])
    survey = survey_shards(str(tmp_path))
    sizes = survey.parts[0].sizes
    assert sizes is not None
    assert (sizes.smallest, sizes.median, sizes.largest) == ((10, 20), (40, 20), (30, 30))
    assert sizes.looked_at == 3
    assert (survey.classes, survey.parts[0].per_class) == (0, (1, 3))


def test_damage_is_told_and_the_rest_counted(tmp_path: Path, write_shard, picture) -> None:
    good = picture(0)
    write_shard(tmp_path / "a-0.tar", [("0.jpg", good), ("0.cls", b"0"), ("1.jpg", good)])
    write_shard(tmp_path / "a-1.tar", [("2.jpg", good), ("2.cls", b"0")])
    path = tmp_path / "a-1.tar"
    path.write_bytes(path.read_bytes()[:700])
    survey = survey_shards(str(tmp_path))
    assert [(Path(fault.shard).name, fault.reason[:18]) for fault in survey.faults] == [
        ("a-0.tar", "1 sample is damaged"[:18]),
        ("a-1.tar", "it is truncated: i"),
    ]
    assert survey.parts[0].samples == 2


def test_folders_of_the_same_names(tmp_path: Path, write_cifar_shard) -> None:
    write_cifar_shard(tmp_path / "train" / "shard-0.tar", 3)
    write_cifar_shard(tmp_path / "val" / "shard-0.tar", 2)
    survey = survey_shards(str(tmp_path))
    assert [(part.name, part.samples) for part in survey.parts] == [("train/shard", 3), ("val/shard", 2)]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no shard"):
        survey_shards(str(tmp_path))
