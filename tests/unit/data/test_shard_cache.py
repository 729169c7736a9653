import errno
import functools
import gzip
import hashlib
import http.server
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from petractl.data import shard_cache
from petractl.data.places import ShardPlace, find_shards
from petractl.data.shard_cache import DamagedShard, ShardCache
from petractl.data.shard_index import ShardEntry, ShardIndex, index_text
from petractl.data.shard_store import open_shards
from petractl.errors import DataError

_ENTRIES = [(f"{n}.{ending}", b"%d" % n) for n in range(4) for ending in ("jpg", "cls")]
Write = Callable[..., Path]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """Serve a folder on this machine; give it, its URL, and the list of requests."""
    folder = tmp_path / "served"
    folder.mkdir()
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            requests.append(self.requestline)

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    thread.join()
    server.server_close()


def _file(path: Path) -> ShardPlace:
    return ShardPlace(str(path), "file")


def _kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_plain_tar_is_read_in_its_place(tmp_path: Path, write_shard: Write) -> None:
    path = write_shard(tmp_path / "s.tar", _ENTRIES)
    assert ShardCache(str(tmp_path / "cache")).local(_file(path)) == path
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["s.tar.gz", "s.tgz", "named-wrongly.tar"])
def test_a_compressed_shard_is_unpacked_once(tmp_path: Path, write_shard: Write, name: str) -> None:
    plain = write_shard(tmp_path / "s.tar", _ENTRIES).read_bytes()
    path = tmp_path / name
    path.write_bytes(gzip.compress(plain))
    cache = ShardCache(str(tmp_path / "cache"))
    copy = cache.local(_file(path))
    assert copy.read_bytes() == plain
    assert copy.suffix == ".tar"
    changed = copy.stat().st_mtime_ns
    assert cache.local(_file(path)) == copy
    assert copy.stat().st_mtime_ns == changed
    assert _kept(tmp_path / "cache") == [copy.name]


def test_a_changed_shard_is_unpacked_anew(tmp_path: Path) -> None:
    path, cache = tmp_path / "s.tar.gz", ShardCache(str(tmp_path / "cache"))
    for content in (b"one", b"another"):
        path.write_bytes(gzip.compress(content))
        assert cache.local(_file(path)).read_bytes() == content
    assert len(_kept(tmp_path / "cache")) == 1


def test_the_folder_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.tar.gz"
    path.write_bytes(gzip.compress(b"x"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert ShardCache().local(_file(path)).parent == tmp_path / "xdg/petractl/shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert ShardCache().local(_file(path)).parent == tmp_path / "home/.cache/petractl/shards"


@pytest.mark.parametrize("cut", [5, 30, -1])
def test_a_damaged_shard_leaves_nothing_behind(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "s.tar.gz"
    path.write_bytes(gzip.compress(os.urandom(3_000_000))[:cut])
    with pytest.raises(DamagedShard, match="cannot be unpacked") as caught:
        ShardCache(str(tmp_path / "cache")).local(_file(path))
    assert caught.value.where == str(path)
    assert _kept(tmp_path / "cache") == []


def test_a_flipped_byte_is_found_by_the_checksum(tmp_path: Path) -> None:
    path = tmp_path / "s.tar.gz"
    content = bytearray(gzip.compress(os.urandom(10_000)))
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedShard):
        ShardCache(str(tmp_path / "cache")).local(_file(path))


def test_zstd_without_its_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = tmp_path / "s.tar.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    with pytest.raises(DataError, match="compressed by zstd") as caught:
        ShardCache(str(tmp_path / "cache")).local(_file(path))
    assert "pip install zstandard" in caught.value.hint


def test_zstd_is_read_by_the_library_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stand:
        """Stands for the package: its form of reading, with gzip inside."""

        ZstdError = gzip.BadGzipFile

        class ZstdDecompressor:
            def stream_reader(self, file: object, *, read_across_frames: bool) -> object:
                assert read_across_frames
                file.seek(4)  # type: ignore[attr-defined]
                return gzip.open(file)  # type: ignore[call-overload]

    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "zstandard", Stand)
    path = tmp_path / "s.tar.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + gzip.compress(b"content"))
    assert ShardCache(str(tmp_path / "cache")).local(_file(path)).read_bytes() == b"content"


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "No space left"), (errno.EDQUOT, "quota")])
def test_a_full_disk_says_which_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    path = tmp_path / "s.tar.gz"
    path.write_bytes(gzip.compress(b"x"))

    def full(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shard_cache.os, "fsync", full)
    with pytest.raises(DataError, match=said) as caught:
        ShardCache(str(tmp_path / "cache")).local(_file(path))
    assert caught.value.where == "data.cache"
    assert str(tmp_path / "cache") in caught.value.what
    assert _kept(tmp_path / "cache") == []


class _Disk(NamedTuple):
    total: int
    used: int
    free: int


def test_unpacking_stops_before_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder = tmp_path / "s.tar.gz", tmp_path / "cache"
    path.write_bytes(gzip.compress(bytes(100_000_000)))
    largest = 0

    def usage(_folder: Path) -> _Disk:
        nonlocal largest
        taken = sum(file.stat().st_size for file in folder.iterdir())
        largest = max(largest, taken)
        return _Disk(10**9, 0, 120_000_000 - taken)

    monkeypatch.setattr(shard_cache.shutil, "disk_usage", usage)
    with pytest.raises(DataError, match="too little room is left on the disk") as caught:
        ShardCache(str(folder)).local(_file(path))
    assert caught.value.where == "data.cache"
    assert 0 < largest <= 70_000_000
    assert _kept(folder) == []


def test_what_does_not_fit_is_not_fetched(
    tmp_path: Path, served: tuple[Path, str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url, requests = served
    (folder / "s.tar").write_bytes(bytes(100_000))
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", lambda _: _Disk(10**6, 0, 10**5 + 10))
    with pytest.raises(DataError, match="too little room is left"):
        ShardCache(str(tmp_path / "cache")).local(ShardPlace(f"{url}/s.tar", "url"))
    assert not any(line.startswith("GET") for line in requests)


def test_the_index_tells_versions_where_the_server_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setattr(shard_cache, "_VERSION_KEYS", ("size",))
    cache = ShardCache(str(tmp_path / "cache"))
    for content in (b"one", b"two"):
        fsspec.filesystem("memory").pipe("/bucket/version.tar", content)
        entry = ShardEntry("version.tar", 1, sha256=hashlib.sha256(content).hexdigest())
        copy = cache.local(ShardPlace("memory://bucket/version.tar", "url"), entry=entry)
        assert copy.read_bytes() == content


def test_a_cache_that_is_no_folder_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "s.tar.gz"
    path.write_bytes(gzip.compress(b"x"))
    (tmp_path / "cache").touch()
    with pytest.raises(DataError, match="no copy of") as caught:
        ShardCache(str(tmp_path / "cache")).local(_file(path))
    assert caught.value.where == "data.cache"


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    path, folder = tmp_path / "s.tar.gz", tmp_path / "cache"
    path.write_bytes(gzip.compress(b"content"))
    copy = ShardCache(str(folder)).local(_file(path))
    copy.unlink()
    (lock,) = folder.iterdir()
    (folder / lock.name.replace(".lock", ".partial")).write_bytes(b"half a shard that is longer")
    assert ShardCache(str(folder)).local(_file(path)).read_bytes() == b"content"
    assert _kept(folder) == [copy.name]


def test_processes_share_one_copy(tmp_path: Path) -> None:
    path, counter = tmp_path / "s.tar.gz", tmp_path / "runs"
    path.write_bytes(gzip.compress(os.urandom(2_000_000)))
    code = textwrap.dedent(f"""
        from petractl.data import shard_cache
        from petractl.data.places import ShardPlace
        unpack = shard_cache._unpack
        def counted(*a):
            open({str(counter)!r}, "a").write("x")
            unpack(*a)
        shard_cache._unpack = counted
        print(shard_cache.ShardCache({str(tmp_path / "cache")!r}).local(ShardPlace({str(path)!r}, "file")))
    """)
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = {process.communicate(timeout=60)[0] for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(said) == 1
    assert counter.read_text() == "x"


def test_urls_are_fetched_once_and_checked(
    tmp_path: Path,
    write_shard: Write,
    served: tuple[Path, str, list[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, url, requests = served
    write_shard(folder / "s-0.tar", _ENTRIES)
    write_shard(folder / "s-1.tar.gz", _ENTRIES)
    cache = str(tmp_path / "cache")
    for fetched in (2, 0):
        requests.clear()
        store = open_shards([f"{url}/s-{{0.tar,1.tar.gz}}"], where="data.train", classes=4, cache=cache)
        assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
            "no index.json beside 2 shards: they are fetched to be counted"
        ]
        caplog.clear()
        assert store.sizes == (4, 4)
        assert [store.read(index).label for index in range(8)] == [0, 1, 2, 3] * 2
        assert sum(line.startswith("GET /s-") for line in requests) == fetched


def test_the_index_of_a_url_counts_and_checks(
    tmp_path: Path, write_shard: Write, served: tuple[Path, str, list[str]]
) -> None:
    folder, url, requests = served
    content = write_shard(folder / "s.tar", _ENTRIES).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    for said, sha256, size in (("", digest, 0), ("SHA-256", "0" * 64, 0), ("10240 bytes", digest, 1)):
        entry = ShardEntry("s.tar", 4, bytes=len(content) + size, sha256=sha256)
        (folder / "index.json").write_text(index_text(ShardIndex((entry,), classes=4)))
        requests.clear()
        store = open_shards([f"{url}/s.tar"], where="data.train", cache=str(tmp_path / f"cache{said}"))
        assert (store.sizes, store.classes) == ((4,), 4)
        assert not any("/s.tar" in line for line in requests)
        if not said:
            assert store.read(2).image == b"2"
            continue
        with pytest.raises(DataError, match=said) as caught:
            store.read(2)
        assert caught.value.where == f"{url}/s.tar"


def test_a_url_that_is_not_there_is_an_error(tmp_path: Path, served: tuple[Path, str, list[str]]) -> None:
    _, url, _ = served
    cache = ShardCache(str(tmp_path / "cache"))
    assert cache.index_of(url) is None
    with pytest.raises(DataError, match="cannot be fetched") as caught:
        cache.local(ShardPlace(f"{url}/none.tar", "url"))
    assert caught.value.where == f"{url}/none.tar"
    with pytest.raises(DataError, match="cannot be fetched"):
        cache.local(ShardPlace("http://127.0.0.1:9/none.tar", "url"))


def test_other_stores_by_fsspec(tmp_path: Path, write_shard: Write) -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe("/bucket/s.tar", write_shard(tmp_path / "s.tar", _ENTRIES).read_bytes())
    cache = str(tmp_path / "cache")
    store = open_shards(["memory://bucket/s.tar"], where="data.train", classes=4, cache=cache)
    assert store.read(3).image == b"3"
    assert store.places == ("memory://bucket/s.tar",)


@pytest.mark.parametrize(
    ("url", "said", "hint"),
    [("nonsense://a/s.tar", "nonsense", "scheme"), ("hdfs://a/s.tar", "cannot be fetched", "")],
)
def test_schemes_that_nothing_installed_reads(tmp_path: Path, url: str, said: str, hint: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        ShardCache(str(tmp_path / "cache")).local(ShardPlace(url, "url"))
    assert caught.value.where == url
    assert hint in caught.value.hint


def test_without_fsspec_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(DataError, match=r"fsspec\.core") as caught:
        ShardCache(str(tmp_path / "cache")).local(ShardPlace("s3://a/s.tar", "url"))
    assert "`pip install fsspec s3fs`" in caught.value.hint


def test_a_pipe_that_is_allowed_runs_once(tmp_path: Path, write_shard: Write) -> None:
    path = write_shard(tmp_path / "s.tar", _ENTRIES)
    place = f"pipe:echo x >> {tmp_path}/runs; gzip -c {path}"
    for _ in range(2):
        store = open_shards(
            [place], where="data.train", classes=4, allow_pipe=True, cache=str(tmp_path / "cache")
        )
        assert store.read(1).image == b"1"
    assert (tmp_path / "runs").read_text() == "x\n"


def test_a_pipe_that_fails_is_an_error(tmp_path: Path) -> None:
    (place,) = find_shards(["pipe:echo some; echo why >&2; exit 3"], where="data.train", allow_pipe=True)
    with pytest.raises(DataError, match="ended with 3: why"):
        ShardCache(str(tmp_path / "cache")).local(place)
    assert _kept(tmp_path / "cache") == []
