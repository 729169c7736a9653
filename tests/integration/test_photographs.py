"""Photographs by the real command line: shards made of folders, and ImageNet recipes trained on them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner, Result

from petractl.cli.app import app

CLASS_NAMES = ("ant", "bee", "cat")
TRAIN_PER_CLASS, VAL_PER_CLASS = 8, 3
SMALL = (
    "model.width=4",
    "data.image_size=48",
    "data.batch_size=5",
    "method.accumulation=2",
    "engine.threads=1",
    "engine.device=cpu",
    "training.epochs=2",
    "training.warmup_epochs=1",
    "training.milestones=[1]",
    "tracking.mlflow=false",
)
TWO_STAGES = ("partition.stages=2", "model.stem=imagenet")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def run(recipe: str, folder: Path, *overrides: str) -> Result:
    sets = [part for text in (*SMALL, *overrides) for part in ("--set", text)]
    return call("run", recipe, "--dir", str(folder), *sets)


def journal(folder: Path, event: str) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == event]


def weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of the last checkpoint by file group and name."""
    last = max((folder / "checkpoints").glob("epoch-*"))
    return {
        f"{path.name.split('.')[0]}/{name}": tensor
        for path in last.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def picture(label: int, number: int) -> Image.Image:
    """Return a picture of its class's colour and some noise, larger or smaller, colour or grey."""
    generator = np.random.default_rng(100 * label + number)
    pixels = generator.integers(0, 128, (8, 8, 3))
    pixels[..., label] += 127
    image = Image.fromarray(pixels.astype(np.uint8)).resize((56 + 8 * (number % 3), 64 - 8 * (number % 2)))
    return image.convert("L") if number == 1 else image


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", TRAIN_PER_CLASS), ("val", VAL_PER_CLASS)):
        for label, name in enumerate(CLASS_NAMES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                suffix = "png" if number == 2 else "JPEG"
                picture(label, number).save(root / split / name / f"{number}.{suffix}")
    return root


@pytest.fixture(scope="module")
def shards(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    result = call("shards", "build", str(images), str(folder), "--samples-per-shard", "9")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in folder.glob("*.tar")) == [
        "train-000000.tar",
        "train-000001.tar",
        "train-000002.tar",
        "val-000000.tar",
    ]
    return folder


@pytest.fixture(scope="module")
def places(shards: Path) -> tuple[str, str]:
    return f"data.train={shards}/train-{{000000..000002}}.tar", f"data.val={shards}/val-000000.tar"


@pytest.fixture(scope="module")
def in_process(places: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the ResNet-50 recipe, reduced, in one process."""
    folder = tmp_path_factory.mktemp("runs") / "resnet50"
    result = run("imagenet_resnet50", folder, *TWO_STAGES, *places)
    assert result.exit_code == 0, result.output
    assert "every unit's input kept" in result.output
    return folder


def test_the_resnet50_recipe_runs_to_the_end(in_process: Path) -> None:
    (plan,) = journal(in_process, "plan_made")
    assert (plan["train_samples"], plan["val_samples"], plan["steps_per_epoch"]) == (24, 9, 5)
    scores = journal(in_process, "evaluated")
    assert [score["epoch"] for score in scores] == [1, 2]
    assert all(score["samples"] == 9 and np.isfinite(score["loss"]) for score in scores)
    counted = journal(in_process, "stage_counted")
    assert {record["forwards"] for record in counted} == {record["backwards"] for record in counted} == {5}


def test_two_processes_give_the_same_bits(in_process: Path, places: tuple[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "two"
    result = run("imagenet_resnet50", folder, *TWO_STAGES, *places, "engine.mode=processes")
    assert result.exit_code == 0, result.output
    alone, two = weights(in_process), weights(folder)
    assert alone.keys() == two.keys()
    assert all(torch.equal(alone[name], two[name]) for name in alone)
    assert journal(folder, "plan_made")[0]["processes"] == 2


def test_a_run_is_evaluated_by_its_shards(in_process: Path) -> None:
    result = call("eval", str(in_process), "--json")
    assert result.exit_code == 0, result.output
    told = journal(in_process, "evaluated")[-1]
    scores = json.loads(result.stdout)
    assert scores["samples"] == 9
    assert scores["top1"] == told["top1"]


def test_workers_give_the_same_bits(in_process: Path, places: tuple[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "workers"
    result = run("imagenet_resnet50", folder, *TWO_STAGES, *places, "data.workers=2")
    assert result.exit_code == 0, result.output
    alone, worked = weights(in_process), weights(folder)
    assert all(torch.equal(alone[name], worked[name]) for name in alone)


@pytest.mark.parametrize("extra", [(), ("method.name=backprop", "method.accumulation=1")])
def test_a_revnet_on_folders_of_classes(images: Path, tmp_path: Path, extra: tuple[str, ...]) -> None:
    result = run("imagenet_revnet18", tmp_path / "run", f"data.train={images}", *extra)
    assert result.exit_code == 0, result.output
    assert len(journal(tmp_path / "run", "evaluated")) == 2


def test_resident_photographs(places: tuple[str, str], tmp_path: Path) -> None:
    result = run("imagenet_revnet18", tmp_path / "run", *places, "data.resident=true")
    assert result.exit_code == 0, result.output
    assert journal(tmp_path / "run", "plan_made")[0]["train_samples"] == 24


@pytest.fixture
def damaged(images: Path, tmp_path: Path) -> Path:
    root = tmp_path / "images"
    shutil.copytree(images, root)
    (root / "train" / "bee" / "3.JPEG").write_bytes(b"no image")
    return root


def test_a_damaged_photograph_stops_a_run(damaged: Path, tmp_path: Path) -> None:
    result = run("imagenet_revnet18", tmp_path / "run", f"data.train={damaged}")
    assert result.exit_code == 2, result.output
    assert "bee/3.JPEG" in result.stderr
    assert 'data.on_error="skip"' in result.stderr


@pytest.mark.parametrize("mode", ["in-process", "processes"])
def test_an_evaluation_goes_on_where_whole_batches_are_lost(images: Path, tmp_path: Path, mode: str) -> None:
    root, folder = tmp_path / "images", tmp_path / "run"
    shutil.copytree(images, root)
    for name in ("ant", "bee"):
        for path in (root / "val" / name).iterdir():
            path.write_bytes(b"no image")
    extra = ("data.on_error=skip", "data.eval_batch_size=2", f"engine.mode={mode}", "training.epochs=1")
    result = run("imagenet_revnet18", folder, f"data.train={root}", "partition.stages=2", *extra)
    assert result.exit_code == 0, result.output
    (scores,) = journal(folder, "evaluated")
    assert scores["samples"] == 3
    assert np.isfinite(scores["loss"])
    (skipped,) = journal(folder, "samples_skipped")
    assert skipped["count"] == 6


def test_replicas_count_what_they_leave_out_together(images: Path, tmp_path: Path) -> None:
    root, folder = tmp_path / "images", tmp_path / "run"
    shutil.copytree(images, root)
    # In order, by batches of 2: one for each replica.
    for number in (0, 2):
        next((root / "val" / "ant").glob(f"{number}.*")).write_bytes(b"no image")
    extra = ("data.on_error=skip", "data.eval_batch_size=2", "engine.mode=processes", "engine.replicas=2")
    places = (f"data.train={root}", "partition.stages=1", "training.epochs=1")
    result = run("imagenet_revnet18", folder, *places, *extra, "data.max_skipped=1")
    assert result.exit_code == 2, result.output
    assert "2 different bad samples were met, more than max_skipped = 1" in result.output
    assert journal(folder, "samples_skipped")[0]["count"] == 2


def test_a_damaged_photograph_is_left_out_and_named(damaged: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = run("imagenet_revnet18", folder, f"data.train={damaged}", "data.on_error=skip")
    assert result.exit_code == 0, result.output
    records = journal(folder, "samples_skipped")
    assert [record["epoch"] for record in records] == [1, 2]
    assert all(record["count"] == 1 and "bee/3.JPEG" in record["samples"][0] for record in records)
    assert "bee/3.JPEG" in result.output
