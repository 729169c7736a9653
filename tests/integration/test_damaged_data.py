"""Every kind of damage that data come with: the right message, or left out and counted; nothing hangs.

Sixteen images in two shards, the second of which is damaged. By default the run stops, and the error names
shard, sample and reason. With `on_error = "skip"` all that is whole is seen once and what is not is named;
what is wrong with the set as a whole stops the run all the same.
"""

import gzip
import io
import multiprocessing
import os
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from petractl.data import open_data
from petractl.data.dataset import PhotographData
from petractl.data.shard_index import ShardEntry, ShardIndex, index_text
from petractl.errors import DataError

_COUNT = 8
_ALL = set(range(2 * _COUNT))
Entries = dict[str, bytes]
pytestmark = pytest.mark.timeout(60)


@dataclass(frozen=True)
class Damage:
    """What is done to the second shard's entries or to the folder, and what must come of it.

    `lost` are the labels not seen when it is skipped (None: it is an error all the same), `named` how many
    bad samples are told for them.
    """

    said: str
    lost: set[int] | None = None
    named: int = 1
    entries: Callable[[Entries], object] | None = None
    folder: Callable[[Path], object] | None = None
    indexed: bool = False


def _image(number: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def _bomb(width: int, height: int) -> bytes:
    """Return a small PNG that claims to be large."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + _image(0, "PNG")[33:]


def _set(**changed: bytes | None) -> Callable[[Entries], None]:
    """Return a change of sample 11's entries: `jpg` and `cls` become these, or go."""

    def change(entries: Entries) -> None:
        for ending, content in changed.items():
            if content is None:
                del entries[f"11.{ending}"]
            else:
                entries[f"11.{ending}"] = content

    return change


def _rename(old: str, *new: str) -> Callable[[Entries], None]:
    """Return a change that puts an entry under other names in its place."""

    def change(entries: Entries) -> None:
        before = list(entries.items())
        entries.clear()
        for name, content in before:
            entries.update(dict.fromkeys(new, content) if name == old else {name: content})

    return change


def _write(path: Path, entries: Entries) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in entries.items():
            member = tarfile.TarInfo(name.removeprefix("link:").removeprefix("again:"))
            member.size = len(content)
            if name.startswith("link:"):
                member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0
            archive.addfile(member, io.BytesIO(content))


def _spoil(change: Callable[[bytes], bytes], folder: Path) -> None:
    path = folder / "train-1.tar"
    path.write_bytes(change(path.read_bytes()))


def _whole(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Return a change of the second shard's bytes."""
    return partial(_spoil, change)


def _at(content: bytes, name: bytes) -> int:
    return content.index(name)


def _with_byte(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def _zeros(content: bytes, begin: int, end: int) -> bytes:
    return content[:begin] + bytes(end - begin) + content[end:]


def _huge_size(content: bytes) -> bytes:
    """Make sample 11's image claim all there is in the world, with a right checksum."""
    place = _at(content, b"11.jpg")
    header = bytearray(content[place : place + 512])
    header[124:136], header[148:156] = b"\x80" + b"\xff" * 11, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:place] + bytes(header) + content[place + 512 :]


def _index(folder: Path, *, counted: int = _COUNT, size: int = 0) -> None:
    entries = tuple(
        ShardEntry(
            f"train-{n}.tar", counted if n else _COUNT, bytes=(folder / f"train-{n}.tar").stat().st_size
        )
        for n in range(2)
    )
    text = index_text(ShardIndex(entries, classes=len(_ALL)))
    (folder / "index.json").write_text(text.replace('"bytes": ', f'"bytes": {size}') if size else text)


def _replace(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "train-1.tar"
        path.unlink()
        make(path)

    return change


_FROM_11 = set(range(11, 16))
_SECOND = set(range(8, 16))
_CUT = "truncated: it ends inside '11.jpg'"

DAMAGES: dict[str, Damage] = {
    # One sample: its image.
    "an empty image": Damage("'11': its image is empty", {11}, entries=_set(jpg=b"")),
    "half a JPEG": Damage("'11': its JPEG cannot be decoded", {11}, entries=_set(jpg=_image(0)[:500])),
    "the header of a JPEG": Damage("'11': its JPEG is truncated", {11}, entries=_set(jpg=_image(0)[:20])),
    "noise in place of an image": Damage("'11': .* are not a JPEG", {11}, entries=_set(jpg=b"\x17" * 900)),
    "a page of the web as image": Damage("'11': .* are not a JPEG", {11}, entries=_set(jpg=b"<html>" * 50)),
    "another kind of image": Damage("'11': its image is a GIF", {11}, entries=_set(jpg=_image(0, "GIF"))),
    "half a PNG": Damage("'11': its PNG cannot be decoded", {11}, entries=_set(jpg=_image(0, "PNG")[:700])),
    "a PNG with a flipped byte": Damage(
        "'11': its PNG cannot be decoded", {11}, entries=_set(jpg=_with_byte(_image(0, "PNG"), 300))
    ),
    "a decompression bomb": Damage(
        "'11': its image is too large", {11}, entries=_set(jpg=_bomb(60_000, 60_000))
    ),
    "an image without pixels": Damage("'11': its header is damaged", {11}, entries=_set(jpg=_bomb(0, 10))),
    "no image": Damage("'11': it has no image", {11}, entries=_set(jpg=None)),
    "a link for an image": Damage(
        "'11': its entry .jpg cannot be read: it is a link", {11}, entries=_rename("11.jpg", "link:11.jpg")
    ),
    "an image outside": Damage(
        "'../11': its entry .jpg cannot be read: its name leads out",
        {11},
        named=2,
        entries=_rename("11.jpg", "../11.jpg"),
    ),
    "an image of another name": Damage("'11': it has no image", {11}, entries=_rename("11.jpg", "11.gif")),
    "an image twice": Damage(
        "'11': it has two entries", {11}, entries=_rename("11.jpg", "11.jpg", "again:11.jpg")
    ),
    # One sample: its label.
    "no label": Damage("'11': it has no label", {11}, entries=_set(cls=None)),
    "an empty label": Damage("'11': its label '' is not a number", {11}, entries=_set(cls=b"")),
    "a word for a label": Damage("'11': its label 'cat' is not a number", {11}, entries=_set(cls=b"cat")),
    "a label out of range": Damage(
        "'11': its label 16 is not a number 0 ... 15", {11}, entries=_set(cls=b"16")
    ),
    "a negative label": Damage("'11': its label '-1' is not a number", {11}, entries=_set(cls=b"-1")),
    "a fraction for a label": Damage("'11': its label '1.5' is not a number", {11}, entries=_set(cls=b"1.5")),
    "a pickle for a label": Damage(
        "'11': its label is 99 bytes", {11}, entries=_set(cls=b"\x80\x04" + b"x" * 97)
    ),
    "image and label apart": Damage(
        "'11': it has no", {11}, 2, entries=lambda e: e.update({"11.cls": e.pop("11.cls")})
    ),
    # The shard.
    "a shard cut in an image": Damage(_CUT, _FROM_11, folder=_whole(lambda c: c[: _at(c, b"11.jpg") + 700])),
    "a shard cut between samples": Damage(
        "the mark of its end is missing", _FROM_11, folder=_whole(lambda c: c[: _at(c, b"11.jpg")])
    ),
    "a shard cut, with an index": Damage(
        "bytes, but the shard has", _FROM_11, 5, folder=_whole(lambda c: c[: _at(c, b"11.jpg")]), indexed=True
    ),
    "an empty shard": Damage("the mark of its end is missing", _SECOND, folder=_whole(lambda c: b"")),
    "a shard without samples": Damage("it holds no sample", _SECOND, folder=_whole(lambda c: bytes(10240))),
    "a page of the web as shard": Damage(
        "it is no tar archive", _SECOND, folder=_whole(lambda c: b"<html>" * 500)
    ),
    "noise for a shard": Damage(
        "it is no tar archive", _SECOND, folder=_whole(lambda c: bytes(range(1, 256)) * 50)
    ),
    "a flipped byte in a header": Damage(
        "the header at byte .* is damaged",
        _FROM_11,
        folder=_whole(lambda c: _with_byte(c, _at(c, b"11.jpg") + 130)),
    ),
    "a size without end": Damage("header", _FROM_11, folder=_whole(_huge_size)),
    "a hole of zeros": Damage(
        "more follows at byte",
        _FROM_11,
        folder=_whole(lambda c: _zeros(c, _at(c, b"11.jpg"), _at(c, b"12.jpg"))),
    ),
    "two shards joined": Damage("more follows at byte", set(), folder=_whole(lambda c: c + c)),
    "a compressed shard cut": Damage(
        "cannot be unpacked", _SECOND, folder=_whole(lambda c: gzip.compress(c)[:3000])
    ),
    "a compressed shard with a flipped byte": Damage(
        "cannot be unpacked", _SECOND, folder=_whole(lambda c: _with_byte(gzip.compress(c), 3000))
    ),
    # The set: an error in any case.
    "zeros to the end, with an index": Damage(
        "says 8 samples, but the shard holds 3",
        folder=_whole(lambda c: _zeros(c, _at(c, b"11.jpg"), len(c))),
        indexed=True,
    ),
    "a shard that is missing": Damage(
        "no such file: .*train-1.tar", folder=lambda f: (f / "train-1.tar").unlink()
    ),
    "a folder for a shard": Damage("holds no shard", folder=_replace(lambda path: path.mkdir())),
    "a named pipe for a shard": Damage(
        "neither a file nor a folder", folder=_replace(lambda path: os.mkfifo(path))
    ),
    "an index with other counts": Damage("says 9 samples, but", folder=lambda f: _index(f, counted=9)),
    "an index with other sizes": Damage(
        "says .* bytes, but the shard has", folder=lambda f: _index(f, size=1)
    ),
    "a damaged index": Damage(
        "no JSON", folder=lambda f: (f / "index.json").write_text('{"version": 1, "sha')
    ),
    "an index of nothing": Damage(
        "lists no shard", folder=lambda f: (f / "index.json").write_text('{"shardlist":[]}')
    ),
}


def _make(folder: Path, damage: Damage) -> Path:
    folder.mkdir()
    for shard in range(2):
        entries: Entries = {}
        for number in range(shard * _COUNT, (shard + 1) * _COUNT):
            entries |= {f"{number}.jpg": _image(number), f"{number}.cls": str(number).encode()}
        if shard and damage.entries:
            damage.entries(entries)
        _write(folder / f"train-{shard}.tar", entries)
    if damage.indexed:
        _index(folder)
    if damage.folder:
        damage.folder(folder)
    return folder


@dataclass
class Seen:
    """The labels that an epoch gave, and what it left out."""

    labels: list[int] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def _epoch(folder: Path, *, on_error: str, workers: int = 0, train: str = "") -> Seen:
    good = folder.parent / "val.tar"
    _write(good, {"0.jpg": _image(0), "0.cls": b"0"})
    data = open_data(
        "shards",
        train=train or f"{folder}/train-{{0..1}}.tar",
        val=str(good),
        seed=0,
        classes=len(_ALL),
        image_size=16,
        on_error=on_error,  # type: ignore[arg-type]
        cache=str(folder.parent / "cache"),
    )
    assert isinstance(data, PhotographData)
    loader = data.train_loader(batch_size=2 * len(_ALL), workers=workers)
    seen = Seen()
    for batch in loader.epoch(0):
        seen.labels += batch.labels.tolist()
    seen.skipped = [str(bad) for bad in loader.skipped]
    return seen


def _assert_no_worker_is_left() -> None:
    end = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.02)
    assert multiprocessing.active_children() == []


def test_there_are_enough_kinds() -> None:
    assert len(DAMAGES) >= 30


def test_without_damage_all_is_seen_once(tmp_path: Path) -> None:
    seen = _epoch(_make(tmp_path / "set", Damage("")), on_error="stop")
    assert sorted(seen.labels) == sorted(_ALL)
    assert seen.skipped == []


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_it_stops_by_default_and_says_why(tmp_path: Path, damage: Damage) -> None:
    folder = _make(tmp_path / "set", damage)
    with pytest.raises(DataError, match=damage.said) as caught:
        _epoch(folder, on_error="stop")
    assert caught.value.hint
    told = f"{caught.value.where} {caught.value.what}"
    assert "train-" in told or "index.json" in told or caught.value.where == "data.train"


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_it_is_skipped_and_counted_where_asked(tmp_path: Path, damage: Damage) -> None:
    folder = _make(tmp_path / "set", damage)
    if damage.lost is None:
        with pytest.raises(DataError, match=damage.said):
            _epoch(folder, on_error="skip")
        return
    seen = _epoch(folder, on_error="skip")
    assert sorted(seen.labels) == sorted(_ALL - damage.lost)
    assert len(seen.skipped) == damage.named
    assert all("train-1.tar" in text for text in seen.skipped)


@pytest.mark.parametrize("name", ["half a JPEG", "a shard cut in an image"])
def test_processes_tell_the_same_and_end(tmp_path: Path, name: str) -> None:
    damage = DAMAGES[name]
    folder = _make(tmp_path / "set", damage)
    with pytest.raises(DataError, match=damage.said) as caught:
        _epoch(folder, on_error="stop", workers=2)
    assert "train-1.tar" in caught.value.where
    here, there = (_epoch(folder, on_error="skip", workers=workers) for workers in (0, 2))
    assert (there.labels, there.skipped) == (here.labels, here.skipped)
    assert there.skipped
    _assert_no_worker_is_left()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("cut", "said"), [(None, "it is gone"), (900, "has changed|it had 8 samples")])
def test_a_shard_lost_under_way_is_an_error(tmp_path: Path, workers: int, cut: int | None, said: str) -> None:
    folder = _make(tmp_path / "set", Damage(""))
    data = open_data(
        "shards",
        train=str(folder),
        val=f"{folder}/train-0.tar",
        seed=0,
        classes=len(_ALL),
        image_size=16,
        on_error="skip",
    )
    path = folder / "train-1.tar"
    if cut is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=f"{said}|cannot be read") as caught:
        list(data.train_loader(batch_size=4, workers=workers).epoch(0))
    assert caught.value.where == str(path)
    _assert_no_worker_is_left()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_bytes(b""), "its image is empty"),
        (lambda path: path.write_bytes(_image(0)[:500]), "its JPEG cannot be decoded"),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
        (lambda path: os.mkfifo(path), "not a regular file"),
    ],
)
def test_files_in_folders_of_classes(tmp_path: Path, make: Callable[[Path], object], said: str) -> None:
    folder = tmp_path / "train"
    for number in sorted(_ALL):
        path = folder / f"{number:02}" / "a.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(_image(number))
    bad = folder / "11" / "b.jpg"
    make(bad)
    with pytest.raises(DataError, match=f"'11/b.jpg': .*{said}"):
        _epoch(folder, on_error="stop", train=str(folder))
    seen = _epoch(folder, on_error="skip", train=str(folder))
    assert sorted(seen.labels) == sorted(_ALL)
    assert len(seen.skipped) == 1
    assert said in seen.skipped[0]
