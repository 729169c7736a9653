import json
import os
from pathlib import Path

import pytest

from petractl.errors import RecipeError, UserError
from petractl.recipe.load import load_recipe
from petractl.recipe.render import render
from petractl.sweep import sharing
from petractl.sweep.cells import Cell, CheckedSetting, State, check_settings, differences
from petractl.sweep.grid import GridError, parse_grid

RECIPE = "digits_revnet18"
SMALL = ("model.width=4", "tracking.mlflow=false", "partition.stages=3", "engine.device=cpu")


def check(tmp_path: Path, *grids: str, sets: tuple[str, ...] = (), **options) -> list[CheckedSetting]:
    grid = parse_grid(grids, **options)
    return check_settings(RECIPE, grid, overrides=[*SMALL, *sets], directory=tmp_path)


def write_run(cell: Cell, checked: CheckedSetting, *events: dict) -> None:
    """Leave a run folder as `run` does."""
    assert checked.recipe is not None
    cell.folder.mkdir()
    (cell.folder / "resolved.toml").write_text(render(checked.recipe))
    lines = [json.dumps({"time": 1.0, **event}) for event in events]
    (cell.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_what_the_checks_refuse_is_not_allowed(tmp_path: Path) -> None:
    grids = ("method.name=delayed,backprop", "method.keep=inputs,parameters")
    checked = check(tmp_path, *grids, sets=("model.name=resnet18",))
    assert [bool(each.refusal) for each in checked] == [False, True, True, True]
    assert "needs a reversible unit" in checked[1].why
    assert 'is for method.name = "delayed" only' in checked[2].why
    assert checked[1].shown == {"method.name": "delayed", "method.keep": "parameters"}
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_a_cell_does_not_set_is_shown_as_the_recipe_has_it(tmp_path: Path) -> None:
    checked = check(tmp_path, "engine.slack=1,2", cells=["method.name=backprop", "optimizer.lr=0.5"])
    assert [each.shown["method.name"] for each in checked] == ["petra", "petra", "backprop", "petra"]
    assert [each.shown["optimizer.lr"] for each in checked] == ["0.05", "0.05", "0.05", "0.5"]
    assert checked[2].shown["engine.slack"] == "-"  # no effect with backprop


def test_every_seed_is_a_cell(tmp_path: Path) -> None:
    (checked,) = check(tmp_path, seeds="3,4")
    assert [cell.name for cell in checked.cells] == ["recipe,seed=3", "recipe,seed=4"]
    assert checked.cells[0].overrides == (*SMALL, "run.seed=3")
    assert checked.cells[1].folder == tmp_path / "recipe,seed=4"


def test_no_allowed_cell_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="1 problem in the recipe"):
        check(tmp_path, "optimizer.lr=0.1,0.2", sets=("model.weights=nowhere.safetensors",))
    with pytest.raises(GridError) as caught:
        check(tmp_path, "method.keep=inputs", cells=["partition.stages=30"])
    assert caught.value.what.startswith("no cell of the grid is allowed\nmethod.keep=inputs: not allowed: ")
    assert "30 stages are more than the 10 units" in caught.value.what


def test_the_state_is_what_the_folder_says(tmp_path: Path) -> None:
    (checked,) = check(tmp_path, "optimizer.lr=0.1")
    (cell,) = checked.cells
    assert cell.state is State.NEW
    write_run(cell, checked, {"event": "run_started"})
    assert cell.state is State.STARTED
    (cell.folder / "metrics.jsonl").write_text('{"event":"run_started"}\n{"event":"run_finished"}\n')
    assert cell.state is State.FINISHED
    (cell.folder / "metrics.jsonl").unlink()
    assert cell.state is State.STARTED


def test_a_run_of_another_recipe_is_refused_by_its_key(tmp_path: Path) -> None:
    (checked,) = check(tmp_path, "optimizer.lr=0.1", seeds="7,8")
    write_run(checked.cells[0], checked)
    assert len(check(tmp_path, "optimizer.lr=0.1", seeds="7,8")) == 1
    write_run(checked.cells[1], checked)  # of seed 7
    with pytest.raises(GridError) as caught:
        check(tmp_path, "optimizer.lr=0.1", seeds="7,8")
    assert "1 difference between this sweep and the runs that are there" in caught.value.what
    folder = checked.cells[1].folder
    assert f"{folder}: run.seed is 7 in the run that is there, and 8 in this sweep" in caught.value.what


def test_where_a_run_is_made_may_differ(tmp_path: Path) -> None:
    (checked,) = check(tmp_path, "optimizer.lr=0.1")
    write_run(checked.cells[0], checked)
    (other,) = check(tmp_path, "optimizer.lr=0.1", sets=("engine.threads=2", "run.keep_last=3"))
    assert other.cells[0].state is State.STARTED
    with pytest.raises(GridError, match=r"training\.epochs is 30 .* and 31"):
        check(tmp_path, "optimizer.lr=0.1", sets=("training.epochs=31",))
    grid_keys = ("engine.threads",)
    assert differences(other, checked.cells[0], grid_keys=grid_keys) == [("engine.threads", "2", "0")]


def test_a_recipe_as_it_is_written_has_no_differences(tmp_path: Path) -> None:
    """Also with lists, empty ones too, and with cuts that were chosen."""
    sets = ("training.milestones=[1,2]", "training.lr_decay=multi-step")
    (checked,) = check(tmp_path, "engine.schedule=[2,1,0]", sets=sets)
    write_run(checked.cells[0], checked)
    assert load_recipe(checked.cells[0].folder / "resolved.toml").recipe == checked.recipe
    assert check(tmp_path, "engine.schedule=[2,1,0]", sets=sets)[0].cells[0].state is State.STARTED


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lr=0.1").mkdir()
    (tmp_path / "lr=0.1" / "thesis.tex").touch()
    with pytest.raises(UserError, match="this holds files, but no run"):
        check(tmp_path, "optimizer.lr=0.1")


def test_the_cores_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (free,) = check(tmp_path, "optimizer.lr=0.1")
    (two,) = check(tmp_path, "optimizer.lr=0.1", sets=("engine.threads=2",))
    assert sharing.automatic_jobs([free]) == 1
    assert sharing.automatic_jobs([two]) == 4
    assert sharing.threads_of_a_process(free, num_jobs=3) == 2
    assert sharing.overload([two], num_jobs=4) == ""
    assert "8 cells at a time x 1 processes x 2 threads = 16, but 8 cores" in sharing.overload(
        [two], num_jobs=8
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (one,) = check(tmp_path, "optimizer.lr=0.1")
    assert sharing.automatic_jobs([one]) == 8
    assert sharing.threads_of_a_process(one, num_jobs=8) is None
