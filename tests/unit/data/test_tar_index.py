import io
import os
import random
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petractl.data.tar_index import Member, scan_tar

_FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def _info(name: str, **fields: object) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(member, key, value)
    return member


def _write(path: Path, entries: Iterable[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, content in entries:
            archive.addfile(_info(name, size=len(content)), io.BytesIO(content))
    return path


def _contents(path: Path, members: Iterable[Member]) -> list[tuple[str, bytes]]:
    whole = path.read_bytes()
    return [(name, whole[offset : offset + size]) for name, offset, size, _ in members]


_ENTRIES = [(f"{n:04}.{ending}", bytes([n % 256]) * (n * 37)) for n in range(60) for ending in ("jpg", "cls")]


@pytest.mark.parametrize("tar_format", _FORMATS)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.lists(
        st.tuples(
            st.text(
                st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=90
            )
            .map(lambda name: f"d/{name}.x")
            .filter(lambda name: len(name.encode()) < 95),
            st.binary(max_size=1500),
        ),
        max_size=6,
    )
)
def test_the_members_are_those_of_tarfile(
    tmp_path: Path, tar_format: int, entries: list[tuple[str, bytes]]
) -> None:
    path = _write(tmp_path / "s.tar", entries, tar_format)
    scan = scan_tar(path)
    assert scan.damage == ""
    assert _contents(path, scan.members) == entries


@pytest.mark.parametrize("tar_format", _FORMATS[1:])
def test_long_names(tmp_path: Path, tar_format: int) -> None:
    entries = [("d/" * 150 + f"{n}.jpg", b"x" * n) for n in range(3)]
    path = _write(tmp_path / "s.tar", entries, tar_format)
    assert _contents(path, scan_tar(path).members) == entries


def test_prefixes_of_posix(tmp_path: Path) -> None:
    entries = [("d" * 90 + "/" + "e" * 90 + ".jpg", b"x")]
    path = _write(tmp_path / "s.tar", entries)
    assert _contents(path, scan_tar(path).members) == entries


def test_names_common_to_all_by_pax(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "made by a tool"}) as tar:
        tar.addfile(_info("a.jpg", size=3, pax_headers={"mtime": "1.5"}), io.BytesIO(b"abc"))
    assert _contents(path, scan_tar(path).members) == [("a.jpg", b"abc")]


def test_only_regular_files_with_names_inside_the_archive(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE)):
            archive.addfile(_info(name, type=kind, linkname="/etc/passwd"))
        for name, kind in (("pipe.jpg", tarfile.FIFOTYPE), ("device.jpg", tarfile.CHRTYPE)):
            archive.addfile(_info(name, type=kind))
        archive.addfile(_info("folder", type=tarfile.DIRTYPE))
        for name in ("/etc/x.jpg", "../x.jpg", "a/../../x.jpg", "./good.jpg", "a..b/good.jpg"):
            archive.addfile(_info(name, size=1), io.BytesIO(b"x"))
    scan = scan_tar(path)
    read = [member for member in scan.members if not member.fault]
    assert [member.name for member in read] == ["good.jpg", "a..b/good.jpg"]
    assert [member.fault.split()[1] for member in scan.members if member.fault] == ["is"] * 4 + ["name"] * 3
    assert scan.damage == ""


def test_unusual_headers_are_left_to_tarfile(tmp_path: Path) -> None:
    path = _write(tmp_path / "s.tar", [("a.jpg", b"abc"), ("b.jpg", b"d")], tarfile.GNU_FORMAT)
    whole = bytearray(path.read_bytes())
    # The size as a binary number, as archives of very large files have it.
    whole[124:136] = b"\x80" + (3).to_bytes(11, "big")
    whole[148:156] = b" " * 8
    whole[148:156] = b"%06o\0 " % sum(whole[:512])
    path.write_bytes(whole)
    assert _contents(path, scan_tar(path).members) == [("a.jpg", b"abc"), ("b.jpg", b"d")]
    path.write_bytes(whole[:1024])
    scan = scan_tar(path)
    assert len(scan.members) == 1
    assert "truncated" in scan.damage


def test_no_cut_loses_members_in_silence(tmp_path: Path) -> None:
    path = _write(tmp_path / "s.tar", _ENTRIES[:12])
    whole = path.read_bytes()
    end = max(place for place in range(len(whole)) if whole[place]) // 512 * 512 + 512
    count = 0
    for length in range(0, end + 512, 100):
        path.write_bytes(whole[:length])
        scan = scan_tar(path)
        assert "truncated" in scan.damage
        assert len(scan.members) >= count
        count = len(scan.members)
        assert _contents(path, scan.members) == _ENTRIES[:count]
    path.write_bytes(whole[: end + 512])
    assert scan_tar(path).damage == ""


def test_a_flipped_byte_of_a_header_is_found_with_what_stands_before_it(tmp_path: Path) -> None:
    path = _write(tmp_path / "s.tar", _ENTRIES)
    whole = path.read_bytes()
    scan = scan_tar(path)
    generator = random.Random(0)
    for _ in range(150):
        number = generator.randrange(1, len(scan.members))
        header = scan.members[number].offset - 512
        # Beyond byte 500 a header is padding that some programs use.
        place = header + generator.randrange(512)
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ generator.randrange(1, 256)]) + whole[place + 1 :]
        )
        damaged = scan_tar(path)
        assert damaged.damage == f"the header at byte {header} is damaged"
        assert damaged.members == scan.members[:number]


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>" * 100, b"x" * 2048, b"\xff" * 1024])
def test_what_is_no_tar_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(content)
    scan = scan_tar(path)
    assert scan.members == []
    assert scan.damage == (
        "it is no tar archive" if content else "it is truncated: the mark of its end is missing"
    )


def test_archives_joined_one_to_the_other_are_told(tmp_path: Path) -> None:
    one = _write(tmp_path / "1.tar", _ENTRIES[:4]).read_bytes()
    path = tmp_path / "s.tar"
    path.write_bytes(one + one)
    scan = scan_tar(path)
    assert len(scan.members) == 4
    assert f"more follows at byte {len(one)}" in scan.damage


@pytest.mark.parametrize(
    "change", [(b"path=", b"pat\0="), (b"37 path", b"99 path"), (b"37 path", b"xx path")]
)
def test_a_damaged_table_of_names_is_told(tmp_path: Path, change: tuple[bytes, bytes]) -> None:
    name = "é" * 12 + ".jpg"
    path = _write(tmp_path / "s.tar", [(name, b"x")], tarfile.PAX_FORMAT)
    assert change[0] in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(*change))
    scan = scan_tar(path)
    assert "damaged" in scan.damage or [member.name for member in scan.members] != [name]


@pytest.mark.parametrize("tar_format", _FORMATS[1:])
def test_a_name_longer_than_any_path_is_damage(tmp_path: Path, tar_format: int) -> None:
    path = _write(tmp_path / "s.tar", [("a.jpg", b"x"), ("n" * 5000 + ".jpg", b"y")], tar_format)
    scan = scan_tar(path)
    assert "the header at byte 1024 claims a name of 500" in scan.damage
    assert [member.name for member in scan.members] == ["a.jpg"]


@pytest.mark.timeout(20)
def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "s.tar")
    assert scan_tar(tmp_path / "s.tar").damage == "it is not a regular file"


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40), st.integers(0, 9000))
def test_no_damage_raises(tmp_path: Path, damage: bytes, place: int) -> None:
    path = _write(tmp_path / "s.tar", [("é" * 80, b"x" * 700), ("b.jpg", b"y")], tarfile.PAX_FORMAT)
    whole = bytearray(path.read_bytes())
    whole[place : place + len(damage)] = damage
    path.write_bytes(whole)
    for name, offset, size, _ in scan_tar(path).members:
        assert isinstance(name, str)
        assert 0 <= offset <= offset + size <= len(whole)
