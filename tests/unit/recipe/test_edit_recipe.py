"""Cuts in a recipe's text: everything else stays."""

from pathlib import Path

import pytest
import tomli

from petractl.errors import UserError
from petractl.recipe.edit import partition_stanza, with_cuts, write_cuts

HEAD = '# mine\n[model]\nname = "revnet18"  # small\n\n[data]\n[method]\n'


@pytest.mark.parametrize(
    "section",
    [
        "",
        "[partition]\nstages = 4\n",
        '[partition]  # how\nstages = "units"\nbalance = "uniform"\n# keep me\n\n[engine]\nslack = 1\n',
        "[partition]\ncuts = [\n  2, # two\n  5,\n]\n[engine]\nslack = 1\n",
    ],
)
def test_only_the_cuts_change(tmp_path: Path, section: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(HEAD + section)
    write_cuts(path, (3, 6))
    text = path.read_text()
    assert text.startswith(HEAD)
    found = tomli.loads(text)
    assert found["partition"] == {"cuts": [3, 6]}
    assert ("keep me" in text) == ("keep me" in section)
    assert found.get("engine") == tomli.loads(HEAD + section).get("engine")
    write_cuts(path, (3, 6))
    assert path.read_text() == text


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_rest_of_the_text_stays_to_the_byte(tmp_path: Path, end: str) -> None:
    text = (
        "# mine\n[model]\nname = 'revnet18'  # small\n\n[data]\n[method]\n[partition] # how\n# why\n"
        'stages = 4   # four of them\nbalance = "time" # measured\n\n\n[run]\nseed=3'
    ).replace("\n", end)
    path = tmp_path / "r.toml"
    path.write_bytes(text.encode())
    path.chmod(0o640)
    link = tmp_path / "link.toml"
    link.symlink_to(path)
    write_cuts(link, (3, 6))
    wanted = text.replace("stages = 4   # four of them" + end, "").replace(
        'balance = "time" # measured', "cuts = [3, 6] # four of them; measured"
    )
    assert path.read_bytes().decode() == wanted
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640


def test_replicas_are_written_where_they_are_more_than_one_or_stand_there(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(HEAD)
    write_cuts(path, (3,), replicas=1)
    assert "replicas" not in path.read_text()
    write_cuts(path, (3,), replicas=2)
    assert tomli.loads(path.read_text())["engine"] == {"replicas": 2}
    write_cuts(path, (3,), replicas=1)
    assert tomli.loads(path.read_text())["engine"] == {"replicas": 1}


def test_one_stage_and_the_stanza() -> None:
    assert with_cuts("", ()) == "[partition]\nstages = 1\n"
    assert partition_stanza((1, 2)) == "[partition]\ncuts = [1, 2]\n"


@pytest.mark.parametrize("first", ["partition.stages = 4\n", "partition = {stages = 4}\n"])
def test_other_forms_of_a_section_are_understood(tmp_path: Path, first: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(first + HEAD)
    write_cuts(path, (3,))
    assert tomli.loads(path.read_text())["partition"] == {"cuts": [3]}
    assert path.read_text().endswith(HEAD)


def test_a_form_that_is_not_understood_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    text = HEAD + "[[partition]]\nstages = 4\n"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        write_cuts(path, (3,))
    assert "cuts = [3]" in caught.value.hint
    assert path.read_text() == text


def test_a_recipe_that_would_be_wrong_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    text = HEAD + "[engine]\nschedule = [1, 0]\n"
    path.write_text(text)
    with pytest.raises(UserError, match="1 problem in the recipe"):
        write_cuts(path, (3, 6))
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]
