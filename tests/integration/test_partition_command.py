"""`petractl partition` from the command line."""

import json
import os
import time
from pathlib import Path

import pytest
import tomli
from typer.testing import CliRunner, Result

from petractl.cli.app import app

SMALL = ["--image-size", "32", "--classes", "10", "--width", "8", "--batch", "4"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def partition(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["partition", *arguments])


def found(*arguments: str) -> dict:
    result = partition(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_users_own_words_by_flops() -> None:
    plan = found("--model", "revnet34", "--gpus", "8", "--flops")
    assert [stage["index"] for stage in plan["stages"]] == list(range(8))
    for stage in plan["stages"]:
        assert {"index", "units", "parameters", "time_ms", "memory_bytes", "staleness"} <= set(stage)
        assert stage["memory_bytes"] == sum(stage["memory"].values())
    assert sum(stage["parameters"] for stage in plan["stages"]) == 22_319_208
    times = [stage["time_ms"] for stage in plan["stages"]]
    assert max(times) / (sum(times) / 8) == pytest.approx(1.36, abs=0.01)
    assert plan["predicted"]["slowest_over_mean"] == pytest.approx(1.36, abs=0.01)
    assert plan["predicted"]["images_per_s"] == pytest.approx(64_000 / max(times), rel=1e-3)
    assert plan["predicted"]["speedup_over_model_parallel"] == pytest.approx(4.42, abs=0.05)
    assert "nominal device of 1 TFLOP/s" in plan["times"]
    assert "9" in {str(count["devices"]) for count in plan["other_device_counts"]}


def test_measured_here() -> None:
    started = time.monotonic()
    plan = found("--model", "revnet18", "--gpus", "3", *SMALL)
    assert time.monotonic() - started < 20
    assert "measured here" in plan["times"]
    assert all(stage["forward_ms"] > 0 and stage["backward_ms"] > 0 for stage in plan["stages"])
    assert found("--model", "revnet18", "--gpus", "3", *SMALL)["stages"] == plan["stages"], "cached"


def test_the_table() -> None:
    result = partition("--model", "revnet34", "--gpus", "8", "--flops", "--replicas", "auto")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split("\t")[:3] == ["stage", "device", "parameters"]
    assert "x plain model parallelism" in result.stdout
    assert "the best exact pipeline" in result.stdout
    assert "replicas x stages:" in result.stdout
    assert "other numbers of devices, in one pipeline:" in result.stdout
    assert any(line.startswith("8 *") for line in lines), "the devices asked about"
    assert 'schedule = "least": lookahead' in result.stdout


def test_replicas_and_the_links_between_them(tmp_path: Path) -> None:
    unknown = partition("--model", "revnet18", "--gpus", "4", "--flops", "--replicas", "2")
    assert "the averaging of gradients is not in it" in unknown.stdout
    slow = tmp_path / "slow.toml"
    slow.write_text("tflops = 1\nlink_gb_per_s = 0.01\n")
    known = partition("--model", "revnet18", "--gpus", "4", "--device-spec", str(slow), "--replicas", "2")
    assert known.exit_code == 0, known.output
    assert "not in it" not in known.stdout
    free, paid = (found_rate(unknown.stdout), found_rate(known.stdout))
    assert paid < free
    assert "of 4 stages (backprop)" in known.stdout, "what it is compared with has all devices"
    assert "[engine]\nreplicas = 2" in known.stdout


def found_rate(text: str) -> float:
    (line,) = [line for line in text.splitlines() if "with 2 replicas" in line]
    return float(line.split("predicted: ")[1].split()[0].replace(",", ""))


def test_replicas_are_compared_with_all_devices() -> None:
    arguments = ["--model", "revnet18", "--gpus", "4", "--flops"]
    one, two = (found(*arguments, "--replicas", n)["predicted"] for n in ("1", "2"))
    for key in ("best_exact", "best_exact_accumulation", "compared_stages"):
        assert one[key] == two[key]
    for key in ("speedup_over_model_parallel", "speedup_over_best_exact"):
        assert one[key] / one["images_per_s"] == pytest.approx(two[key] / two["images_per_s"])


def test_exact_pipelines_that_do_not_fit_are_not_compared_with() -> None:
    arguments = ["--model", "revnet34", "--gpus", "8", "--flops", "--memory-gib"]
    tight = found(*arguments, "2.6")["predicted"]
    assert tight["best_exact"] is None
    assert tight["speedup_over_best_exact"] is None
    assert tight["best_exact_needs_bytes"] > 2.6 * 2**30
    shown = partition(*arguments, "2.6")
    assert "no exact pipeline fits to compare with: it needs devices of" in shown.stdout
    ample = found(*arguments, "200")["predicted"]
    assert ample["best_exact_needs_bytes"] is None
    free = found(*arguments[:-1])["predicted"]
    assert ample["speedup_over_best_exact"] == pytest.approx(free["speedup_over_best_exact"])


def test_what_cannot_be_written_is_told_before_the_work(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "r.toml"
    path.write_text('[model]\nname = "revnet18"\n[data]\n[method]\n')
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    result = partition("--model", "revnet18", "--gpus", "2", "--flops", "--write", str(path))
    assert result.exit_code == 2
    assert "no permission" in result.stderr


def test_write(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('# mine\n[model]\nname = "revnet34"\n[data]\n[method]\n[partition]\nstages = 4\n')
    plan = found("--model", "revnet34", "--gpus", "8", "--flops", "--write", str(path))
    assert tomli.loads(path.read_text())["partition"] == {"cuts": plan["cuts"]}
    assert path.read_text().startswith("# mine\n")
    other = partition("--model", "revnet18", "--gpus", "2", "--flops", "--write", str(path))
    assert other.exit_code == 2
    assert 'its model is "revnet34"' in other.stderr


def written(tmp_path: Path, text: str, *arguments: str) -> tuple[Result, dict]:
    path = tmp_path / "r.toml"
    path.write_text(text)
    result = partition("--gpus", "4", "--flops", "--write", str(path), *arguments)
    return result, tomli.loads(path.read_text())


def test_replicas_are_written(tmp_path: Path) -> None:
    text = '[model]\nname = "revnet34"\n[data]\n[method]\n[engine]\nreplicas = 4\n'
    result, recipe = written(tmp_path, text, "--model", "revnet34", "--replicas", "2")
    assert result.exit_code == 0, result.output
    assert recipe["engine"]["replicas"] == 2
    assert len(recipe["partition"]["cuts"]) == 1
    assert "warning" not in result.stderr
    result, recipe = written(tmp_path, text, "--model", "revnet34")
    assert recipe["engine"]["replicas"] == 4
    assert "engine.replicas = 4 (planned: 1)" in result.stderr


def test_a_recipe_of_other_settings_is_warned_of(tmp_path: Path) -> None:
    text = (
        '[model]\nname = "revnet34"\nwidth = 32\nclasses = 10\nstem = "cifar"\n[data]\nbatch_size = 8\n'
        '[method]\nname = "delayed"\nkeep = "inputs"\naccumulation = 4\n[engine]\nschedule = "paper"\n'
        '[optimizer]\nname = "adamw"\n'
    )
    result, recipe = written(tmp_path, text, "--model", "revnet34", "--stem", "imagenet")
    assert result.exit_code == 0, result.output
    assert len(recipe["partition"]["cuts"]) == 3
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("warning")]
    for said in (
        "model.width = 32 (planned: 64)",
        "model.classes = 10 (planned: 1000)",
        "model.stem = cifar (planned: imagenet)",
        "data.batch_size = 8 (planned: 64)",
        "method.name = delayed (planned: petra)",
        "method.accumulation = 4 (planned: 1)",
        "engine.schedule = paper (planned: auto)",
        "optimizer.name = adamw (planned: sgd)",
    ):
        assert said in line
    same = ["--width", "32", "--classes", "10", "--stem", "cifar", "--batch", "8", "--method", "delayed"]
    same += ["--keep", "inputs", "--accumulation", "4", "--schedule", "paper", "--optimizer", "adamw"]
    result, _ = written(tmp_path, text, "--model", "revnet34", *same)
    assert "warning" not in result.stderr


def test_a_recipe_of_another_number_of_units_is_refused(tmp_path: Path) -> None:
    text = '[model]\nname = "revnet-iso"\ndepth = 12\n[data]\n[method]\n'
    result, recipe = written(tmp_path, text, "--model", "revnet-iso", "--image-size", "32")
    assert result.exit_code == 2
    assert "its net has 14 units, and the cuts are for 10" in result.stderr
    assert "partition" not in recipe


def test_devices_and_memory() -> None:
    plan = found("--model", "revnet50", "--gpus", "2", "--device-spec", "v100-16gb,h100-80gb")
    assert [stage["device"] for stage in plan["stages"]] == ["v100-16gb", "h100-80gb"]
    first, second = plan["stages"]
    assert second["num_units"] > first["num_units"]
    assert first["memory_limit_bytes"] == 16 * 10**9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "revnet34", "--gpus", "0"], "0 GPUs"),
        (["--model", "revnet34", "--gpus", "20"], "give at most 18 GPUs, or --replicas 2"),
        (["--model", "revnet43", "--gpus", "2"], 'did you mean "revnet34"'),
        (["--model", "revnet34", "--gpus", "2", "--memory-gib", "1"], "batches of"),
        (["--model", "resnet18", "--gpus", "2", "--method", "reversible"], "no reversible unit"),
        (["--model", "revnet18", "--gpus", "2", "--method", "petri"], "unknown method"),
        (["--model", "revnet18", "--gpus", "2", "--method", "local"], "local trains block by block"),
        (["--model", "revnet18", "--gpus", "2", "--method", "forward-gradient"], "not planned for"),
        (["--model", "revnet18", "--gpus", "2", "--balance", "colour"], "cannot be balanced"),
        (["--model", "revnet18", "--gpus", "3", "--cuts", "5,2"], "are no cuts"),
        (["--model", "revnet18", "--gpus", "3", "--cuts", "5"], "1 cuts make 2 stages"),
        (["--model", "revnet18", "--gpus", "4", "--replicas", "3"], "give one of 1, 2, 4"),
        (["--model", "revnet18", "--gpus", "4", "--replicas", "0"], "give one of 1, 2, 4"),
        (["--model", "revnet18", "--gpus", "4", "--replicas", "many"], "is no number of replicas"),
        (["--model", "revnet18", "--gpus", "2", "--schedule", "fast"], "unknown schedule"),
        (["--model", "revnet18", "--gpus", "2", "--schedule", "1,2"], "must not increase"),
        (["--model", "revnet18", "--gpus", "2", "--device-spec", "gpu9"], "no device is called"),
        (["--model", "revnet18", "--gpus", "2", "--stem", "big"], 'there is no stem "big"'),
        (["--model", "revnet18", "--gpus", "2", "--write", "none.toml"], "no such recipe"),
        (["--model", "revnet18", "--gpus", "2", "--write", "."], "is a folder"),
        (["--model", "revnet18", "--gpus", "99999"], "at most 16,384"),
        (["--model", "revnet18", "--gpus", "2", "--memory-gib", "inf"], "is no memory"),
        (["--model", "revnet18", "--gpus", "2", "--memory-gib", "0.001"], "TFLOP/s) has 0 GiB"),
        (["--model", "revnet18", "--gpus", "2", "--schedule", "99999999,0"], "ahead are too many"),
        (["--model", "revnet18", "--gpus", "2", "--schedule", "gpipe"], 'petra does not run "gpipe"'),
        (
            ["--model", "revnet18", "--gpus", "2", "--method", "backprop", "--schedule", "tight"],
            "runs no forward ahead",
        ),
        (
            ["--model", "revnet18", "--gpus", "2", "--method", "backprop", "--schedule", "interleaved-1f1b"],
            "has two stages per device",
        ),
        (
            ["--model", "revnet18", "--gpus", "4", "--method", "backprop", "--schedule", "1f1b"],
            "at least as many microbatches per update as stages",
        ),
        (
            ["--model", "revnet18", "--gpus", "2", "--schedule", "fast"],
            "tight, paper, least, sequential, gpipe",
        ),
        (["--model", "revnet18", "--gpus", "2", "--keep", "graph"], "petra has nothing to choose"),
        (["--model", "revnet18", "--gpus", "2", "--depth", "9"], "has a depth of its own"),
        (["--model", "revnet18", "--gpus", "2", "--fresh"], "measures nothing"),
        (["--model", "revnet18", "--gpus", "2", "--threads", "2"], "measures nothing"),
        (["--model", "revnet18", "--gpus", "2", "--device", "cpu"], "measures nothing"),
        (["--model", "revnet18", "--gpus", "2", "--device-spec", "t4:0"], "is no number of devices"),
        (["--model", "revnet18", "--gpus", "2", "--device-spec", "t4:3"], "3 devices are listed"),
    ],
)
def test_bad_input_is_one_clear_message(arguments: list[str], message: str) -> None:
    result = partition(*arguments, "--flops")
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert message in result.stderr
    assert "Traceback" not in result.stderr
