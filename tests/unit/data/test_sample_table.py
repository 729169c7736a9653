import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from petractl.data.sample_table import lost_table, read_table

_ENTRIES = [
    ("a/000.jpg", b"first image"),
    ("a/000.cls", b"3"),
    ("a/000.json", b"{}"),
    ("a/001.cls", b" 12\n"),
    ("a/001.PNG", b"second image" * 100),
]

Write = Callable[..., Path]


def test_samples_in_order(tmp_path: Path, write_shard: Write) -> None:
    path = write_shard(tmp_path / "s.tar", _ENTRIES)
    table = read_table(path)
    assert [table.key(row) for row in range(len(table))] == ["a/000", "a/001"]
    assert table.labels.tolist() == [3, 12]
    whole = path.read_bytes()
    images = [whole[o : o + n] for o, n in zip(table.offsets, table.sizes, strict=True)]
    assert images == [b"first image", b"second image" * 100]
    assert (table.reasons, table.damage) == ({}, "")
    assert table.stamp[0] == len(whole)


def test_other_names_of_the_entries(tmp_path: Path, write_shard: Write) -> None:
    entries = [
        ("0.image.webp", b"i"),
        ("0.jpg", b"j"),
        ("0.label", b"1"),
        ("0.cls", b"9"),
        ("0.pyd", b"harm"),
    ]
    table = read_table(
        write_shard(tmp_path / "s.tar", entries), image_entries=("image.webp",), label_entry="label"
    )
    assert (table.labels.tolist(), table.sizes.tolist(), table.reasons) == ([1], [1], {})


def test_of_several_images_the_first_named_entry_counts(tmp_path: Path, write_shard: Write) -> None:
    path = write_shard(tmp_path / "s.tar", [("0.png", b"png"), ("0.cls", b"1"), ("0.jpg", b"jpeg")])
    assert read_table(path).sizes.tolist() == [4]
    assert read_table(path, image_entries=("png", "jpg")).sizes.tolist() == [3]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"b.jpg": None}, "no image (b.jpg or b.jpeg or b.png beside it in the tar)"),
        ({"b.cls": None}, "no label (b.cls beside it in the tar)"),
        ({"b.cls": b""}, "its label '' is not a number"),
        ({"b.cls": b"cat"}, "its label 'cat' is not a number"),
        ({"b.cls": b"-1"}, "its label '-1' is not a number"),
        ({"b.cls": b"1.0"}, "its label '1.0' is not a number"),
        ({"b.cls": b"\xd9\xa3"}, "is not a number"),
        ({"b.cls": b"9" * 30}, "is not a number"),
        ({"b.cls": b" " * 33}, "its label is 33 bytes"),
    ],
)
def test_a_bad_sample_keeps_its_place_with_the_reason(
    tmp_path: Path, write_shard: Write, change: dict[str, bytes | None], said: str
) -> None:
    entries = {f"{key}.{ending}": b"1" for key in "abc" for ending in ("jpg", "cls")}
    kept = [(name, content) for name, content in {**entries, **change}.items() if content is not None]
    table = read_table(write_shard(tmp_path / "s.tar", kept))
    assert [table.key(row) for row in range(3)] == ["a", "b", "c"]
    assert list(table.reasons) == [1]
    assert said in table.reasons[1]
    assert table.labels.tolist() == [1, -1, 1]


def test_entries_that_come_twice_or_stand_apart_are_bad(tmp_path: Path, write_shard: Write) -> None:
    twice = [("a.jpg", b"1"), ("a.jpg", b"2"), ("a.cls", b"1")]
    table = read_table(write_shard(tmp_path / "s.tar", twice))
    assert table.reasons == {0: "it has two entries .jpg"}
    apart = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"1"), ("b.cls", b"2")]
    table = read_table(write_shard(tmp_path / "t.tar", apart))
    assert len(table) == len(table.reasons) == 4


def test_names_without_a_key_are_no_samples(tmp_path: Path, write_shard: Write) -> None:
    entries = [
        ("._000.jpg", b"fork"),
        (".cls", b"1"),
        ("a/.jpg", b"x"),
        ("jpg", b"x"),
        ("0.jpg", b"i"),
        ("0.cls", b"1"),
    ]
    table = read_table(write_shard(tmp_path / "s.tar", entries))
    assert [table.key(row) for row in range(len(table))] == ["0"]


def test_a_cut_shard_keeps_what_stands_before(tmp_path: Path, write_shard: Write) -> None:
    path = write_shard(tmp_path / "s.tar", _ENTRIES)
    path.write_bytes(path.read_bytes()[:3000])
    table = read_table(path)
    assert table.key(0) == "a/000"
    assert 0 not in table.reasons
    assert "truncated" in table.damage


@pytest.mark.parametrize(
    ("entries", "said"),
    [([], "no sample with .jpg"), ([("0.v1.jpg", b"x")], "('0.v1.jpg': a key ends at its first dot")],
)
def test_a_shard_with_nothing_says_so(
    tmp_path: Path, write_shard: Write, entries: list[tuple[str, bytes]], said: str
) -> None:
    table = read_table(write_shard(tmp_path / "s.tar", entries))
    assert len(table) == 0
    assert said in table.damage


def test_a_lost_shard_has_no_sample() -> None:
    assert (len(lost_table("gone")), lost_table("gone").damage) == (0, "gone")


def test_entries_that_may_not_be_read_are_bad_samples(tmp_path: Path, write_shard: Write) -> None:
    path = write_shard(tmp_path / "s.tar", [("../0.jpg", b"i"), ("../0.cls", b"0"), ("/1.cls", b"1")])
    with tarfile.open(path, "a") as archive:
        for name, kind in (
            ("2.jpg", tarfile.SYMTYPE),
            ("x.txt", tarfile.SYMTYPE),
            ("d.jpg", tarfile.DIRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "x"
            archive.addfile(member)
        member = tarfile.TarInfo("2.cls")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"2"))
    table = read_table(path)
    assert [table.key(row) for row in range(len(table))] == ["../0", "/1", "2"]
    assert "its entry .jpg cannot be read: its name leads out" in table.reasons[0]
    assert "its entry .cls cannot be read: its name leads out" in table.reasons[1]
    assert "its entry .jpg cannot be read: it is a link" in table.reasons[2]


def test_keys_with_a_dot_are_counted(tmp_path: Path, write_shard: Write) -> None:
    entries = [("0.mask.png", b"m"), ("0.jpg", b"i"), ("0.cls", b"0")]
    lost = [(f"{n}.v1.{ending}", b"1") for n in (1, 2) for ending in ("JPG", "cls", "json")]
    table = read_table(write_shard(tmp_path / "s.tar", entries + lost))
    assert (len(table), table.overlooked, table.overlooked_name) == (1, 4, "1.v1.JPG")


def test_a_long_key_widens_no_other(tmp_path: Path, write_shard: Write) -> None:
    entries = [(f"{key}.{ending}", b"1") for key in ("a" * 4000, "b") for ending in ("jpg", "cls")]
    table = read_table(write_shard(tmp_path / "s.tar", entries))
    assert table.keys.nbytes <= 2 * 8
    assert table.key(0) == "a" * 4000
