import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from petractl.data.writing.source_files import source_facts
from petractl.data.writing.sources import Wanted, open_sources


def facts(folder: Path) -> str:
    """Return what a journal would keep of a folder of classes."""
    (source,) = open_sources(str(folder), "folder", Wanted())
    return json.dumps(source_facts(source))


def rename(folder: Path) -> None:
    (folder / "bee" / "bee_1.jpg").rename(folder / "bee" / "bee_1b.jpg")


def replace(folder: Path) -> None:
    (folder / "cat" / "cat_0.jpg").write_bytes((folder / "cat" / "cat_1.jpg").read_bytes())


def grow_within_its_time(folder: Path) -> None:
    path = folder / "cat" / "cat_0.jpg"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=times)


def move_to_another_class(folder: Path) -> None:
    (folder / "ant" / "ant_3.jpg").rename(folder / "bee" / "ant_3.jpg")


def rename_a_class(folder: Path) -> None:
    (folder / "bee").rename(folder / "bumblebee")


@pytest.mark.parametrize(
    "change", [rename, replace, grow_within_its_time, move_to_another_class, rename_a_class]
)
def test_any_change_of_a_folder_is_noticed(
    tmp_path: Path, write_folder: Callable[..., Path], change: Callable[[Path], None]
) -> None:
    folder = write_folder(tmp_path / "src")
    before = facts(folder)
    assert facts(folder) == before
    change(folder)
    assert facts(folder) != before


def test_what_is_no_image_does_not_matter(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    folder = write_folder(tmp_path / "src")
    before = facts(folder)
    (folder / "bee" / "notes.txt").write_text("sweet")
    (folder / "bee" / ".hidden.jpg").write_text("")
    assert facts(folder) == before


def test_links_are_followed_and_loops_are_not(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    folder = write_folder(tmp_path / "src")
    far = write_folder(tmp_path / "far", classes=("more",))
    (folder / "bee" / "more").symlink_to(far / "more")
    (folder / "bee" / "loop").symlink_to(folder)
    (folder / "bee" / "lost.jpg").symlink_to(tmp_path / "nowhere")
    before = facts(folder)
    (far / "more" / "more_0.jpg").write_bytes(b"other")
    assert facts(folder) != before
