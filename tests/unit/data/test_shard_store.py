import gzip
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from petractl.data import shard_store
from petractl.data.encoded import BadSample, EncodedSamples
from petractl.data.shard_index import ShardEntry, ShardIndex, index_text
from petractl.data.shard_store import ShardStore, describe_shards, open_shards
from petractl.data.values import UNKNOWN
from petractl.errors import DataError

_WHERE = "data.train"
Write = Callable[..., Path]


def _entries(shard: int, count: int, **changed: bytes | None) -> list[tuple[str, bytes]]:
    table: dict[str, bytes | None] = {}
    for row in range(count):
        table[f"{shard}{row}.jpg"] = f"image {shard} {row}".encode()
        table[f"{shard}{row}.cls"] = str((shard + row) % 5).encode()
    return [(name, content) for name, content in {**table, **changed}.items() if content is not None]


@pytest.fixture
def shards(tmp_path: Path, write_shard: Write) -> Path:
    for shard, count in enumerate((3, 1, 4)):
        write_shard(tmp_path / f"s-{shard}.tar", _entries(shard, count))
    return tmp_path


def _index(folder: Path, counts: dict[str, int], *, sizes: bool = True, classes: int = 5) -> None:
    entries = tuple(
        ShardEntry(name, count, bytes=(folder / name).stat().st_size if sizes else None)
        for name, count in counts.items()
    )
    (folder / "index.json").write_text(index_text(ShardIndex(entries, classes=classes, image_size=(8, 9))))


_COUNTS = {"s-0.tar": 3, "s-1.tar": 1, "s-2.tar": 4}


def _open(folder: Path, **keys: object) -> ShardStore:
    keys = {"where": _WHERE, "classes": 5, "cache": str(folder / "cache"), **keys}
    return open_shards([str(folder)], **keys)  # type: ignore[arg-type]


def _all(store: EncodedSamples) -> list[str]:
    """Read every sample; of a bad one give the reason."""
    found = []
    for index in range(sum(store.sizes)):
        try:
            sample = store.read(index)
            found.append(f"{sample.image.decode()} = {sample.label}")
        except BadSample as bad:
            found.append(f"{Path(bad.place).name} {bad.key}: {bad.reason}")
    return found


_IMAGES = [f"image {s} {r} = {(s + r) % 5}" for s, n in enumerate((3, 1, 4)) for r in range(n)]


@pytest.mark.parametrize("indexed", [False, True])
def test_any_sample_in_any_order(shards: Path, indexed: bool) -> None:
    if indexed:
        _index(shards, _COUNTS)
    store = _open(shards, classes=0 if indexed else 5)
    assert (store.sizes, store.classes) == ((3, 1, 4), 5)
    assert store.image_size == ((8, 9) if indexed else None)
    assert _all(store) == _IMAGES
    assert store.read(7).image == b"image 2 3"
    assert store.read(0).place == str(shards / "s-0.tar")
    assert store.read(3).key == "10"


def test_compressed_shards_give_the_same(shards: Path) -> None:
    for path in sorted(shards.glob("*.tar")):
        path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert _all(_open(shards)) == _IMAGES
    assert _all(_open(shards)) == _IMAGES


def test_what_is_pickled_is_small_and_reads_the_same(shards: Path) -> None:
    store = _open(shards)
    store.read(0)
    content = pickle.dumps(store)
    assert len(content) < 3000
    assert _all(pickle.loads(content)) == _IMAGES


def test_threads_read_at_once(shards: Path) -> None:
    store = pickle.loads(pickle.dumps(_open(shards)))
    results: list[list[str]] = []
    threads = [threading.Thread(target=lambda: results.append(_all(store))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [_IMAGES] * 8


def test_closing_leaves_no_file_open(shards: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    store = _open(shards)
    _all(store)
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert store.read(0).image == b"image 0 0"


def test_with_an_index_nothing_is_opened_before_it_is_read(shards: Path) -> None:
    _index(shards, _COUNTS)
    damaged = shards / "s-1.tar"
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    store = _open(shards)
    assert store.read(7).image == b"image 2 3"
    with pytest.raises(DataError, match="no tar archive") as caught:
        store.read(3)
    assert caught.value.where == str(damaged)


def test_bad_samples_are_told_one_by_one(tmp_path: Path, write_shard: Write) -> None:
    changed = {"01.cls": None, "02.cls": b"5", "03.jpg": b"", "04.cls": b"x", "05.jpg": None}
    write_shard(tmp_path / "s-0.tar", _entries(0, 7, **changed))
    assert _all(_open(tmp_path)) == [
        "image 0 0 = 0",
        "s-0.tar 01: it has no label (01.cls beside it in the tar)",
        "s-0.tar 02: its label 5 is not a number 0 ... 4",
        "s-0.tar 03: its image is empty (0 bytes)",
        "s-0.tar 04: its label 'x' is not a number from 0",
        "s-0.tar 05: it has no image (05.jpg or 05.jpeg or 05.png beside it in the tar)",
        "image 0 6 = 1",
    ]


@pytest.mark.parametrize("indexed", [False, True])
def test_a_cut_shard_stops_or_gives_what_is_left(shards: Path, indexed: bool) -> None:
    if indexed:
        _index(shards, _COUNTS)
    path = shards / "s-2.tar"
    path.write_bytes(path.read_bytes()[:4700])
    with pytest.raises(DataError, match="says .* bytes, but" if indexed else "truncated") as caught:
        _open(shards)
    assert caught.value.where == str(path)
    store = _open(shards, on_error="skip")
    found = _all(store)
    assert found[:6] == _IMAGES[:6]
    lost = found[6:]
    assert len(lost) == (2 if indexed else 1)
    assert all("s-2.tar" in text and "truncated" in text for text in lost)
    assert _all(pickle.loads(pickle.dumps(store))) == found


def test_a_shard_that_cannot_be_unpacked_stops_or_is_told_as_lost(shards: Path) -> None:
    path = shards / "s-1.tar"
    content = gzip.compress(path.read_bytes())
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cannot be unpacked") as caught:
        _open(shards)
    assert caught.value.where == str(path)
    store = _open(shards, on_error="skip")
    assert store.sizes == (3, 1, 4)
    assert _all(store)[3].startswith("s-1.tar number 0: lost: it cannot be unpacked")


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("sizes", [False, True])
def test_an_index_of_other_shards_is_an_error_always(shards: Path, sizes: bool, on_error: str) -> None:
    _index(shards, _COUNTS | {"s-1.tar": 2}, sizes=sizes)
    store = _open(shards, on_error=on_error)
    with pytest.raises(DataError, match="says 2 samples, but the shard holds 1") as caught:
        store.read(4)
    assert "petractl shards check" in caught.value.hint


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_shard_of_other_bytes_is_an_error_always(shards: Path, write_shard: Write, on_error: str) -> None:
    _index(shards, _COUNTS)
    write_shard(shards / "s-1.tar", [*_entries(1, 1), ("x.json", b"x" * 20_000)])
    with pytest.raises(DataError, match="says 10240 bytes, but the shard has 30720"):
        _open(shards, on_error=on_error).read(3)


def test_shards_that_the_index_lacks_are_counted(shards: Path) -> None:
    _index(shards, {"s-1.tar": 1})
    assert _open(shards).sizes == (3, 1, 4)


def test_the_number_of_classes_must_be_said(shards: Path) -> None:
    with pytest.raises(DataError, match="number of classes is not known") as caught:
        _open(shards, classes=0)
    assert caught.value.where == "data.classes"


def test_indexes_must_agree(tmp_path: Path, write_shard: Write) -> None:
    for number, classes in (("a", 5), ("b", 6)):
        write_shard(tmp_path / number / "s.tar", _entries(0, 1))
        _index(tmp_path / number, {"s.tar": 1}, classes=classes)
    with pytest.raises(DataError, match="differ in the classes"):
        open_shards([f"{tmp_path}/{{a,b}}"], where=_WHERE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.unlink(), "it is gone"),
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), "not the file that it was"),
    ],
)
def test_a_shard_that_changes_under_way_is_an_error(
    shards: Path, change: Callable[[Path], object], said: str
) -> None:
    store = _open(shards, on_error="skip")
    change(shards / "s-2.tar")
    with pytest.raises(DataError, match=said) as caught:
        store.read(7)
    assert caught.value.where == str(shards / "s-2.tar")


def test_another_process_notices_other_samples(shards: Path, write_shard: Write) -> None:
    content = pickle.dumps(_open(shards))
    write_shard(shards / "s-2.tar", _entries(2, 2))
    with pytest.raises(DataError, match="had 4 samples, and now has 2"):
        pickle.loads(content).read(7)


def test_a_shard_cut_short_while_it_is_open_is_an_error(shards: Path) -> None:
    store = _open(shards)
    store.read(4)
    os.truncate(shards / "s-2.tar", 1000)
    with pytest.raises(DataError, match="cut short"):
        store.read(7)


def test_a_set_is_described_without_unpacking(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = shards / "cache"
    info = describe_shards([str(shards)], where=_WHERE, cache=str(cache))
    assert (info.samples, info.classes, info.shards) == (8, 0, 3)
    monkeypatch.setattr(shard_store, "COUNT_LIMIT_BYTES", 1000)
    assert describe_shards([str(shards)], where=_WHERE, cache=str(cache)).samples == UNKNOWN
    _index(shards, _COUNTS)
    info = describe_shards([str(shards)], where=_WHERE, cache=str(cache))
    assert (info.samples, info.classes, info.image_size) == (8, 5, (8, 9))
    path = shards / "t.tar.gz"
    path.write_bytes(gzip.compress((shards / "s-0.tar").read_bytes()))
    assert describe_shards([str(path)], where=_WHERE, cache=str(cache)).samples == UNKNOWN
    assert not cache.exists()


def test_members_in_no_sample_are_warned_of_once(
    tmp_path: Path, write_shard: Write, caplog: pytest.LogCaptureFixture
) -> None:
    for shard in range(2):
        lost = [(f"{n}.v1.{ending}", b"1") for n in range(3) for ending in ("jpg", "cls")]
        write_shard(tmp_path / f"s-{shard}.tar", _entries(shard, 2) + lost)
    store = _open(tmp_path)
    (record,) = caplog.records
    assert "s-0.tar: '0.v1.jpg' and 11 more members are in no sample" in record.getMessage()
    caplog.clear()
    pickle.loads(pickle.dumps(store)).read(0)
    assert not caplog.records
    _index(tmp_path, {"s-0.tar": 2, "s-1.tar": 2})
    store = _open(tmp_path)
    assert not caplog.records
    assert [store.read(index).key for index in (3, 0)] == ["11", "00"]
    assert len(caplog.records) == 1


def test_a_copy_in_which_nothing_is_found_is_not_kept(tmp_path: Path, write_shard: Write) -> None:
    write_shard(tmp_path / "s.tar.gz", [("x.txt", b"x")])
    with pytest.raises(DataError, match="holds no sample"):
        _open(tmp_path)
    assert not list((tmp_path / "cache").glob("*.tar"))
    assert (tmp_path / "s.tar.gz").exists()
    write_shard(tmp_path / "t.tar", [("x.txt", b"x")])
    with pytest.raises(DataError, match="holds no sample"):
        open_shards([str(tmp_path / "t.tar")], where=_WHERE, classes=5, cache=str(tmp_path))
    assert (tmp_path / "t.tar").exists()
