"""`petractl sweep` from the command line: cells as runs of their own, resumed, refused, interrupted."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from petractl import build
from petractl.cli.app import app
from petractl.recipe import load_recipe, render
from petractl.sweep import tether

SMALL = (
    *("--set", "model.width=4"),
    *("--set", "data.batch_size=16"),
    *("--set", "data.steps_per_epoch=2"),
    *("--set", "training.warmup_epochs=0"),
    *("--set", "engine.device=cpu"),
    *("--set", "engine.threads=1"),
    *("--set", "tracking.mlflow=false"),
)
EPOCHS = ("--set", "training.epochs=2")


def words(folder: Path, *arguments: str) -> list[str]:
    return ["sweep", "digits_revnet18", "--dir", str(folder), *SMALL, *arguments]


def sweep(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, words(folder, *arguments), catch_exceptions=False)


def cut_journal(run: Path, *, after: str) -> None:
    """Leave the journal as a process left it that was killed after the first event of this name."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    place = next(n for n, line in enumerate(lines) if json.loads(line)["event"] == after)
    (run / "metrics.jsonl").write_text("".join(lines[: place + 1]) + '{"event":"ev')


def test_a_sweep_runs_once_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    grid = ("--grid", "method.name=petra,backprop", "--cell", "method.keep=inputs", *EPOCHS, "--jobs", "2")
    result = sweep(folder, *grid, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["status"] == "finished"
    assert [row["state"].split(":")[0] for row in found["rows"]] == ["finished", "finished", "not allowed"]
    assert "not allowed: method.keep=inputs: method.keep: is for method.name" in result.stderr
    assert "cell 2 of 2: method=backprop: started" in result.stderr
    assert len(re.findall(r"finished, top-1 [\d.]+ % ", result.stderr)) == 2
    for row in found["rows"][:2]:
        assert row["top1_mean"] == row["runs"][0]["top1"] is not None
        assert row["images_per_s"] > 0
        assert row["peak_memory_bytes"] > 0
    assert json.loads((folder / "sweep.json").read_text()) == found
    first, _, third = csv.DictReader((folder / "sweep.csv").open())
    assert float(first["top1_mean"]) == pytest.approx(found["rows"][0]["top1_mean"], rel=1e-4)
    assert third["state"].startswith("not allowed")
    assert (
        (folder / "sweep.md").read_text().startswith("# Sweep of digits_revnet18\n\n| method | keep | top-1")
    )
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "petractl run " in (folder / "logs/method=petra.log").read_text()

    cut_journal(folder / "method=backprop", after="checkpoint_saved")
    before = (folder / "method=petra/metrics.jsonl").read_bytes()
    listed = sweep(folder, *grid, "--dry-run")
    assert [line.split("\t")[1].split(":")[0] for line in listed.stdout.splitlines()] == [
        "would",
        "stay as it is",
        "resume after epoch 1 of 2",
        "not allowed",
    ]
    again = sweep(folder, *grid)
    assert again.exit_code == 0, again.output
    assert "2 cells, 1 finished before, 1 at a time" in again.stderr
    assert "cell 1 of 1: method=backprop: goes on after epoch 1 of 2" in again.stderr
    assert (folder / "method=petra/metrics.jsonl").read_bytes() == before
    header, *rows = [line.split("\t") for line in again.stdout.splitlines()]
    assert header == ["method", "keep", "top-1, %", "best, %", "images/s", "memory", "state"]
    assert rows[1][0] == "backprop"
    assert rows[1][-1] == "finished"

    other = sweep(folder, *grid, "--set", "optimizer.momentum=0.5")
    assert other.exit_code == 2
    assert "2 differences between this sweep and the runs that are there" in other.stderr
    assert "optimizer.momentum is 0.9 in the run that is there, and 0.5 in this sweep" in other.stderr


def test_one_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    overrides = [*SMALL, *EPOCHS][1::2]
    broken = folder / "lr=0.1"
    broken.mkdir(parents=True)
    plan = build.check(load_recipe("digits_revnet18", overrides=[*overrides, "optimizer.lr=0.1"]))
    (broken / "resolved.toml").write_text(render(plan.recipe))
    (broken / "checkpoints/epoch-0001").mkdir(parents=True)
    (broken / "checkpoints/epoch-0001/manifest.json").write_text("{}")
    result = sweep(folder, "--grid", "optimizer.lr=0.1,0.05", *EPOCHS)
    assert result.exit_code == 1
    assert "cell 2 of 2: lr=0.05: finished" in result.stderr
    assert "error: lr=0.1: failed: " in result.stderr
    assert "no checkpoint is whole" in result.stderr
    assert f"hint: see {folder}/logs/lr=0.1.log" in result.stderr
    states = [line.split("\t")[-1] for line in result.stdout.splitlines()[1:]]
    assert states[0].startswith("failed: ")
    assert states[1] == "finished"
    assert json.loads((folder / "sweep.json").read_text())["status"] == "failed"


def test_ctrl_c_stops_the_cells_in_order_and_says_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    grid = ("--grid", "optimizer.lr=0.1,0.05", "--set", "training.epochs=500", "--jobs", "1")
    command = [sys.executable, "-m", "petractl", *words(folder, *grid)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    journal = folder / "lr=0.1/metrics.jsonl"
    end = time.monotonic() + 200
    while not (journal.exists() and "checkpoint_saved" in journal.read_text()):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=200)
    assert process.returncode == 130
    assert json.loads(journal.read_text().splitlines()[-1])["event"] == "run_interrupted"
    assert "stopping: 1 cell may save" in told
    assert "cell 1 of 2: lr=0.1: interrupted" in told
    assert not (folder / "lr=0.05").exists()
    again = told.split("continue with: ")[1].strip()
    parsed = shlex.split(again)
    assert parsed[:3] == ["petractl", "sweep", "digits_revnet18"]
    assert parsed[-2:] == ["--dir", str(folder)]
    listed = CliRunner().invoke(app, [*parsed[1:], "--dry-run"])
    assert listed.exit_code == 0, listed.output
    assert "resume after epoch" in listed.stdout
    assert json.loads((folder / "sweep.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "nothing varies"),
        (["--grid", "optimizer.lrr=1"], "did you mean optimizer.lr?"),
        (["--grid", "method.name=petra,,"], "has an empty value"),
        (["--grid", "method.keep=inputs"], "method.keep: is for method.name"),
        (["--seeds", "0", "--set", "optimizer.lr=-1"], "optimizer.lr: must be"),
        (["--seeds", "0", "--jobs", "0"], "--jobs"),
        (["--seeds", "0", "--set", "tracking.mlflow=true", "--set", "tracking.uri=nowhere"], "tracking.uri"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_made(
    tmp_path: Path, arguments: list[str], told: str
) -> None:
    result = sweep(tmp_path / "s", *arguments)
    assert result.exit_code == 2, result.output
    assert told in result.stderr
    assert not (tmp_path / "s").exists()


def test_the_folder_must_be_one_for_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").touch()
    assert "this is a file" in sweep(tmp_path / "file", "--seeds", "0").stderr
    assert "this is the folder of a run" in sweep(tmp_path / "run", "--seeds", "0").stderr
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "cannot be started by torchrun" in sweep(tmp_path / "s", "--seeds", "0").stderr


def test_a_dry_run_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["sweep", "digits_revnet18", "--grid", "optimizer.lr=0.1,0.2", "--seeds", "0,1", "--dry-run"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [cell["would"] for cell in found["cells"]] == ["run"] * 4
    assert all(cell["folder"].startswith("runs/") for cell in found["cells"])
    assert list(tmp_path.iterdir()) == []


def test_a_cell_without_its_sweep_does_not_begin() -> None:
    def tethered_to(pid: int) -> Sequence[str]:
        return [sys.executable, "-m", tether.__name__, str(pid), sys.executable, "-c", "print('ran')"]

    done = subprocess.run(tethered_to(os.getpid()), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "ran\n")
    done = subprocess.run(
        tethered_to(1 if os.getpid() != 1 else 2), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (130, "")
