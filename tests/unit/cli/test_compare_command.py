"""`petractl compare` on run folders whose journals are written here."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from petractl.cli.app import app
from petractl.cli.compare import MetricName
from petractl.events import (
    EpochTrained,
    Evaluated,
    Event,
    PlanMade,
    RunFailed,
    RunFinished,
    RunInterrupted,
    RunStarted,
    as_record,
)
from petractl.recipe.load import load_recipe
from petractl.recipe.render import render
from petractl.run_folder import RunFolder
from petractl.tracking.comparison_run import METRICS
from petractl.tracking.journal import encode_record

END = RunFinished(2, 4.0, 82.0, 2, 0.5, 82.0, 99.0, 900.0, 2**30)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def events(end: Event | None, *, epochs: int = 2, top1: float = 80.0) -> list[Event]:
    plan = PlanMade((), 64, 1, 64, 20, 20, 2, 1437, 360, 3000, "tight", "petra", "float32", "cpu", 1)
    found: list[Event] = [RunStarted("", "digits", "petra", "revnet18", "digits"), plan]
    for epoch in range(1, epochs + 1):
        found.append(EpochTrained(epoch, 1.0, top1, 1437, 1000.0, 2.0, 0.1, 20))
        found.append(Evaluated(epoch, 1.0 / epoch, top1 + epoch, 99.0, 360, 0.1))
    return [*found, *([end] if end else [])]


def make_run(
    folder: Path, *overrides: str, end: Event | None = END, epochs: int = 2, top1: float = 80.0
) -> Path:
    folder.mkdir(parents=True)
    recipe = load_recipe("digits_revnet18", overrides=["training.epochs=2", *overrides]).recipe
    (folder / "resolved.toml").write_text(render(recipe))
    told = events(end, epochs=epochs, top1=top1)
    lines = [encode_record(as_record(event, time=100.0 + n)) for n, event in enumerate(told)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs in a folder, of which one was interrupted, beside a folder that is no run."""
    make_run(tmp_path / "runs" / "a")
    stopped = RunInterrupted(2, "petractl resume b")
    make_run(tmp_path / "runs" / "b", "method.name=backprop", "optimizer.lr=0.2", end=stopped, epochs=1)
    (tmp_path / "runs" / "mlartifacts").mkdir()
    return tmp_path / "runs"


def test_off_a_terminal_each_run_is_one_line_with_tabs(runs: Path) -> None:
    result = call(runs / "a", runs / "b")
    assert (result.exit_code, result.stderr) == (0, "")
    header, a, b, equal = result.stdout.splitlines()
    assert header.split("\t") == [
        *("run", "method.name", "optimizer.lr", "best top-1", "best epoch", "last top-1", "top-5", "loss"),
        *("images/s", "memory", "time", "epochs", "state"),
    ]
    assert a.split("\t") == [
        *("a", "petra", "0.05", "82.00 %", "2", "82.00 %", "99.00 %", "0.5000", "1,000"),
        *("1.0 GiB (cpu)", "6.0 s", "2/2", "finished"),
    ]
    assert b.split("\t")[-5:] == ["1,000", "N/A", "4.0 s", "1/2", "interrupted"]
    assert equal.startswith("equal: model.name = revnet18, model.width = 16, data.name = digits, cuts = ")
    assert equal.endswith(" keys at the default")
    assert "run.seed" not in equal


def test_a_folder_of_runs_stands_for_its_runs(runs: Path) -> None:
    assert call(runs).stdout == call(runs / "a", runs / "b").stdout == call(runs, runs / "a").stdout


def test_json_has_all(runs: Path) -> None:
    document = json.loads(call(runs, "--json", "--metric", "loss").stdout)
    assert list(document) == ["metric", "runs", "equal"]
    a, b = document["runs"]
    assert a["keys"] == {"method.name": "petra", "optimizer.lr": 0.05}
    assert a["curve"] == {"epochs": [1, 2], "seconds": [3.0, 5.0], "values": [1.0, 0.5]}
    assert (b["state"], b["epochs_done"], b["epochs"], b["peak_memory_bytes"]) == ("interrupted", 1, 2, None)
    assert document["equal"]["run.seed"] == 0


def test_states_and_problems_are_told(runs: Path) -> None:
    make_run(runs / "c", end=RunFailed("out of memory"))
    make_run(runs / "d", end=None)
    (runs / "d" / "metrics.jsonl").open("a").write('{"event": "epoch_tr')
    make_run(runs / "e", end=None)
    (runs / "f").mkdir()
    (runs / "f" / "metrics.jsonl").touch()
    with RunFolder(runs / "e").locked():
        result = call(runs)
    assert result.exit_code == 0
    rows = [line.split("\t") for line in result.stdout.splitlines()[1:-1]]
    assert result.stdout.splitlines()[-1].startswith("equal where known: ")
    assert {row[0]: row[-1] for row in rows} == {
        "a": "finished",
        "b": "interrupted",
        "c": "failed",
        "d": "unfinished",
        "e": "running",
        "f": "not started",
    }
    assert result.stderr.splitlines() == [
        "warning: c: failed: out of memory",
        "warning: d: the last line of its metrics.jsonl is cut short",
        "warning: f: has no resolved.toml: its keys are not known",
    ]


def test_what_is_alike_is_told_once(runs: Path) -> None:
    make_run(runs / "twin")
    result = call(runs / "a", runs / "twin")
    assert "epochs" not in result.stdout.splitlines()[0].split("\t")
    assert "equal: epochs 2/2, state finished, model.name = revnet18" in result.stdout
    shown = call(runs / "a", runs / "twin", "--all-keys").stdout
    assert "run.directory = runs" in shown
    assert "at the default" not in shown


def test_curves(runs: Path, tmp_path: Path) -> None:
    make_run(runs / "new", end=None, epochs=0)
    path = tmp_path / "curves.png"
    result = call(runs, "--plot", path, "--metric", "train_loss")
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        f"warning: new: has no train_loss and is not in {path}",
        f"curves: {path}",
    ]
    assert path.read_bytes().startswith(b"\x89PNG")
    before = path.stat().st_mtime_ns
    assert call(runs, "--plot", path).exit_code == 0, "a PNG is written anew"
    assert path.stat().st_mtime_ns > before


def test_what_is_no_png_is_not_written_over(runs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    other.write_text("precious")
    result = call(runs, "--plot", other)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is there already, and is no PNG" in result.stderr
    assert other.read_text() == "precious"
    assert call(runs, "--plot", tmp_path / "curves.pdf").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["runs/a", "runs/mlartifacts", "nowhere"], "runs/mlartifacts holds no run; nowhere is no folder"),
        (["runs/a/resolved.toml", "runs/a"], "runs/a/resolved.toml is no folder"),
        (["runs/a"], "runs/a: one run alone"),
        (["runs/a", "runs/../runs/a"], "one run alone"),
        (["runs", "--metric", "loss"], "--metric: chooses the curves"),
        (
            ["runs", "--plot", "x.png", "--metric", "data_wait_percent"],
            "no run has measured data_wait_percent",
        ),
    ],
)
def test_what_cannot_be_compared(
    runs: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(runs.parent)
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert told in result.stderr
    assert not Path("x.png").exists()


def test_the_metrics_are_those_of_the_reader() -> None:
    assert [metric.value for metric in MetricName] == list(METRICS)


def test_a_run_of_an_unknown_version(runs: Path) -> None:
    text = (runs / "a" / "resolved.toml").read_text()
    old = make_run(runs.parent / "old")
    (old / "resolved.toml").write_text(
        text.replace("[method]", "[method]\nancient = 3").replace("lr = 0.05", "")
    )
    header, a, b, _ = call(runs / "a", old).stdout.splitlines()
    assert header.split("\t")[:3] == ["run", "optimizer.lr", "method.ancient"]
    assert a.split("\t")[:3] == ["a", "0.05", "?"]
    assert b.split("\t")[:3] == ["old", "0.1", "3"]


def on_a_terminal(width: int, *arguments: object) -> str:
    """Run the command on a terminal; return what it writes there."""
    reader, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(width), "NO_COLOR": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "petractl", "compare", *map(str, arguments)],
        stdout=terminal,
        stderr=terminal,
        env=environment,
    )
    os.close(terminal)
    written = b""
    while True:
        try:
            chunk = os.read(reader, 65536)
        except OSError:  # how Linux says that the other side is closed
            break
        if not chunk:
            break
        written += chunk
    os.close(reader)
    assert child.wait() == 0
    return written.decode().replace("\r\n", "\n")


def test_on_a_terminal_few_runs_stand_side_by_side(runs: Path) -> None:
    lines = on_a_terminal(80, runs).splitlines()
    words = [line.split()[:3] for line in lines]
    assert ["method", "petra", "backprop"] in words
    assert ["state", "finished", "interrupted"] in words
    assert max(map(len, lines[1:-1])) <= 80  # the header is bold


def test_on_a_narrow_terminal_many_runs_have_two_tables(runs: Path) -> None:
    for n in range(4):
        make_run(runs / f"x{n}", f"run.seed={n}", f"optimizer.lr=0.{n + 1}", top1=80.0 + n)
    text = on_a_terminal(60, runs)
    keys, measured = text.split("\n\n")
    assert "lr" in keys.splitlines()[0]
    assert "best top-1" in measured.splitlines()[0]
    assert "not shown for want of room: " in measured
    assert len([line for line in measured.splitlines() if line.startswith("x3 ")]) == 1
