"""A run has a folder of its own, and its name cannot lead elsewhere."""

import pytest

from petractl.errors import UserError
from petractl.run_folder import RunFolder, create_run_folder, open_run_folder


def test_a_new_folder_is_named_by_time_and_recipe(tmp_path) -> None:
    first = create_run_folder(None, parent=str(tmp_path / "runs"), recipe_name="digits")
    second = create_run_folder(None, parent=str(tmp_path / "runs"), recipe_name="digits")
    assert first.path != second.path
    assert first.path.parent == tmp_path / "runs"
    assert first.path.name.endswith("-digits")


@pytest.mark.parametrize("name", ["../../etc", "a/b", "..", "", "x y\n"])
def test_a_recipe_s_name_cannot_leave_the_directory(tmp_path, name: str) -> None:
    folder = create_run_folder(None, parent=str(tmp_path), recipe_name=name)
    assert folder.path.parent.resolve() == tmp_path.resolve()


def test_a_folder_that_is_not_empty_is_refused(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not empty"):
        create_run_folder(tmp_path, parent="runs", recipe_name="digits")


def test_a_folder_that_cannot_be_made_is_told(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        create_run_folder(tmp_path / "file" / "run", parent="runs", recipe_name="digits")


def test_a_folder_is_held_by_one_at_a_time(tmp_path) -> None:
    held, second = RunFolder(tmp_path).locked(), RunFolder(tmp_path).locked()
    with held, pytest.raises(UserError, match="another process"), second:
        pass
    with RunFolder(tmp_path).locked():
        pass


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_what_is_no_run_is_told(tmp_path, name: str) -> None:
    with pytest.raises(UserError, match=r"ls runs"):
        open_run_folder(tmp_path / name)
