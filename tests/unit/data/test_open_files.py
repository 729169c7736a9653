import os
import pickle
from pathlib import Path

import pytest

from petractl.data import open_files
from petractl.data.open_files import OpenFiles


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _make(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{n}.tar" for n in range(count)]
    for n, path in enumerate(paths):
        path.write_bytes(bytes([n]) * 100)
    return paths


def test_few_stay_open_and_none_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "MOST", 3)
    before = _open_descriptors()
    files = OpenFiles()
    for n, path in enumerate(_make(tmp_path, 10)):
        assert files.get(path).read(4, 96) == bytes([n]) * 4
        assert _open_descriptors() - before <= 3
    files.close()
    assert _open_descriptors() == before


def test_a_file_in_use_outlives_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "MOST", 1)
    first, second = _make(tmp_path, 2)
    files = OpenFiles()
    held = files.get(first)
    files.get(second)
    assert held.read(2, 0) == b"\0\0"


def test_a_read_past_the_end_is_short(tmp_path: Path) -> None:
    (path,) = _make(tmp_path, 1)
    assert len(OpenFiles().get(path).read(200, 50)) == 50


def test_another_process_opens_its_own(tmp_path: Path) -> None:
    files = OpenFiles()
    files.get(_make(tmp_path, 1)[0])
    assert isinstance(pickle.loads(pickle.dumps(files)), OpenFiles)
