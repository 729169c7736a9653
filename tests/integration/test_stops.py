"""A run that is told to stop saves where it is, in whichever process and moment the signal finds it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

RECIPE = """
[model]
name = "revnet18"
width = 2
[data]
name = "fake"
image_size = 8
fake_samples = 136
batch_size = 8
[method]
name = "petra"
[partition]
stages = 2
[engine]
device = "cpu"
threads = 1
stall_timeout = 60.0
[training]
epochs = 500
evaluate_every = 1000
[run]
checkpoint_every = "1000 epochs"
[tracking]
mlflow = false
"""


def start(folder: Path, *keys: str, launcher: Sequence[str] = ()) -> subprocess.Popen:
    (folder / "recipe.toml").write_text(RECIPE)
    options = [word for key in keys for word in ("--set", key)]
    command = [sys.executable, *launcher, "-m", "petractl", "run", str(folder / "recipe.toml"), *options]
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(
            [*command, "--dir", str(folder / "run")], stdout=output, stderr=subprocess.STDOUT
        )


def wait_for(folder: Path, event: str, count: int, process: subprocess.Popen) -> None:
    journal, end = folder / "run" / "metrics.jsonl", time.monotonic() + 90.0
    while not journal.exists() or journal.read_text().count(f'"{event}"') < count:
        assert time.monotonic() < end
        assert process.poll() is None, (folder / "output.txt").read_text()
        time.sleep(0.01)


def process_of(folder: Path, rank: int) -> int:
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environment = (entry / "environ").read_bytes().split(b"\0")
            begun = next((x for x in environment if x.startswith(b"PETRACTL_START=")), b"")
            if f"RANK={rank}".encode() in environment and str(folder).encode() in begun:
                return int(entry.name)
    raise AssertionError(f"no process of rank {rank}")


def stopped_at(folder: Path, process: subprocess.Popen) -> dict:
    """Wait for the end; the only checkpoint is where the journal says that the run goes on."""
    assert process.wait(timeout=60.0) == 130, (folder / "output.txt").read_text()
    last = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "run_interrupted"
    (saved,) = (folder / "run" / "checkpoints").iterdir()
    told = json.loads((saved / "manifest.json").read_text())["state"]["training"]
    assert last["microbatch"] == (told["microbatches_done"] or None)
    assert last["epoch"] == told["epochs_done"] + 1
    return last


@pytest.mark.parametrize("epochs", [1, 3])
def test_replicas_stop_at_one_row_wherever_the_signal_finds_them(tmp_path, epochs: int) -> None:
    """Epochs take a few hundredths of a second: some processes are in one, some between two."""
    process = start(tmp_path, "engine.replicas=2")
    wait_for(tmp_path, "epoch_trained", epochs, process)
    process.send_signal(signal.SIGTERM)
    stopped_at(tmp_path, process)


@pytest.mark.parametrize("rank", [0, 3])
def test_one_process_that_is_told_in_evaluation_stops_all(tmp_path, rank: int) -> None:
    """The training set is cut short, so that a quarter as many images take long to evaluate."""
    options = ("data.fake_samples=40000", "data.image_size=32", "data.steps_per_epoch=5")
    process = start(tmp_path, "engine.replicas=2", "training.evaluate_every=1", *options)
    wait_for(tmp_path, "epoch_trained", 1, process)
    os.kill(process_of(tmp_path, rank), signal.SIGTERM)
    last = stopped_at(tmp_path, process)
    assert (last["epoch"], last["microbatch"], last["cause"]) == (1, 5, "SIGTERM")


def test_a_process_in_the_middle_of_an_exact_pipeline_stops_all(tmp_path) -> None:
    options = ("method.name=backprop", "method.accumulation=4", "data.fake_samples=40000")
    process = start(tmp_path, "partition.stages=3", "engine.schedule=1f1b", "run.stop_deadline=10", *options)
    wait_for(tmp_path, "steps_done", 1, process)
    os.kill(process_of(tmp_path, 1), signal.SIGTERM)
    last = stopped_at(tmp_path, process)
    assert last["cause"] == "SIGTERM"
    assert last["microbatch"] % 4 == 0


def test_what_a_notice_has_stopped_torchrun_does_not_start_again(tmp_path) -> None:
    """For torchrun every end with 130 is a failure, and it has restarts left."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    process = start(tmp_path, f"run.notice_file={tmp_path / 'notice'}", launcher=torchrun)
    wait_for(tmp_path, "epoch_trained", 2, process)
    (tmp_path / "notice").touch()
    assert process.wait(timeout=90.0) == 1
    told = (tmp_path / "output.txt").read_text()
    assert told.count("not started again") == 2
    assert f"hint: continue with: petractl resume {tmp_path / 'run'}" in told
    assert "Stopped" not in told
    events = [json.loads(x)["event"] for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert events[-1] == "run_interrupted"
    assert events.count("run_started") == 1
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize("mode", ["in-process", "processes"])
def test_one_that_cannot_be_saved_fails(tmp_path, mode: str) -> None:
    process = start(tmp_path, f"engine.mode={mode}")
    wait_for(tmp_path, "epoch_trained", 1, process)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints").touch()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60.0) == 1
    told = (tmp_path / "output.txt").read_text()
    assert "the checkpoint could not be written" in told
    assert "Traceback" not in told
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "run_failed"


def test_one_that_cannot_be_saved_within_the_deadline_says_so_and_stops(tmp_path) -> None:
    """A microbatch takes far longer than the deadline."""
    large = ("model.width=32", "data.image_size=64", "data.batch_size=32")
    process = start(tmp_path, "engine.mode=in-process", "run.stop_deadline=0.01", *large)
    wait_for(tmp_path, "epoch_started", 1, process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60.0) == 130
    told = (tmp_path / "output.txt").read_text()
    assert "not saved within run.stop_deadline = 0.01 s: the last checkpoint stands" in told
    assert "nothing was saved yet" in told
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    events = [json.loads(x)["event"] for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert events[-2:] == ["warning_raised", "run_interrupted"]
