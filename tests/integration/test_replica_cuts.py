"""Replicas are saved at the same row, in the middle of an epoch, and go on from there.

Replica 1 has one microbatch less in every epoch. A cut is made after every update of whole groups; the run
goes on from the first and the last of them.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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
replicas = 2
threads = 1
stall_timeout = 60.0
[training]
epochs = {epochs}
evaluate_every = 1000
[run]
checkpoint_every = "{every}"
keep_last = 100
[tracking]
mlflow = false
"""


def petractl(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "petractl", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def begin(folder: Path, *, epochs: int, every: str) -> Path:
    (folder / "recipe.toml").write_text(RECIPE.format(epochs=epochs, every=every))
    return folder / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("replicas")
    run = begin(folder, epochs=2, every="1 update")
    done = petractl("run", str(folder / "recipe.toml"), "--dir", str(run))
    assert done.returncode == 0, done.stderr
    return run


def cuts(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("epoch-0002-microbatch-*"))


def only(run: Path, name: str, target: Path) -> Path:
    """Return a copy of a run as it was when it had made this checkpoint."""
    shutil.copytree(run, target)
    for path in (target / "checkpoints").iterdir():
        if path.name != name:
            shutil.rmtree(path)
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "run_finished" not in line]
    (target / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return target


def tensors(run: Path) -> dict[str, torch.Tensor]:
    files = (run / "checkpoints" / "epoch-0002").glob("*.safetensors")
    return {f"{f.name.split('.')[0]}/{name}": x for f in files for name, x in load_file(f).items()}


def counted(run: Path) -> dict[tuple[int, int], int]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = [r for r in records if r["event"] == "stage_counted" and r["epoch"] == 2]
    assert all(r["forwards"] == r["backwards"] == r["microbatches"] for r in records)
    return {(r["replica"], r["stage"]): r["microbatches"] for r in records}


def test_no_cut_has_anything_in_flight_of_the_last_row(whole) -> None:
    assert cuts(whole) == [f"epoch-0002-microbatch-{m:06d}" for m in range(1, 8)]
    assert counted(whole) == {(0, 0): 9, (0, 1): 9, (1, 0): 8, (1, 1): 8}


@pytest.mark.parametrize("which", [0, -1])
def test_replicas_go_on_from_a_cut_with_the_same_bits(whole, tmp_path, which: int) -> None:
    run = only(whole, cuts(whole)[which], tmp_path / "again")
    done = petractl("resume", str(run))
    assert done.returncode == 0, done.stderr
    ours, theirs = tensors(run), tensors(whole)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert counted(run) == counted(whole)


def test_replicas_are_drained_at_the_last_cut_and_go_on_with_other_stages(whole, tmp_path) -> None:
    run = only(whole, cuts(whole)[-1], tmp_path / "again")
    done = petractl("resume", str(run), "--set", "partition.stages=1")
    assert done.returncode == 0, done.stderr
    assert "drained first, 1 microbatch of epoch 2" in done.stderr
    assert counted(run).items() >= {(0, 0): 9, (1, 0): 8}.items()
