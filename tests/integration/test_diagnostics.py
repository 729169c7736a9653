"""Diagnosed runs through the command line: what is told, that nothing else changes, and PETRA's closeness."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import pytest
from typer.testing import CliRunner, Result

from petractl.cli.app import app

SMALL = (
    "tracking.mlflow=false",
    "model.width=4",
    "data.steps_per_epoch=8",
    "training.epochs=2",
    "training.warmup_epochs=0",
    "engine.mode=in-process",
)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def run(folder: Path, *overrides: str) -> Result:
    sets = [part for text in (*SMALL, *overrides) for part in ("--set", text)]
    return call("run", "digits_revnet18", "--dir", str(folder), *sets)


def diagnosed(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == "gradients_diagnosed"]


def exported(folder: Path) -> str:
    out = folder.parent / f"{folder.name}.safetensors"
    assert call("export", str(folder), "--out", str(out)).exit_code == 0
    return hashlib.sha256(out.read_bytes()).hexdigest()


METHODS: dict[str, Sequence[str]] = {
    "petra": ("method.accumulation=2", "engine.precision=bfloat16"),
    "graph": ("method.name=delayed",),
    "backprop": ("method.name=backprop", "partition.stages=3"),
    "forward-gradient": ("method.name=forward-gradient", "partition.stages=3"),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_diagnosed_run_has_the_bits_of_one_that_is_not(tmp_path, method: str) -> None:
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    assert run(plain, *METHODS[method]).exit_code == 0
    assert run(watched, *METHODS[method], "diagnostics.every=3").exit_code == 0
    assert exported(plain) == exported(watched)
    assert not diagnosed(plain)
    assert not (plain / "plots" / "diagnosis.png").exists()
    found = diagnosed(watched)
    stages = 3 if "partition.stages=3" in METHODS[method] else 10
    assert [(r["microbatch"], r["stage"]) for r in found] == [
        (i, j) for i in (2, 5, 8, 11, 14) for j in range(stages)
    ]
    assert [r["epoch"] for r in found[::stages]] == [1, 1, 2, 2, 2]
    assert (watched / "plots" / "diagnosis.png").read_bytes().startswith(b"\x89PNG")
    if method == "backprop":
        assert all(r["cosine"] == pytest.approx(1.0, abs=1e-5) for r in found)


def test_petra_is_closer_to_the_end_to_end_gradient_than_a_plain_delayed_gradient(tmp_path) -> None:
    folder = tmp_path / "run"
    more = ("model.width=8", "data.steps_per_epoch=0", "training.epochs=10", "training.evaluate_every=10")
    assert run(folder, *more, "diagnostics.every=5").exit_code == 0
    found = [r for r in diagnosed(folder) if r["delay_updates"] == 9 - r["stage"]]
    assert len(found) > 200
    for j in range(6):  # the oldest
        stage = [r for r in found if r["stage"] == j]
        assert fmean(r["cosine"] for r in stage) > fmean(r["delayed_cosine"] for r in stage)
    rebuilt = {r["stage"] for r in found if r["reconstruction_error"] is not None}
    assert rebuilt == {1, 2, 4, 6, 8}


def test_resuming_goes_on_with_the_same_microbatches(tmp_path) -> None:
    folder = tmp_path / "run"
    assert run(folder, "diagnostics.every=5").exit_code == 0
    assert call("resume", str(folder), "--set", "training.epochs=3").exit_code == 0
    assert sorted({r["microbatch"] for r in diagnosed(folder)}) == [4, 9, 14, 19]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("engine.mode=processes", 'engine.mode = "processes" takes several'),
        ("engine.replicas=2", "engine.replicas = 2 takes several"),
        ("engine.backend=gloo", 'engine.backend = "gloo" takes several'),
    ],
)
def test_it_takes_one_process(override: str, said: str) -> None:
    sets = ("--set", "diagnostics.every=5", "--set", "engine.mode=auto", "--set", override)
    result = call("validate", "digits_revnet18", *sets)
    assert result.exit_code == 2
    output = " ".join((result.stdout + result.stderr).split())
    assert said in output
    assert "diagnostics.every = 0" in output
