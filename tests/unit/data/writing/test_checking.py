import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from petractl.data.shard_index import INDEX_NAME
from petractl.data.writing.building import BuildOptions, build_shards
from petractl.data.writing.checking import check_shards
from petractl.errors import DataError, UserError


@pytest.fixture
def shards(both_splits: Path, tmp_path: Path) -> Path:
    build_shards(str(both_splits), tmp_path / "out", BuildOptions(samples_per_shard=6))
    return tmp_path / "out"


def faults(place: Path, **options: int) -> list[tuple[str, str, str]]:
    report = check_shards(str(place), **options)
    return [(Path(fault.shard).name, fault.key, fault.reason) for fault in report.faults]


def change_index(folder: Path, change: Callable[[dict], None]) -> None:
    table = json.loads((folder / INDEX_NAME).read_text())
    change(table)
    (folder / INDEX_NAME).write_text(json.dumps(table))


def test_nothing_is_wrong(shards: Path) -> None:
    report = check_shards(str(shards))
    assert (report.shards, report.samples, report.classes, report.faults) == (3, 16, 3, ())
    assert check_shards(str(shards / "train-{000000..000001}.tar")).samples == 12
    assert check_shards(str(shards / INDEX_NAME)).samples == 16
    assert check_shards(str(shards.parent / "out"), workers=1).faults == ()


def test_a_byte_has_changed(shards: Path) -> None:
    path = shards / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[-1] = 0 if content[-1] else 1
    path.write_bytes(content)
    found = faults(shards)
    assert found[-1][0] == "train-000000.tar"
    assert "SHA-256" in " ".join(fault[2] for fault in found)


def test_a_shard_is_truncated(shards: Path) -> None:
    path = shards / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:4000])
    reasons = [reason for _, _, reason in faults(shards)]
    assert any(reason.startswith("it is truncated") for reason in reasons)
    assert "it has 4000 bytes" in " ".join(reasons)
    assert "samples, and index.json says 6" in " ".join(reasons)


def test_shards_and_index_differ(shards: Path) -> None:
    (shards / "val-000000.tar").unlink()
    shutil.copy(shards / "train-000000.tar", shards / "train-000009.tar")
    assert faults(shards)[:2] == [
        ("val-000000.tar", "", "it is missing: index.json lists it"),
        ("train-000009.tar", "", "it is not in index.json"),
    ]


def test_shards_that_the_index_lacks_are_told_wherever_they_are_named(shards: Path) -> None:
    unlisted = ("train-000009.tar", "", "it is not in index.json")
    shutil.copy(shards / "train-000000.tar", shards / unlisted[0])
    same = ("train-000009.tar", "", f"it is the same as {shards / 'train-000000.tar'}, so that its samples")
    found = faults(shards / INDEX_NAME)
    assert found == [unlisted]
    found = faults(shards / "train-{000000,000009}.tar")
    assert found[0] == unlisted
    assert found[1][2].startswith(same[2])
    assert len(found) == 2


def test_a_shard_that_stands_there_twice(shards: Path) -> None:
    shutil.copy(shards / "train-000001.tar", shards / "train-000000.tar")
    found = faults(shards)
    assert found[0][:2] == ("train-000000.tar", "")
    assert "SHA-256" in found[0][2]
    same = f"it is the same as {shards / 'train-000000.tar'}, so that its samples count twice"
    assert found[1:] == [("train-000001.tar", "", same)]


def test_splits_that_share_a_shard_without_an_index(tmp_path: Path, write_cifar_shard) -> None:
    write_cifar_shard(tmp_path / "x" / "train-0.tar", 3)
    write_cifar_shard(tmp_path / "x" / "train-1.tar", 3, seed=1)
    (tmp_path / "x" / "val-0.tar").symlink_to(tmp_path / "x" / "train-1.tar")
    same = f"it is the same as {tmp_path / 'x' / 'train-1.tar'}, so that its samples count twice"
    assert faults(tmp_path / "x") == [("val-0.tar", "", same)]


def test_the_index_is_damaged(shards: Path) -> None:
    (shards / INDEX_NAME).write_text("{")
    found = faults(shards)
    assert len(found) == 1
    assert found[0][0] == INDEX_NAME
    assert "no JSON" in found[0][2]


def test_labels_are_compared_with_the_classes(shards: Path) -> None:
    change_index(shards, lambda table: table.update(classes=2, class_names=["ant", "bee"]))
    found = faults(shards)
    assert len(found) == 6
    assert {reason for _, _, reason in found} == {"its label 2 is not a number 0 ... 1"}
    assert all(key.endswith(tuple(f"cat_{number}" for number in range(4))) for _, key, _ in found)
    with pytest.raises(UserError, match="but the index says 2"):
        check_shards(str(shards), classes=3)


def test_sizes_are_compared_with_the_index(shards: Path) -> None:
    change_index(shards, lambda table: table.update(image_size=[24, 24]))
    found = faults(shards)
    assert len(found) == 16
    assert found[0][2] == "its image is 32x24, and index.json says 24x24"


def test_every_sample_is_decoded(tmp_path: Path, write_shard, picture: Callable[..., bytes]) -> None:
    good = picture(0, size=(64, 64))
    entries = [
        ("a.jpg", good),
        ("a.cls", b"0"),
        ("b.jpg", good[: len(good) // 2]),
        ("b.cls", b"1"),
        ("c.jpg", good),
        ("d.jpg", good),
        ("d.cls", b"one"),
        ("e.jpg", good),
        ("e.cls", b"5"),
        ("f.jpg", b""),
        ("f.cls", b"0"),
        ("a.jpg", good),
        ("a.cls", b"0"),
    ]
    write_shard(tmp_path / "x" / "0.tar", entries)
    found = faults(tmp_path / "x", classes=5)
    assert [key for _, key, _ in found] == ["a", "b", "c", "d", "e", "f"]
    starts = (
        "its key stands in the shard more than once",
        "its JPEG cannot be decoded",
        "it has no label",
        "its label 'one' is not a number",
        "its label 5 is not a number 0 ... 4",
        "its image is empty",
    )
    for (_, _, reason), start in zip(found, starts, strict=True):
        assert reason.startswith(start)
    assert check_shards(str(tmp_path / "x")).classes == 0


def test_samples_that_a_run_would_not_see(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    good = picture(0)
    (tmp_path / "x").mkdir()
    with tarfile.open(tmp_path / "x" / "0.tar", "w") as archive:
        for name, content in [
            ("a.jpg", good),
            ("a.cls", b"0"),
            ("a.mask.png", good),
            ("b.v1.jpg", good),
            ("b.v1.cls", b"1"),
            ("../c.jpg", good),
            ("../c.cls", b"1"),
            ("d.cls", b"1"),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("d.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        archive.addfile(link)
    found = faults(tmp_path / "x", classes=5)
    assert found[0] == (
        "0.tar",
        "b.v1.jpg",
        "a run passes it over, since its key would hold a dot, and 1 more such file",
    )
    assert [key for _, key, _ in found[1:]] == ["../c", "d"]
    assert "leads out" in found[1][2]
    assert "link" in found[2][2]


def test_folders_of_splits_and_compressed_shards(tmp_path: Path, write_cifar_shard, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    write_cifar_shard(tmp_path / "x" / "train" / "0.tar.gz", 3)
    write_cifar_shard(tmp_path / "x" / "val" / "0.tar", 2)
    report = check_shards(str(tmp_path / "x"))
    assert (report.shards, report.samples, report.faults) == (2, 5, ())
    (tmp_path / "x" / "train" / "0.tar.gz").write_bytes(b"\x1f\x8b\x08 no gzip")
    found = faults(tmp_path / "x")
    assert len(found) == 1
    assert "cannot be unpacked" in found[0][2]


def test_nothing_to_check(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no shard"):
        check_shards(str(tmp_path))
    with pytest.raises(DataError, match="no such file"):
        check_shards(str(tmp_path / "nothing"))
