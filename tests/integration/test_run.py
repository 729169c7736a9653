"""Whole runs through the real command line: files, journal, resuming to the same bits, interruption."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from petractl.cli.app import app
from petractl.events import Event, RunFinished
from petractl.run_folder import RunFolder

SMALL = ("tracking.mlflow=false", "model.width=4", "data.steps_per_epoch=5", "training.epochs=4")
METHODS = {
    "petra": ("method.name=petra", "method.accumulation=2"),
    "petra-paper-bfloat16": ("engine.schedule=paper", "engine.precision=bfloat16"),
    "graph": ("method.name=delayed",),
    "inputs+parameters": ("method.name=delayed", "method.keep=inputs+parameters"),
    "inputs": ("method.name=delayed", "method.keep=inputs", "partition.stages=3"),
    "parameters": ("method.name=delayed", "method.keep=parameters", "engine.slack=2"),
    "reversible": ("method.name=reversible",),
    "backprop": ("method.name=backprop", "optimizer.name=adamw", "optimizer.lr=0.001"),
    "lars": ("optimizer.name=lars", "optimizer.clip_norm=1.0", "data.workers=2"),
}


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def sets(*overrides: str) -> list[str]:
    return [part for text in overrides for part in ("--set", text)]


def run(folder: Path, *overrides: str) -> Result:
    return call("run", "digits_revnet18", "--dir", str(folder), *sets(*SMALL, *overrides))


def exported(folder: Path) -> str:
    out = folder.parent / f"{folder.name}.safetensors"
    assert call("export", str(folder), "--out", str(out)).exit_code == 0
    return hashlib.sha256(out.read_bytes()).hexdigest()


def journal(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def drop_checkpoints_after(folder: Path, epoch: int) -> None:
    """Leave the folder as it was when the run was killed after `epoch`."""
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("epoch-")) > epoch:
            shutil.rmtree(path)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(tmp_path, method: str) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run(whole, *METHODS[method], "run.keep_last=9").exit_code == 0
    shutil.copytree(whole, resumed)
    drop_checkpoints_after(resumed, 2)
    assert exported(resumed) != exported(whole)
    result = call("resume", str(resumed))
    assert result.exit_code == 0
    assert exported(resumed) == exported(whole)
    last = [[r for r in journal(folder) if r["event"] == "evaluated"][-1] for folder in (whole, resumed)]
    assert last[0]["loss"] == last[1]["loss"]


def test_the_run_folder_holds_everything(tmp_path) -> None:
    folder = tmp_path / "run"
    result = run(folder, "method.accumulation=2")
    assert result.exit_code == 0
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"recipe.toml", "resolved.toml", "environment.json", "metrics.jsonl", "plots/curves.png"} <= names
    assert "checkpoints/epoch-0004/manifest.json" in names
    assert "64 per microbatch x k 2 = 128 per update" in result.stderr
    assert str(folder) in result.stdout
    events = journal(folder)
    assert events[0]["event"] == "run_started"
    assert events[-1]["event"] == "run_finished"
    counted = [r for r in events if r["event"] == "stage_counted"]
    assert len(counted) == 4 * 10
    for record in counted:
        assert (record["microbatches"], record["forwards"], record["backwards"]) == (5, 5, 5)
        assert (record["updates"], record["partial_groups"]) == (3, 1)


def test_eval_says_what_the_journal_says(tmp_path) -> None:
    folder = tmp_path / "run"
    run(folder)
    scores = json.loads(call("eval", str(folder), "--json").stdout)
    last = [r for r in journal(folder) if r["event"] == "evaluated"][-1]
    assert set(scores) == {"loss", "top1", "top5", "samples"}
    assert scores == {key: last[key] for key in scores}
    best = json.loads(call("eval", str(folder), "--best", "--json").stdout)
    assert best["top1"] == max(r["top1"] for r in journal(folder) if r["event"] == "evaluated")


def test_exported_weights_need_no_petractl(tmp_path) -> None:
    folder = tmp_path / "run"
    run(folder, "training.epochs=1")
    out = tmp_path / "w.safetensors"
    assert call("export", str(folder), "--out", str(out)).exit_code == 0
    tensors = load_file(out)
    assert tensors["units.1.f.conv1.weight"].shape == (4, 4, 3, 3)
    assert all(name.startswith("units.") for name in tensors)
    fine = tmp_path / "fine"
    assert run(fine, "training.epochs=1", f"model.weights={out}", "optimizer.lr=0.0").exit_code == 0
    again = tmp_path / "again.safetensors"
    call("export", str(fine), "--out", str(again))
    for name, tensor in load_file(again).items():
        if tensor.is_floating_point() and "running" not in name:
            assert torch.equal(tensor, tensors[name]), name


def test_a_finished_run_stays_as_it_is(tmp_path) -> None:
    folder = tmp_path / "run"
    run(folder, "training.epochs=1")
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    result = call("resume", str(folder))
    assert result.exit_code == 0
    assert "finished" in result.stderr
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before


def test_a_run_without_a_checkpoint_starts_again(tmp_path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    run(whole, "training.epochs=2")
    shutil.copytree(whole, again)
    drop_checkpoints_after(again, 0)
    assert call("resume", str(again)).exit_code == 0
    assert exported(again) == exported(whole)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(tmp_path) -> None:
    folder = tmp_path / "run"
    run(folder, "run.keep_last=9")
    expected = exported(folder)
    newest = folder / "checkpoints" / "epoch-0004" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-8])
    result = call("resume", str(folder))
    assert result.exit_code == 0
    assert "epoch-0004" in result.stderr
    assert exported(folder) == expected


@pytest.mark.parametrize("override", ["partition.stages=3", "partition.cuts=[4]", "partition.stages=1"])
def test_another_partition_continues_from_the_named_units(tmp_path, override: str) -> None:
    folder = tmp_path / "run"
    run(folder, "run.keep_last=9")
    drop_checkpoints_after(folder, 2)
    assert call("resume", str(folder), "--set", override).exit_code == 0
    assert [r["epochs"] for r in journal(folder) if r["event"] == "run_finished"] == [4, 4]


def test_the_partition_changes_no_bit_of_a_locked_method(tmp_path) -> None:
    for name in ("backprop", "reversible"):
        digests = set()
        for stages in ("1", "4", "units"):
            folder = tmp_path / f"{name}-{stages}"
            run(folder, f"method.name={name}", f"partition.stages={stages}", "training.epochs=1")
            digests.add(exported(folder))
        assert len(digests) == 1


def test_a_checkpoint_serves_another_partition_to_the_bit(tmp_path) -> None:
    whole, other = tmp_path / "whole", tmp_path / "other"
    run(whole, "method.name=backprop", "partition.stages=units", "run.keep_last=9")
    shutil.copytree(whole, other)
    drop_checkpoints_after(other, 2)
    assert call("resume", str(other), "--set", "partition.stages=3").exit_code == 0
    assert exported(other) == exported(whole)


def test_a_second_process_is_kept_out(tmp_path) -> None:
    folder = tmp_path / "run"
    run(folder, "training.epochs=1")
    with RunFolder(folder).locked():
        result = call("resume", str(folder), "--set", "training.epochs=2")
    assert result.exit_code == 2
    assert "another process" in result.stderr


def test_a_run_killed_before_its_last_words_is_finished_by_resume(tmp_path) -> None:
    folder = tmp_path / "run"
    run(folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert call("resume", str(folder)).exit_code == 0
    assert journal(folder)[-1]["event"] == "run_finished"
    assert sum(r["event"] == "epoch_trained" for r in journal(folder)) == 4


def test_a_signal_at_the_very_end_does_not_spoil_it(tmp_path, monkeypatch) -> None:
    def plot(self: object, event: Event, record: object) -> None:
        if isinstance(event, RunFinished):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("petractl.tracking.plots.CurvePlotter.handle", plot)
    folder = tmp_path / "run"
    assert run(folder, "training.epochs=1").exit_code == 0
    assert journal(folder)[-1]["event"] == "run_finished"


def test_a_journal_that_is_gone_does_not_end_a_run(tmp_path) -> None:
    folder = tmp_path / "run"
    run(folder, "run.keep_last=9")
    expected = exported(folder)
    drop_checkpoints_after(folder, 2)
    (folder / "metrics.jsonl").unlink()
    assert call("resume", str(folder)).exit_code == 0
    assert exported(folder) == expected


def test_starting_weights_may_be_gone_once_there_is_a_checkpoint(tmp_path) -> None:
    first, fine = tmp_path / "first", tmp_path / "fine"
    run(first, "training.epochs=1")
    exported(first)
    weights = tmp_path / "first.safetensors"
    run(fine, "training.epochs=1", "training.lr_decay=constant", f"model.weights={weights}")
    weights.unlink()
    assert call("eval", str(fine)).exit_code == 0
    assert call("resume", str(fine), "--set", "training.epochs=2").exit_code == 0


def test_nothing_is_trained_over_when_no_checkpoint_is_whole(tmp_path) -> None:
    folder = tmp_path / "run"
    run(folder, "training.epochs=1")
    (folder / "checkpoints" / "epoch-0001" / "model.safetensors").write_bytes(b"damaged")
    result = call("resume", str(folder))
    assert result.exit_code == 1
    assert "no checkpoint is whole" in result.stderr
    assert f"delete {folder / 'checkpoints'}" in result.stderr


def test_a_batch_larger_than_the_data_is_told(tmp_path) -> None:
    result = run(tmp_path / "run", "data.batch_size=5000", "data.steps_per_epoch=1", "training.epochs=1")
    assert result.exit_code == 0
    assert "5000 is more than the 1437 samples" in result.stderr


def test_a_full_disk_behind_stdout_is_told() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "petractl", "show", "digits_revnet18"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "error: no space left on the device\n")


def test_what_a_finished_run_cannot_take_is_told(tmp_path) -> None:
    folder = tmp_path / "run"
    run(folder, "training.epochs=2")
    fewer = call("resume", str(folder), "--set", "training.epochs=1")
    assert (fewer.exit_code, "2 are done" in fewer.stderr) == (2, True)
    ignored = call("resume", str(folder), "--set", "partition.stages=2")
    assert (ignored.exit_code, "not applied: partition.stages=2" in ignored.stderr) == (0, True)


def test_fewer_epochs_than_an_unfinished_run_has_done_are_refused(tmp_path) -> None:
    folder = tmp_path / "run"
    run(folder, "run.keep_last=9")
    drop_checkpoints_after(folder, 3)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    result = call("resume", str(folder), "--set", "training.epochs=2")
    assert result.exit_code == 2
    assert "training.epochs = 2, but 3 are done" in result.stderr
    assert "run_finished" not in (folder / "metrics.jsonl").read_text()


def test_an_extended_run_killed_before_its_last_words_is_finished_too(tmp_path) -> None:
    folder = tmp_path / "run"
    run(folder, "training.epochs=1")
    call("resume", str(folder), "--set", "training.epochs=2")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert call("resume", str(folder)).exit_code == 0
    assert journal(folder)[-1]["event"] == "run_finished"


def test_a_run_that_diverges_stops_where_it_began(tmp_path) -> None:
    result = run(tmp_path / "run", "optimizer.lr=1e30")
    assert result.exit_code == 1
    assert "the run has diverged" in result.stderr
    assert re.search(r"of unit \d+ \([\w.]+\), stage \d+, microbatch \d+", result.stderr)
    assert journal(tmp_path / "run")[-1]["event"] == "run_failed"


def test_single_samples_are_refused_where_a_norm_needs_more(tmp_path) -> None:
    result = run(tmp_path / "run", "data.batch_size=1")
    assert result.exit_code == 2
    assert "data.batch_size" in result.stderr


def test_more_epochs_may_be_asked_for(tmp_path) -> None:
    folder = tmp_path / "run"
    run(folder, "training.epochs=1")
    assert call("resume", str(folder), "--set", "training.epochs=2").exit_code == 0
    assert [r["epoch"] for r in journal(folder) if r["event"] == "epoch_trained"] == [1, 2]


@pytest.mark.parametrize("override", ["method.name=backprop", "optimizer.lr=1", "data.batch_size=3"])
def test_what_may_not_change_is_refused(tmp_path, override: str) -> None:
    folder = tmp_path / "run"
    run(folder, "training.epochs=1")
    result = call("resume", str(folder), "--set", override)
    assert result.exit_code == 2
    assert override.split("=")[0] in result.stderr


def test_a_folder_that_is_not_empty_is_refused(tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    result = run(tmp_path)
    assert result.exit_code == 2
    assert "not empty" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_wrong_tracking_address_is_told_without_its_secret(tmp_path) -> None:
    result = run(tmp_path / "run", "tracking.mlflow=true", "tracking.uri=ftp://user:secret@host/x")
    assert result.exit_code == 2
    assert "tracking.uri" in result.stderr
    assert "secret" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_with_130_and_continues_to_the_same_bits(tmp_path, number: int) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = sets(*SMALL, "training.epochs=40", "data.steps_per_epoch=10", "engine.threads=1")
    command = [sys.executable, "-m", "petractl", "run", "digits_revnet18", "--dir", str(stopped), *settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not list((stopped / "checkpoints").glob("epoch-*/manifest.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"petractl resume {stopped}" in errors
    assert "Traceback" not in errors
    assert journal(stopped)[-1]["event"] == "run_interrupted"
    assert call("resume", str(stopped)).exit_code == 0
    call("run", "digits_revnet18", "--dir", str(whole), *settings)
    assert exported(stopped) == exported(whole)


def test_a_net_of_the_user_s_own_trains_and_resumes(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "from petractl.models.units import Coupling, TwoFunctionCoupling\n"
        "class Split(nn.Module):\n"
        "    def __init__(self, channels, width):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(channels, 2 * width, 3, padding=1)\n"
        "    def forward(self, x):\n"
        "        return tuple(self.conv(x).chunk(2, dim=1))\n"
        "class Head(nn.Module):\n"
        "    def __init__(self, width, classes):\n"
        "        super().__init__()\n"
        "        self.linear = nn.Linear(2 * width, classes)\n"
        "    def forward(self, a, b):\n"
        "        return self.linear(torch.cat([a.mean((2, 3)), b.mean((2, 3))], 1))\n"
        "import torch\n"
        "def f(width, p):\n"
        "    conv = nn.Conv2d(width, width, 3, padding=1)\n"
        "    return nn.Sequential(conv, nn.GroupNorm(2, width), nn.ReLU(), nn.Dropout(p))\n"
        "def net(*, in_channels, classes, width, p=0.1):\n"
        "    two = TwoFunctionCoupling(f(width, p), f(width, p))\n"
        "    return [Split(in_channels, width), Coupling(f(width, p)), two, Head(width, classes)]\n"
    )
    recipe = (
        '[model]\nname = "my_nets:net"\nwidth = 4\narguments = { p = 0.25 }\n'
        '[data]\n[method]\nname = "petra"\n'
        "[optimizer]\nlr = 0.05\n[training]\nepochs = 3\n[run]\nkeep_last = 9\n[tracking]\nmlflow = false\n"
    )
    (tmp_path / "mine.toml").write_text(recipe)
    result = call("run", "mine.toml", "--dir", "whole", *sets("data.steps_per_epoch=6"))
    assert result.exit_code == 0, result.output
    shutil.copytree("whole", "resumed")
    drop_checkpoints_after(Path("resumed"), 1)
    assert call("resume", "resumed").exit_code == 0
    assert exported(Path("resumed")) == exported(Path("whole"))
    sys.modules.pop("my_nets", None)


def test_a_net_without_reversible_units_is_told_what_petra_becomes(tmp_path) -> None:
    result = run(tmp_path / "run", "model.name=resnet18", "training.epochs=1")
    assert result.exit_code == 0
    assert "petra becomes delayed gradients" in result.stderr


def test_the_bits_do_not_depend_on_who_runs_them(tmp_path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    digests = []
    for name in ("a", "b"):
        arguments = [
            "run",
            "digits_revnet18",
            "--dir",
            str(tmp_path / name),
            *sets(*SMALL, "training.epochs=1"),
        ]
        command = [sys.executable, "-m", "petractl", *arguments]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        digests.append(exported(tmp_path / name))
    assert digests[0] == digests[1]


def test_a_trace_tells_what_each_stage_did_when(tmp_path) -> None:
    folder = tmp_path / "traced"
    result = call(
        "run",
        "digits_revnet18",
        "--dir",
        str(folder),
        "--trace",
        *sets(*SMALL, "training.epochs=1", "partition.stages=3"),
    )
    assert result.exit_code == 0
    assert (folder / "plots" / "timeline.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads((folder / "traces" / "epoch-0001.json").read_text())["traceEvents"]
    operations = [event for event in events if event.get("ph") == "X" and event["name"] != "wait"]
    # 5 microbatches: 5 F, 5 B and 5 U on two stages, 5 FB and 5 U on the last.
    assert len(operations) == 2 * 15 + 10
    assert all(event["dur"] >= 0 for event in operations)
    assert f"timeline         {folder / 'plots' / 'timeline.png'}" in result.stdout


def test_least_is_chosen_again_for_other_stages_and_kept_for_the_same(tmp_path) -> None:
    folder = tmp_path / "run"
    least = sets(*SMALL, "training.epochs=1", "partition.stages=3", "engine.schedule=least")
    assert call("run", "digits_revnet18", "--dir", str(folder), *least).exit_code == 0
    chosen = tomli.loads((folder / "resolved.toml").read_text())["engine"]
    assert (chosen["schedule"], len(chosen["lookahead"])) == ("least", 3)
    assert call("resume", str(folder), *sets("training.epochs=2")).exit_code == 0
    assert tomli.loads((folder / "resolved.toml").read_text())["engine"] == chosen
    fewer = sets("training.epochs=3", "partition.stages=2")
    assert call("resume", str(folder), *fewer).exit_code == 0
    assert len(tomli.loads((folder / "resolved.toml").read_text())["engine"]["lookahead"]) == 2
