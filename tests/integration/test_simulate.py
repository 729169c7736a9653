"""`petractl simulate` from the command line."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from petractl.cli import simulate
from petractl.cli.report import guarded

NUMBERS = ("--stages", "4", "--forward-ms", "20", "--backward-ms", "60")


def run(*arguments: str) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(guarded(simulate.command))
    return CliRunner().invoke(app, list(arguments))


def schedules(*arguments: str) -> dict[str, dict[str, float]]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return {each["entry"]: each for each in json.loads(result.stdout)["schedules"]}


def test_numbers_on_the_command_line() -> None:
    found = schedules(*NUMBERS, "--accumulation", "8")
    assert found["tight"]["microbatches_per_s"] == pytest.approx(12.5)
    assert found["delayed"]["microbatches_per_s"] == pytest.approx(1000 / 60)
    assert found["gpipe"]["idle_percent"] == pytest.approx(100 * 3 / 11)
    assert found["plain"]["microbatches_per_s"] == pytest.approx(1000 / 240)
    assert found["tight"]["speedup_over_model_parallel"] == pytest.approx(3 * 4 / 4)
    assert found["tight"]["staleness_updates"] == pytest.approx(1.5 / 8)


def test_the_table() -> None:
    result = run(*NUMBERS, "--schedules", "tight,plain")
    assert result.exit_code == 0, result.output
    header, *rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert header[:3] == ["schedule", "microbatches/s", "vs plain"]
    assert [row[:3] for row in rows] == [["tight", "12.5", "3.00 x"], ["plain", "4.167", "1.00 x"]]


def test_one_time_per_stage_and_unequal_devices() -> None:
    times = ("--forward-ms", "10,20,30", "--backward-ms", "30", "--schedules", "tight")
    assert schedules(*times)["tight"]["microbatches_per_s"] == pytest.approx(1000 / 60)
    slow = schedules(*times, "--speeds", "0.5,1,1")
    assert slow["tight"]["microbatches_per_s"] == pytest.approx(1000 / 80)


def test_links_jitter_and_an_epoch() -> None:
    link = ("--latency-ms", "10", "--message-kib", "125", "--bandwidth-gbps", "1.024", "--schedules", "plain")
    # 1 ms to put a message on the way, 10 ms on it, six messages; backprop's backward.
    assert schedules(*NUMBERS, *link)["plain"]["microbatches_per_s"] == pytest.approx(1000 / (240 + 66))
    epoch = schedules(*NUMBERS, "--microbatches", "10", "--schedules", "paper")["paper"]
    assert epoch["seconds"] == pytest.approx((10 * 80 + 3 * 80) / 1000)
    noisy = schedules(*NUMBERS, "--jitter", "0.2", "--schedules", "tight")["tight"]
    assert 8 < noisy["microbatches_per_s"] < 12.4


def test_a_recipe(tmp_path: Path) -> None:
    arguments = ("digits_revnet18", "--set", "partition.stages=3", "--set", "model.width=4")
    found = schedules(*arguments)
    assert next(iter(found)) == "petra/tight"
    assert "tight" not in found
    assert found["petra/tight"]["images_per_s"] == 64 * found["petra/tight"]["microbatches_per_s"]
    assert len(found["paper"]["stages"]) == 3  # type: ignore[arg-type]
    assert found["least"]["share_of_limit"] > 0.99
    result = run(*arguments, "--schedules", "tight")
    assert "nominal device of 1 TFLOP/s" in result.stderr


def test_charts_and_traces(tmp_path: Path) -> None:
    gantt, trace = tmp_path / "g.png", tmp_path / "t.json"
    result = run(*NUMBERS, "--accumulation", "4", "--gantt", str(gantt), "--trace", str(trace))
    assert result.exit_code == 0, result.output
    assert gantt.read_bytes().startswith(b"\x89PNG")
    names = [
        e["args"]["name"] for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "process_name"
    ]
    assert names == ["tight", "paper", "least", "delayed", "gpipe", "1f1b"]
    assert "interleaved, zero-bubble, plain" in result.stderr


def test_a_sweep(tmp_path: Path) -> None:
    plot = tmp_path / "s.png"
    base = (
        "--forward-ms",
        "20",
        "--backward-ms",
        "60",
        "--schedules",
        "tight,plain",
        "--sweep",
        "2,4,...,64",
    )
    result = run(*base, "--plot", str(plot))
    assert result.exit_code == 0, result.output
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert rows[0] == ["stages", "tight, /s", "plain, /s"]
    assert [row[0] for row in rows[1:]] == ["2", "4", "8", "16", "32", "64"]
    assert {row[1] for row in rows[1:]} == {"12.5"}
    assert plot.read_bytes().startswith(b"\x89PNG")
    points = json.loads(run(*base, "--json").stdout)["sweep"]
    assert len(points) == 12
    assert points[-1]["microbatches_per_s"] == pytest.approx(1000 / 60 / 64)


def journal(folder: Path, *, schedule: str = "tight", compute: float | None = 80.0) -> None:
    plan = {
        "event": "plan_made",
        "stages": [{"lookahead": 1}, {"lookahead": 0}],
        "accumulation": 1,
        "steps_per_epoch": 10,
        "replicas": 1,
        "schedule": schedule,
        "method": "petra",
    }
    records = [plan]
    for epoch in (1, 2, 3):
        seconds = 9.0 if epoch == 1 else 1.25
        records += [
            {
                "event": "stage_measured",
                "epoch": epoch,
                "stage": stage,
                "replica": 0,
                "seconds": seconds,
                "compute_percent": compute,
                "idle_percent": None if compute is None else 100 - compute,
                "staleness_updates": 0.9 if stage == 0 else 0.0,
            }
            for stage in (0, 1)
        ]
        records.append({"event": "epoch_trained", "epoch": epoch, "samples": 640, "seconds": seconds})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_run_beside_its_prediction(tmp_path: Path) -> None:
    journal(tmp_path)
    found = json.loads(run("--compare", str(tmp_path), "--json").stdout)
    # 0.1 s per microbatch on both stages, 10 of them, and one forward and backward to fill and drain.
    assert found["simulated"]["seconds"] == pytest.approx(1.1)
    assert found["measured"]["images_per_s"] == pytest.approx(512)
    assert found["simulated"]["images_per_s"] == pytest.approx(640 / 1.1)
    assert found["measured"]["epochs"] == 2
    result = run("--compare", str(tmp_path))
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert rows[1] == ["0", "100.000", "9.1 %", "20.0 %", "0.9", "0.9"]
    assert rows[-1] == ["images/s: 581.8 simulated, 512.0 measured (+13.6 %)"]


def test_a_run_that_measured_nothing(tmp_path: Path) -> None:
    journal(tmp_path, compute=None)
    result = run("--compare", str(tmp_path))
    assert result.exit_code == 2
    assert "no measured stages" in result.stderr
    assert run("--compare", str(tmp_path / "nothing")).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "names no pipeline"),
        (("--stages", "4"), "--forward-ms: is missing"),
        (("digits_revnet18", "--stages", "4"), "a recipe has stages"),
        (("--stages", "4", "--forward-ms", "a", "--backward-ms", "1"), "not a list of numbers"),
        (("--stages", "4", "--forward-ms", "1,2", "--backward-ms", "1"), "2 numbers for 4 stages"),
        (("--stages", "2", "--forward-ms", "0", "--backward-ms", "0"), "0 ms"),
        ((*NUMBERS, "--speeds", "0"), "must be above 0"),
        ((*NUMBERS, "--schedules", "[1,0]"), "2 entries for 4 stages"),
        ((*NUMBERS, "--schedules", "tigth"), "is no schedule"),
        ((*NUMBERS, "--gantt", "g.pdf"), "is not a PNG file"),
        ((*NUMBERS, "--trace", "nowhere/t.json"), "there is no folder nowhere"),
        ((*NUMBERS, "--plot", "p.png"), "draws a sweep"),
        ((*NUMBERS, "--set", "a.b=1"), "changes a recipe"),
        ((*NUMBERS, "--sweep", "2,x"), "not a list of numbers of stages"),
        ((*NUMBERS, "--sweep", "2,...,8"), "not a list of numbers of stages"),
        ((*NUMBERS, "--sweep", "99999"), "too many"),
        ((*NUMBERS, "--sweep", "2,4", "--microbatches", "4"), "no timeline"),
        ((*NUMBERS, "--sweep", "2,4", "--schedules", "[3,2,1,0]"), "is for 4 stages"),
        (("--forward-ms", "1,2", "--backward-ms", "1", "--sweep", "2,4"), "equal stages"),
        (("--compare", ".", "--gantt", "g.png"), "from the run"),
    ],
)
def test_bad_input(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []
