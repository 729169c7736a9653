"""Runs that learn block by block, through the command line: processes, resuming, exported nets."""

import hashlib
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from petractl.cli.app import app

SMALL = (
    "tracking.mlflow=false",
    "model.width=4",
    "data.steps_per_epoch=5",
    "partition.stages=3",
    "training.epochs=2",
    "training.lr_decay=constant",
    "engine.threads=1",
)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def run(folder: Path, *overrides: str) -> Result:
    sets = [part for text in (*SMALL, *overrides) for part in ("--set", text)]
    result = call("run", "digits_fg", "--dir", str(folder), *sets)
    assert result.exit_code == 0, result.stderr
    return result


def resume(folder: Path, *overrides: str) -> Result:
    sets = [part for text in overrides for part in ("--set", text)]
    result = call("resume", str(folder), *sets)
    assert result.exit_code == 0, result.stderr
    return result


def exported(folder: Path) -> str:
    out = folder.parent / f"{folder.name}.safetensors"
    assert call("export", str(folder), "--out", str(out)).exit_code == 0
    assert not [name for name in load_file(out) if name.startswith("auxiliary")]
    return hashlib.sha256(out.read_bytes()).hexdigest()


CHOICES = {
    "tangents go up, derivatives come down": ("method.accumulation=2",),
    "gradients come down": ("method.guess=above", "engine.schedule=tight", "engine.wire_dtype=bfloat16"),
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
def test_stages_in_processes_and_a_resumed_run_have_the_same_bits(tmp_path: Path, choice) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run(whole, "engine.mode=in-process", *choice)
    run(parted, "engine.mode=in-process", "training.epochs=1", *choice)
    resume(parted, "training.epochs=2", "engine.mode=processes")
    assert exported(parted) == exported(whole)


def test_local_learning_sends_nothing_down(tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    sets = [part for text in SMALL for part in ("--set", text)]
    for folder, mode in ((whole, "in-process"), (parted, "processes")):
        result = call("run", "cifar10_local", "--dir", str(folder), *sets, *_digits(mode))
        assert result.exit_code == 0, result.stderr
    assert exported(parted) == exported(whole)
    records = [json.loads(line) for line in (parted / "metrics.jsonl").read_text().splitlines()]
    measured = [record for record in records if record["event"] == "stage_measured"]
    assert [r["stage"] for r in measured] == [0, 1, 2, 0, 1, 2]
    assert [r["bytes_sent_forward"] > 0 for r in measured[:3]] == [True, True, False]
    assert all(record["bytes_sent_backward"] == 0 for record in measured)


def _digits(mode: str) -> list[str]:
    overrides = ("data.name=digits", "data.batch_size=64", f"engine.mode={mode}")
    return [part for text in overrides for part in ("--set", text)]


def test_another_partition_begins_new_auxiliary_nets(tmp_path: Path) -> None:
    run(tmp_path / "a", "training.epochs=1", "partition.stages=4")
    result = resume(tmp_path / "a", "training.epochs=2", "partition.stages=3")
    assert "auxiliary nets of the blocks that end with units" in result.stderr
