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


def test_one_stage_and_the_stanza() -> None:
    assert with_cuts("", ()) == "[partition]\nstages = 1\n"
    assert partition_stanza((1, 2)) == "[partition]\ncuts = [1, 2]\n"


def test_a_form_that_is_not_understood_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    text = "partition.stages = 4\n" + HEAD
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
