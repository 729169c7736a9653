"""`petractl bench` from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from petractl.bench import comparison
from petractl.bench.measuring import Round
from petractl.cli.app import app

METHODS = "petra,delayed:inputs/paper,backprop"
SMALL = [
    *("--set", "model.width=4"),
    *("--set", "data.batch_size=8"),
    *("--set", "partition.stages=3"),
    *("--set", "engine.device=cpu"),
    *("--set", "engine.threads=1"),
    *("--repeats", "2", "--microbatches", "3", "--warmup", "1"),
]


def bench(*arguments: str, methods: str = METHODS) -> Result:
    return CliRunner().invoke(app, ["bench", "digits_revnet18", "--methods", methods, *SMALL, *arguments])


def test_every_method_is_an_object(tmp_path: Path) -> None:
    out = tmp_path / "results" / "first"
    result = bench("--json", "--out", str(out), "--set", "method.accumulation=2")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [each["variant"] for each in found] == METHODS.split(",")
    assert [each["schedule"] for each in found] == ["tight", "paper", "sequential"]
    assert [each["method"] for each in found] == ["petra", "delayed (keep = inputs)", "backprop"]
    # Lookahead 2, 4 and 0; k = 2.
    assert [list(each["microbatches"].values()) for each in found] == [[4, 4, 2], [6, 4, 4], [2, 4, 0]]
    for each in found:
        rate = each["images_per_s"]
        assert len(rate["all"]) == 2
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        assert each["stages"] == 3
        (process,) = each["processes"]
        assert process["stages"] == [0, 1, 2]
        assert process["idle_percent"] is each["bytes_sent_per_microbatch"] is None
        assert 100_000 < process["peak_memory_bytes"] < 100_000_000
        assert not each["diverged"]
    assert found[0]["ratio"]["all"] == [1.0, 1.0]
    ratios = [
        a / b for a, b in zip(found[2]["images_per_s"]["all"], found[0]["images_per_s"]["all"], strict=True)
    ]
    assert found[2]["ratio"]["all"] == pytest.approx(ratios)
    written = json.loads((out / "bench.json").read_text())
    assert written["methods"] == found
    assert written["options"] == {"repeats": 2, "microbatches": 3, "warmup": 1}
    assert written["recipe"] == "digits_revnet18"
    assert written["environment"]["torch"]
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_and_the_chart(tmp_path: Path) -> None:
    chart = tmp_path / "chart.png"
    result = bench("--plot", str(chart))
    assert result.exit_code == 0, result.output
    header, *rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert header[0] == "variant"
    assert [row[0] for row in rows] == METHODS.split(",")
    assert rows[0][5] == "1.000 (1.000 - 1.000)"
    assert all(row[-3] == row[-1] == "-" for row in rows)
    assert all(row[-2].endswith(" MiB") for row in rows)
    assert "repeat 2 of 2, images/s: petra " in result.stderr
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_the_methods_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def measured(contender: comparison.Contender, *_: object, **__: object) -> Round:
        order.append(contender.name)
        return Round(images_per_s=float(len(order)))

    monkeypatch.setattr(comparison, "measure_round", measured)
    result = bench("--json")
    assert order == METHODS.split(",") * 2
    assert [each["images_per_s"]["all"] for each in json.loads(result.stdout)] == [[1, 4], [2, 5], [3, 6]]


def test_all_problems_are_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petractl.bench.launching.measure", lambda *_, **__: pytest.fail("it was started"))
    wrong = "petra,delayed:nothing,backprop/paper,petr"
    result = bench("--set", "partition.stages=30", methods=wrong)
    assert result.exit_code == 2
    for told in (
        "delayed:nothing: method.keep",
        "backprop/paper: engine.schedule",
        "petr: method.name",
        "did you mean petra?",
        "petra: partition.stages: 30 stages are more than the 10 units",
    ):
        assert told in result.stderr, told
    assert result.stdout == ""


def test_a_problem_of_all_is_told_once() -> None:
    result = bench("--set", "partition.stages=40", methods="petra,backprop")
    assert result.exit_code == 2
    assert result.stderr.count("40 stages are more than the 10 units") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--plot", "chart.svg"], "is not a PNG file"),
        (["--plot", "nowhere/chart.png"], "there is no folder nowhere"),
        (["--out", "full"], "the folder is not empty"),
        (["--out", "full/file"], "cannot be made"),
        (["--repeats", "0"], "--repeats"),
        (["--warmup", "0"], "--warmup"),
    ],
)
def test_what_is_asked_for_must_be_possible(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/file").touch()
    result = bench(*arguments)
    assert result.exit_code == 2
    assert told in result.stderr


def test_a_loss_that_is_no_number_is_told() -> None:
    result = bench(
        "--set", "optimizer.lr=1e30", "--set", "training.warmup_epochs=0", "--json", methods="petra"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)[0]["diverged"]
    assert "the loss of petra stopped being a number" in result.stderr


def test_a_warning_of_several_is_told_once() -> None:
    result = bench("--set", "model.name=resnet18", methods="petra,petra/paper")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("resnet18 has no reversible unit") == 1


def process(
    *arguments: str, methods: str, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run it as a process of its own, or under a launcher."""
    words = ["-m", "petractl", "bench", "digits_revnet18", "--methods", methods, *SMALL, *arguments]
    command = [sys.executable, *launcher, *words]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)


def first_words(text: str) -> list[str]:
    return [line.split(",")[0].split(":")[0] for line in text.splitlines()]


def test_stdout_is_json_alone_and_stderr_has_no_noise() -> None:
    done = process("--json", methods="petra")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 1
    assert first_words(done.stderr) == ["variant 1 of 1", "repeat 1 of 2", "repeat 2 of 2"]


# Several processes

PIPELINES = ("--set", "partition.stages=2", "--set", "method.accumulation=2")


def test_where_one_needs_processes_all_run_in_them(tmp_path: Path) -> None:
    out = tmp_path / "results"
    methods = "petra,backprop,backprop/gpipe,backprop/interleaved-1f1b"
    done = process("--json", "--out", str(out), *PIPELINES, methods=methods)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [each["stages"] for each in found] == [2, 2, 2, 4]
    for each in found:
        lower, upper = each["processes"]
        assert [lower["rank"], upper["rank"]] == [0, 1]
        assert [lower["stages"], upper["stages"]] == ([[0], [1]] if each["stages"] == 2 else [[0, 2], [1, 3]])
        assert all(0 <= p["idle_percent"] <= 100 for p in each["processes"])
        assert all(p["peak_memory_bytes"] > 10_000 for p in each["processes"])
        sent = [p["bytes_sent_per_microbatch"] for p in each["processes"]]
        assert each["bytes_sent_per_microbatch"] == sum(sent)
        assert min(sent) > 0
    # Messages of the engine have headers, and labels; what the exact pipelines send is counted from shapes.
    plain, exact = (each["bytes_sent_per_microbatch"] for each in found[1:3])
    assert exact <= plain <= 1.2 * exact
    assert json.loads((out / "bench.json").read_text())["methods"] == found
    assert (out / "bench.png").is_file()
    told = ["variant 1 of 4", "variant 2 of 4", "variant 3 of 4", "variant 4 of 4"]
    assert first_words(done.stderr) == [*told, "repeat 1 of 2", "repeat 2 of 2"]


def test_torchrun_can_start_it() -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = process("--json", "--set", "partition.stages=2", methods="petra,backprop", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert [len(each["processes"]) for each in json.loads(done.stdout)] == [2, 2]


def test_all_need_as_many_processes() -> None:
    result = bench("--set", "partition.stages=units", methods="petra,backprop/interleaved-1f1b")
    assert result.exit_code == 2
    assert "petra: 10, backprop/interleaved-1f1b: 5" in result.stderr
