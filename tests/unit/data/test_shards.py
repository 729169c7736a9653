import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from petractl.data.places import is_shard, listing
from petractl.data.shards import count_samples, expand_place, read_shard
from petractl.data.values import UNKNOWN
from petractl.errors import DataError

_ENTRIES = [
    ("a/000.png", b"first image"),
    ("a/000.cls", b"3"),
    ("a/000.json", b"{}"),
    ("a/001.PNG", b"second image" * 100),
    ("a/001.cls", b"1"),
]


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz", "s.tgz"])
def test_samples_in_order(tmp_path: Path, write_shard: Callable[..., Path], name: str) -> None:
    path = write_shard(tmp_path / name, _ENTRIES)
    samples = list(read_shard(path))
    assert [sample.key for sample in samples] == ["a/000", "a/001"]
    assert [sample.image for sample in samples] == [b"first image", b"second image" * 100]
    assert [sample.label for sample in samples] == [b"3", b"1"]
    assert count_samples(path) == 2
    assert is_shard(path)


def test_other_names_of_the_entries(tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    path = write_shard(tmp_path / "s.tar", [("0.jpg", b"i"), ("0.label", b"1"), ("0.cls", b"9")])
    (sample,) = read_shard(path, image="jpg", label="label")
    assert (sample.image, sample.label) == (b"i", b"1")


def test_pickles_and_torch_files_stay_bytes_unread(tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    entries = [("0.png", b"i"), ("0.cls", b"1"), ("0.pyd", b"harm"), ("0.pth", b"harm")]
    (sample,) = read_shard(write_shard(tmp_path / "s.tar", entries))
    assert sample.image == b"i"


@pytest.mark.parametrize(("left_out", "said"), [("a/000.png", "no a/000.png"), ("a/001.cls", "no a/001.cls")])
def test_a_missing_entry_is_named(
    tmp_path: Path, write_shard: Callable[..., Path], left_out: str, said: str
) -> None:
    path = write_shard(tmp_path / "s.tar", [entry for entry in _ENTRIES if entry[0] != left_out])
    with pytest.raises(DataError, match=said) as caught:
        list(read_shard(path))
    assert caught.value.where == str(path)


def test_a_sample_that_comes_twice_is_an_error(tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    path = write_shard(tmp_path / "s.tar", [("0.png", b"i"), ("0.png", b"i"), ("0.cls", b"1")])
    with pytest.raises(DataError, match="duplicate"):
        list(read_shard(path))


def test_no_cut_of_a_tar_loses_samples_in_silence(tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    path = write_shard(tmp_path / "s.tar", _ENTRIES)
    whole = path.read_bytes()
    end = max(place for place in range(len(whole)) if whole[place]) // 512 * 512 + 512
    for length in range(0, end + 512, 128):
        path.write_bytes(whole[:length])
        for read in (lambda: list(read_shard(path)), lambda: count_samples(path)):
            with pytest.raises(DataError) as caught:
                read()
            assert caught.value.where == str(path)
    path.write_bytes(whole[: end + 512])
    assert len(list(read_shard(path))) == 2


def test_a_cut_gzip_is_an_error(tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    path = write_shard(tmp_path / "s.tar.gz", _ENTRIES)
    whole = path.read_bytes()
    for length in range(2, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="not a readable tar"):
            list(read_shard(path))


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    path = write_shard(tmp_path / "s.tar", _ENTRIES)
    content = bytearray(path.read_bytes())
    place = content.index(b"a/001.PNG")
    content[place + 20] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"header at byte {place} is damaged"):
        list(read_shard(path))


@pytest.mark.parametrize(
    "content", [b"", b"no tar at all", gzip.compress(b"no tar" * 200, mtime=0), b"x" * 2048]
)
def test_what_is_no_tar_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a readable tar"):
        list(read_shard(path))


def test_zstd_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.tar.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    with pytest.raises(DataError, match="zstd"):
        list(read_shard(path))


def test_a_large_shard_is_not_read_to_be_counted(
    tmp_path: Path, write_shard: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shard(tmp_path / "s.tar", _ENTRIES)
    monkeypatch.setattr("petractl.data.shards.COUNT_LIMIT_BYTES", 1000)
    assert count_samples(path) == UNKNOWN


def test_places_are_expanded(tmp_path: Path) -> None:
    names = ["x-00.tar", "x-01.tar", "y{0}.tar"]
    for name in names:
        (tmp_path / name).touch()
    assert expand_place(f"{tmp_path}/x-{{00..01}}.tar", where="data.train") == [
        tmp_path / "x-00.tar",
        tmp_path / "x-01.tar",
    ]
    assert expand_place(f"{tmp_path}/x-{{01,00}}.tar", where="data.train") == [
        tmp_path / "x-01.tar",
        tmp_path / "x-00.tar",
    ]
    assert expand_place(f"{tmp_path}/y{{0}}.tar", where="data.train") == [tmp_path / "y{0}.tar"]
    assert expand_place(str(tmp_path), where="data.train") == [tmp_path]


@pytest.mark.parametrize("place", ["pipe:touch {marker}", " pipe:touch {marker}", "PIPE:touch {marker}"])
def test_a_pipe_is_refused_and_not_run(tmp_path: Path, place: str) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(DataError, match="would run a command") as caught:
        expand_place(place.format(marker=marker), where="data.train")
    assert caught.value.where == "data.train"
    assert not marker.exists()


@pytest.mark.parametrize("place", ["https://host/a.tar", "s3://bucket/a.tar", "file:/a.tar"])
def test_a_url_is_refused(place: str) -> None:
    with pytest.raises(DataError, match="is a URL"):
        expand_place(place, where="data.val")


def test_missing_files_are_named_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "x-00.tar").touch()
    with pytest.raises(DataError, match=r"x-01\.tar.*2 of 3 files") as caught:
        expand_place(f"{tmp_path}/x-{{00..02}}.tar", where="data.train")
    assert "holds: x-00.tar" in caught.value.hint


@pytest.mark.parametrize("place", ["a-{0..1.tar", "a-{0..99999999999}.tar", "{0..9999}{0..9999}.tar"])
def test_a_bad_pattern_is_an_error(place: str) -> None:
    with pytest.raises(DataError) as caught:
        expand_place(place, where="data.train")
    assert caught.value.where == "data.train"


def test_a_listing_is_short(tmp_path: Path) -> None:
    assert "no folder" in listing(tmp_path / "nowhere")
    assert listing(tmp_path).endswith("holds: nothing")
    (tmp_path / "sub").mkdir()
    for number in range(10):
        (tmp_path / f"{number}.tar").touch()
    assert listing(tmp_path).endswith("7.tar and 3 more")
