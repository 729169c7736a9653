"""`petractl shards`: the real command, on small made-up sets."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from petractl.cli.app import app

PETRACTL = [sys.executable, "-m", "petractl", "shards"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["shards", *map(str, arguments)])


def write_photographs(folder: Path, *, count: int, side: int = 40) -> Path:
    """Write `count` pictures of each of two classes."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            rough = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            image = Image.fromarray(rough).resize((side + 20, side), Image.Resampling.BICUBIC)
            image.save(folder / name / f"{name}-{number:03}.jpg")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_photographs(tmp_path / "src" / "train", count=10)
    write_photographs(tmp_path / "src" / "val", count=3)
    return tmp_path / "src"


def test_build_check_info(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    built = call("build", source, out, "--samples-per-shard", 8, "--name", "pets")
    assert built.exit_code == 0, built.output
    assert built.stdout.startswith(f"{out}: 26 samples in 4 shards, ")
    checked = call("check", out)
    assert (checked.exit_code, checked.stdout) == (0, f"{out}: 26 samples in 4 shards, nothing wrong\n")
    info = call("info", out)
    assert info.exit_code == 0
    rows = [line.split("\t") for line in info.stdout.splitlines()]
    assert rows[1][:3] == ["pets-train", "3", "20"]
    assert rows[2][4:] == ["2", "60x40"]
    assert rows[-2:] == [["0", "10", "3", "cat"], ["1", "10", "3", "dog"]]


def test_json(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    built = json.loads(call("build", source, out, "--json").stdout)
    assert (built["samples"], built["shards"]) == (26, ["train-000000.tar", "val-000000.tar"])
    info = json.loads(call("info", out, "--json").stdout)
    assert info["class_names"] == ["cat", "dog"]
    assert [part["samples_per_class"] for part in info["parts"]] == [[10, 10], [3, 3]]
    assert info["parts"][0]["image_sizes"]["largest"] == [40, 60]
    (out / "val-000000.tar").unlink()
    checked = call("check", out, "--json")
    assert checked.exit_code == 2
    assert json.loads(checked.stdout)["problems"] == [
        {"shard": str(out / "val-000000.tar"), "key": "", "reason": "it is missing: index.json lists it"}
    ]


def test_problems_go_to_stdout_and_the_verdict_to_stderr(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call("build", source, out)
    path = out / "train-000000.tar"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    checked = call("check", out)
    assert checked.exit_code == 2
    lines = checked.stdout.splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    assert f"error: {out}: {len(lines)} problems in " in checked.stderr
    info = call("info", out)
    assert info.exit_code == 0
    assert "see `petractl shards check" in info.stderr


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    shown = call("build", source, tmp_path / "out", "--samples-per-shard", 10, "--dry-run")
    assert shown.exit_code == 0
    assert shown.stdout.splitlines()[1:] == [
        "train-000000.tar\t10",
        "train-000001.tar\t10",
        "val-000000.tar\t6",
    ]
    assert "train: 20 samples of 2 classes, from folder, would make 2 shards" in shown.stderr
    assert not (tmp_path / "out").exists()


def test_left_out_samples_are_named(source: Path, tmp_path: Path) -> None:
    (source / "train" / "cat" / "cat-003.jpg").write_bytes(b"no image")
    stopped = call("build", source, tmp_path / "out")
    assert stopped.exit_code == 2
    assert "sample 'cat/cat-003.jpg': its image's 8 bytes are not a JPEG or PNG" in stopped.stderr
    assert "with --on-error skip the same command leaves out such samples and goes on" in stopped.stderr
    skipped = call("build", source, tmp_path / "out", "--on-error", "skip")
    assert skipped.exit_code == 0, skipped.output
    assert "warning: 1 sample left out\n" in skipped.stderr
    assert "cat/cat-003.jpg" in skipped.stderr
    assert "25 samples" in skipped.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quality", "80"], "--quality: without --resize"),
        (["--samples-per-shard", "5", "--max-mb", "5"], "--max-mb: goes without --samples-per-shard"),
        (["--split", "test"], '--split: "test" is not known'),
        (["--kind", "tfrecord"], '--kind: "tfrecord" is not known'),
        (["--on-error", "ignore"], '--on-error: "ignore" is not known'),
        (["--kind", "imagenet32"], "no batches of imagenet32"),
        (["--name", "my-train"], 'says "train"'),
        (["--max-mb", "0.001"], "not one is sure to fit"),
        (["--classes", "9"], "--classes: 9, but"),
    ],
)
def test_wrong_options(source: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = call("build", source, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_places_without_shards(tmp_path: Path) -> None:
    for command in ("check", "info"):
        result = call(command, tmp_path)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "holds no shard" in result.stderr


@pytest.fixture
def slow_build(tmp_path: Path) -> list[str]:
    """A build that takes a second or two, shard by shard."""
    source = write_photographs(tmp_path / "slow" / "train", count=150, side=300)
    options = ["--samples-per-shard", "10", "--resize", "250", "--workers", "1"]
    return [*PETRACTL, "build", str(source), str(tmp_path / "out"), *options]


def start(command: list[str], out: Path) -> subprocess.Popen[str]:
    """Start a build and wait for its first shard."""
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    until_s = time.monotonic() + 240
    while not (out / "train-000000.tar").exists() and time.monotonic() < until_s:
        assert child.poll() is None, child.communicate()
        time.sleep(0.005)
    return child


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_keeps_its_shards(slow_build: list[str], tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    child = start(slow_build, out)
    child.send_signal(number)
    stdout, stderr = child.communicate(timeout=240)
    assert (child.returncode, stdout) == (130, "")
    assert "finished shards are kept; the same command goes on" in stderr
    finished = sorted(path.name for path in out.glob("*.tar"))
    assert 1 <= len(finished) < 30
    assert sorted(path.name for path in out.iterdir()) == [".build.jsonl", *finished]
    done = subprocess.run(slow_build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"300 samples in 30 shards ({len(finished)} of them from before)" in done.stdout


def test_a_killed_build_goes_on_to_the_same_bytes(slow_build: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = start(slow_build, out)
    child.kill()
    child.communicate()
    subprocess.run(slow_build, capture_output=True, check=True)
    whole = tmp_path / "whole"
    command = [str(whole) if part == str(out) else part for part in slow_build]
    subprocess.run(command[:-2], capture_output=True, check=True)
    for folder in (out, whole):
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert (out / "index.json").read_bytes() == (whole / "index.json").read_bytes()


def test_what_was_built_opens_as_webdataset(source: Path, tmp_path: Path) -> None:
    import webdataset

    call("build", source, tmp_path / "out")
    shards = webdataset.WebDataset(str(tmp_path / "out" / "val-000000.tar"), shardshuffle=False)
    samples = list(shards)
    assert len(samples) == 6
    assert {sample["cls"] for sample in samples} == {b"0", b"1"}
    assert Image.open(io.BytesIO(samples[0]["jpg"])).size == (60, 40)
