"""Runs that go on without a person: after a stage was killed, under torchrun, and by `run --resume auto`.

What fails does so at a certain microbatch and once: a unit of the net ends its own process, unless a file
says that it has done so before. With all of these files there beforehand, nothing fails: that is the measure.
"""

import json
import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from petractl.cli.app import app
from petractl.errors import RunError
from petractl.session import Session

NETS = '''
import os
import signal
import time
from pathlib import Path

from torch import nn


class Trap(nn.Module):
    """Passes its input on; at the 7th one in training it ends its process, unless `mark` is there.

    It waits until the checkpoint of an epoch is whole, which is written while training goes on.
    """

    def __init__(self, mark, epoch):
        super().__init__()
        self.mark, self.checkpoint, self.left = Path(mark), f"epoch-{epoch:04d}/manifest.json", 7

    def forward(self, x):
        if x.device.type != "meta" and self.training:
            self.left -= 1
            if not self.left and not self.mark.exists():
                self.mark.touch()
                self.spring()
        return x

    def spring(self):
        until = time.monotonic() + 60
        while not list(Path(os.environ["TRAPPED_RUN"]).rglob(self.checkpoint)):
            assert time.monotonic() < until, "there is no checkpoint"
            time.sleep(0.01)
        if self.mark.name == "raised":
            raise ArithmeticError("the fuse has burnt down")
        os.kill(os.getpid(), signal.SIGKILL)


def net(*, in_channels, classes, width):
    stem = nn.Sequential(nn.Conv2d(in_channels, width, 3), Trap("killed", 1), nn.ReLU())
    body = nn.Sequential(nn.Conv2d(width, width, 3), Trap("raised", 2), nn.ReLU())
    return [stem, body, nn.Sequential(nn.Flatten(), nn.Linear(16 * width, classes))]
'''
RECIPE = """
[model]
name = "trapped_nets:net"
width = 32
[data]
steps_per_epoch = 5
[method]
name = "delayed"
[partition]
stages = 2
[training]
epochs = 3
[engine]
mode = "processes"
threads = 1
[optimizer]
[run]
keep_last = 9
[tracking]
mlflow = false
"""
IN_PROCESS = "engine.mode=in-process"
CHECKPOINT = "checkpoints/epoch-0001/model.safetensors"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def sets(*overrides: str) -> list[str]:
    return [part for text in overrides for part in ("--set", text)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def auto(folder: Path | None, *overrides: str, recipe: str = "trapped.toml") -> Result:
    where = [] if folder is None else ["--dir", str(folder)]
    return call("run", recipe, *where, "--resume", "auto", *sets(*overrides))


def journal(folder: Path, event: str = "") -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == event] if event else records


def weights(folder: Path, epoch: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in (folder / "checkpoints" / f"epoch-{epoch:04d}").glob("*.safetensors"):
        found |= {f"{path.name.split('.')[0]}/{name}": tensor for name, tensor in load_file(path).items()}
    return found


def assert_same_bits(a: Path, b: Path, epoch: int) -> None:
    ours, theirs = weights(a, epoch), weights(b, epoch)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("optimizer/") for name in ours)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_trained_whole(folder: Path, epochs: int) -> None:
    """Every epoch that counts, the last one of each number, has all its microbatches on every stage."""
    counted = {(r["epoch"], r["stage"]): r for r in journal(folder, "stage_counted")}
    stages = len(journal(folder, "plan_made")[-1]["stages"])
    assert counted.keys() == {(epoch, stage) for epoch in range(1, epochs + 1) for stage in range(stages)}
    assert {(r["microbatches"], r["forwards"], r["backwards"]) for r in counted.values()} == {(5, 5, 5)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield a working directory that has the recipe and its net."""
    folder, before = tmp_path_factory.mktemp("place"), Path.cwd()
    (folder / "trapped_nets.py").write_text(NETS)
    (folder / "trapped.toml").write_text(RECIPE)
    os.chdir(folder)
    yield folder
    os.chdir(before)
    sys.modules.pop("trapped_nets", None)


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """Return the folder of a run in which nothing has failed."""
    for mark in ("killed", "raised"):
        (place / mark).touch()
    folder = place / "whole"
    assert call("run", "trapped.toml", "--dir", str(folder), *sets(IN_PROCESS)).exit_code == 0
    return folder


@pytest.fixture
def armed(whole: Path, place: Path) -> Path:
    """Return a working directory in which a process is killed, and another raises, once each."""
    for mark in ("killed", "raised"):
        (place / mark).unlink(missing_ok=True)
    return place


REASONS = (
    "stage 0 (rank 0) was killed by SIGKILL",
    "stage 1 (rank 1): ArithmeticError: the fuse has burnt down",
)


def assert_restarted(folder: Path, result: Result, reasons: Sequence[str]) -> None:
    assert result.exit_code == 0, result.stderr
    assert_trained_whole(folder, 3)
    restarts = journal(folder, "run_restarted")
    assert [(r["restart"], r["of"], r["epoch"], r["microbatch"], r["reason"]) for r in restarts] == [
        (number, 2, number + 1, 0, reason) for number, reason in enumerate(reasons, start=1)
    ]
    ends = ("run_started", "run_failed", "run_restarted", "run_finished")
    told = [r["event"] for r in journal(folder) if r["event"] in ends]
    again = ["run_started", "run_failed", "run_restarted"]
    assert told == [*(again * len(reasons)), "run_started", "run_finished"]
    for number, reason in enumerate(reasons, start=1):
        assert f"restart {number} of 2: {reason}\n" in result.stderr
        assert f"all processes go on after epoch {number}\n" in result.stderr


def test_a_killed_stage_goes_on_by_itself_to_the_same_bits(armed: Path, whole: Path, monkeypatch) -> None:
    folder = armed / "restarted"
    monkeypatch.setenv("TRAPPED_RUN", str(folder))
    (armed / "raised").touch()
    result = call("run", "trapped.toml", "--dir", str(folder), *sets("engine.max_restarts=2"))
    assert_restarted(folder, result, REASONS[:1])
    assert_same_bits(folder, whole, 3)


@pytest.mark.long
def test_a_killed_and_a_failed_stage_go_on_in_the_same_run_of_mlflow(
    armed: Path, whole: Path, monkeypatch
) -> None:
    folder = armed / "restarted_twice"
    monkeypatch.setenv("TRAPPED_RUN", str(folder))
    uri = f"tracking.uri=sqlite:///{armed}/mlflow.db"
    options = sets("engine.max_restarts=2", "tracking.mlflow=true", uri)
    result = call("run", "trapped.toml", "--dir", str(folder), *options)
    assert_restarted(folder, result, REASONS)
    assert_same_bits(folder, whole, 3)
    with sqlite3.connect(armed / "mlflow.db") as store:
        assert store.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]
        steps = store.execute("SELECT DISTINCT step FROM metrics WHERE key = 'train/loss' ORDER BY step")
        assert steps.fetchall() == [(1,), (2,), (3,)]


def test_torchrun_starts_all_again_in_the_same_folder_without_being_told_which(
    armed: Path, whole: Path, monkeypatch
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2"]
    monkeypatch.setenv("TRAPPED_RUN", str(armed / "by_torchrun"))
    (armed / "raised").touch()
    options = ["--max-restarts", "3", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command = [*launcher, *options, "-m", "petractl", "run", "trapped.toml"]
    done = subprocess.run(
        [*command, *sets("run.directory=by_torchrun")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = [path for path in (armed / "by_torchrun").iterdir() if path.is_dir()]
    assert_same_bits(folder, whole, 3)
    assert_trained_whole(folder, 3)
    (restart,) = journal(folder, "run_restarted")
    assert (restart["restart"], restart["of"], restart["epoch"]) == (1, 3, 2)
    assert restart["reason"] == "its processes ended without a word"


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of a run that ended in its second epoch, without a word."""
    folder = tmp_path / "stopped"
    shutil.copytree(whole, folder)
    for epoch in (2, 3):
        shutil.rmtree(folder / "checkpoints" / f"epoch-{epoch:04d}")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    end = next(i for i, line in enumerate(lines) if json.loads(line)["event"] == "checkpoint_saved")
    (folder / "metrics.jsonl").write_text("".join(lines[: end + 1]))
    return folder


def test_the_same_command_begins_a_run_goes_on_with_it_and_leaves_it_when_it_is_done(
    whole: Path, tmp_path: Path
) -> None:
    folder, command = tmp_path / "new", (IN_PROCESS, "training.epochs=1")
    folder.mkdir()
    assert auto(folder, *command).exit_code == 0
    assert [r["resumed_from_epoch"] for r in journal(folder, "run_started")] == [None]
    again = auto(folder, *command)
    assert (again.exit_code, "nothing to do" in again.stderr) == (0, True)
    assert auto(folder, IN_PROCESS, "training.epochs=3").exit_code == 0
    assert [r["resumed_from_epoch"] for r in journal(folder, "run_started")] == [None, 1]
    assert [r["epoch"] for r in journal(folder, "epoch_trained")] == [1, 2, 3]


def test_a_stopped_run_goes_on_to_the_same_bits_by_the_command_that_began_it(
    stopped: Path, whole: Path
) -> None:
    assert auto(stopped, IN_PROCESS).exit_code == 0
    assert_same_bits(stopped, whole, 3)
    assert journal(stopped, "run_started")[-1]["resumed_from_epoch"] == 1


def test_what_may_not_change_is_refused_and_what_may_is_taken(stopped: Path) -> None:
    resolved = (stopped / "resolved.toml").read_text()
    refused = auto(stopped, IN_PROCESS, "model.width=32", "optimizer.lr=0.5")
    assert refused.exit_code == 2
    assert "optimizer.lr: may not change when a run is resumed" in refused.stderr
    assert "model.width" not in refused.stderr.partition("hint")[0]
    assert (stopped / "resolved.toml").read_text() == resolved
    assert auto(stopped, IN_PROCESS, "training.epochs=2", "run.keep_last=5").exit_code == 0
    assert "keep_last = 5" in (stopped / "resolved.toml").read_text()


def test_a_changed_recipe_is_one_warning_and_another_one_an_error(stopped: Path, tmp_path: Path) -> None:
    changed, other = tmp_path / "trapped.toml", tmp_path / "other.toml"
    for path in (changed, other):
        path.write_text(RECIPE.replace("[optimizer]", "[optimizer]\nlr = 0.7"))
    refused = auto(stopped, IN_PROCESS, recipe=str(other))
    assert refused.exit_code == 2
    assert "this run is of the recipe trapped, not of other" in refused.stderr
    result = auto(stopped, IN_PROCESS, "training.epochs=2", recipe=str(changed))
    assert result.exit_code == 0
    assert result.stderr.count("has changed since this run began") == 1
    assert "lr = 0.7" not in (stopped / "resolved.toml").read_text()


def test_without_a_folder_the_newest_unfinished_run_of_the_same_words_goes_on(
    stopped: Path, tmp_path: Path
) -> None:
    here = f"run.directory={tmp_path / 'runs'}"
    first, second = tmp_path / "runs" / "first", tmp_path / "runs" / "second"
    shutil.copytree(stopped, first)
    shutil.copytree(stopped, second)
    later = (second / "metrics.jsonl").read_text()
    (second / "metrics.jsonl").write_text(re.sub(r'"time":1', '"time":2', later))
    seeded = auto(None, IN_PROCESS, here, "run.seed=5", "training.epochs=1")
    assert seeded.exit_code == 0, seeded.stderr
    assert len(list((tmp_path / "runs").iterdir())) == 3  # other words, another run
    assert auto(None, IN_PROCESS, here).exit_code == 0
    assert [len(journal(folder, "run_finished")) for folder in (first, second)] == [0, 1]
    assert auto(None, IN_PROCESS, here).exit_code == 0
    assert len(journal(first, "run_finished")) == 1


def test_a_start_that_was_killed_before_there_was_a_run_is_begun_again(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    (folder / "checkpoints").mkdir(parents=True)
    for name in (".lock", "recipe.toml", "environment.json"):
        (folder / name).touch()
    assert auto(folder, IN_PROCESS, "training.epochs=1").exit_code == 0
    assert len(journal(folder, "run_finished")) == 1


@pytest.mark.parametrize("name", ["notes.txt", "checkpoints/epoch-0001"])
def test_a_folder_of_something_else_is_refused_and_left_as_it_is(
    whole: Path, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.touch()
    result = auto(tmp_path / "mine", IN_PROCESS)
    assert (result.exit_code, "the folder is not empty" in result.stderr) == (2, True)
    assert [p for p in (tmp_path / "mine").rglob("*") if p.is_file()] == [path]


def test_in_one_process_restarts_are_warned_of_with_what_does_it(stopped: Path) -> None:
    result = auto(stopped, IN_PROCESS, "engine.max_restarts=3", "training.epochs=2")
    assert result.exit_code == 0
    warned = [r for r in journal(stopped, "warning_raised") if "engine.max_restarts" in r["message"]]
    assert len(warned) == 1
    assert "--resume auto" in warned[0]["hint"]


def test_a_resume_that_fails_leaves_the_recipe_of_the_run(stopped: Path, monkeypatch) -> None:
    before = (stopped / "resolved.toml").read_text()

    def fails(*_: object) -> None:
        raise RunError("it does not fit")

    with monkeypatch.context() as patch:
        patch.setattr(Session, "restore", fails)
        result = call("resume", str(stopped), *sets("partition.stages=3"))
    assert (result.exit_code, result.stderr.splitlines()[0]) == (1, "error: it does not fit")
    assert (stopped / "resolved.toml").read_text() == before
    assert journal(stopped)[-1]["event"] == "run_failed"
    assert sorted(path.name for path in stopped.glob(".res*")) == []
    assert call("resume", str(stopped), *sets("partition.stages=3", "training.epochs=2")).exit_code == 0
    assert (stopped / "resolved.toml").read_text() != before


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Have the system refuse files of more bytes than `size`, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_without_room_for_a_checkpoint_the_run_fails_and_the_last_one_stands(
    stopped: Path, whole: Path
) -> None:
    assert (stopped / "resolved.toml").stat().st_size < 25_000 < (stopped / CHECKPOINT).stat().st_size
    with largest_file(25_000):
        result = call("resume", str(stopped))
    assert result.exit_code == 1, result.stderr
    assert [line[:7] for line in result.stderr.splitlines()].count("error: ") == 1
    assert "could not be written" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["epoch-0001"]
    assert call("resume", str(stopped)).exit_code == 0
    assert_same_bits(stopped, whole, 3)


@pytest.mark.parametrize("room", [0, 100])
def test_without_room_for_a_start_nothing_is_left(whole: Path, tmp_path: Path, room: int) -> None:
    with largest_file(room):
        result = call("run", "trapped.toml", "--dir", str(tmp_path / "run"), *sets(IN_PROCESS))
    assert result.exit_code == 1
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_clock_that_is_set_back_disturbs_nothing(stopped: Path, whole: Path, monkeypatch) -> None:
    import time

    real, calls = time.time, []

    def jumping() -> float:
        calls.append(None)
        return real() - 86400.0 * len(calls)

    monkeypatch.setattr(time, "time", jumping)
    result = call("resume", str(stopped))
    assert result.exit_code == 0, result.stderr
    assert_same_bits(stopped, whole, 3)
    assert all(r["seconds"] > 0 for r in journal(stopped, "epoch_trained"))


def test_nothing_of_a_restarted_run_is_left(place: Path) -> None:
    """No process that was started here is there any more: all of them had this working directory."""
    alive = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                if Path(os.readlink(entry / "cwd")) == place:
                    alive.append(entry.name)
            except OSError:
                continue
    assert alive == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
