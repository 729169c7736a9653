"""`petractl simulate` from the command line."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from petractl.cli import simulate
from petractl.cli.report import guarded

TIMES = ("--forward-ms", "20", "--backward-ms", "60")
NUMBERS = ("--stages", "4", *TIMES)


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
    assert header[:3] == ["schedule", "microbatches/s", "x plain"]
    assert [row[:3] for row in rows] == [["tight", "12.5", "3.00"], ["plain", "4.167", "1.00"]]


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


RECIPE = ("digits_revnet18", "--set", "partition.stages=3", "--set", "model.width=4")


def test_a_recipe_by_flops() -> None:
    found = schedules(*RECIPE, "--flops")
    assert next(iter(found)) == "petra/tight"
    assert "tight" not in found
    assert found["petra/tight"]["images_per_s"] == 64 * found["petra/tight"]["microbatches_per_s"]
    assert len(found["paper"]["stages"]) == 3  # type: ignore[arg-type]
    assert found["least"]["share_of_limit"] > 0.99
    result = run(*RECIPE, "--flops", "--schedules", "tight")
    assert "nominal device of 1 TFLOP/s: proportions hold, seconds do not" in result.stderr


def test_a_recipe_is_measured_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = run(*RECIPE, "--schedules", "tight,plain", "--json")
    assert first.exit_code == 0, first.output
    assert "measured here" in json.loads(first.stdout)["times"]
    assert json.loads(first.stdout)["schedules"][0]["microbatches_per_s"] > 0
    assert run(*RECIPE, "--schedules", "tight,plain", "--json").stdout == first.stdout, "cached"
    table = run(*RECIPE, "--schedules", "tight")
    assert table.stdout.splitlines()[0].endswith("\tmemory")
    assert "times: measured here" in table.stderr


def test_the_memory_of_a_recipes_stages() -> None:
    found = schedules(*RECIPE, "--flops", "--set", "method.accumulation=6")
    memory = {
        entry: [stage["memory_bytes"] for stage in each["stages"]]  # type: ignore[attr-defined]
        for entry, each in found.items()
    }
    assert all(min(each) > 0 for each in memory.values())
    # Graphs cost more than nothing at all, and GPipe keeps all microbatches of an update.
    assert memory["delayed"][0] > memory["petra/tight"][0]
    assert memory["gpipe"][0] > memory["1f1b"][0] > memory["plain"][0]
    assert max(memory["interleaved"]) < 2 * max(memory["gpipe"])
    assert found["gpipe"]["most_memory_bytes"] == max(memory["gpipe"])
    assert "memory_bytes" in schedules(*NUMBERS)["tight"]["stages"][0]  # type: ignore[index]
    assert schedules(*NUMBERS)["tight"]["most_memory_bytes"] is None


def test_a_recipe_on_devices_that_are_not_here(tmp_path: Path) -> None:
    even = schedules(*RECIPE, "--device-spec", "h100-80gb", "--schedules", "tight")["tight"]
    mixed = schedules(*RECIPE, "--device-spec", "h100-80gb:2,t4", "--schedules", "tight")["tight"]
    assert mixed["microbatches_per_s"] < even["microbatches_per_s"]
    halved = schedules(*RECIPE, "--flops", "--speeds", "0.5", "--schedules", "tight,plain")
    whole = schedules(*RECIPE, "--flops", "--schedules", "tight,plain")
    for entry in ("tight", "plain"):
        assert 2 * halved[entry]["microbatches_per_s"] == pytest.approx(whole[entry]["microbatches_per_s"])
    small = tmp_path / "small.toml"
    small.write_text("tflops = 1\nmemory_gib = 0.0001\n")
    result = run(*RECIPE, "--device-spec", str(small), "--schedules", "tight")
    assert "warning: tight: needs" in result.stderr
    assert "on a device of 0.1 MiB" in result.stderr


def test_replicas_wait_for_their_average(tmp_path: Path) -> None:
    slow = tmp_path / "slow.toml"
    slow.write_text("tflops = 1\nlink_gb_per_s = 0.001\n")
    only = ("--device-spec", str(slow), "--schedules", "plain", "--set", "data.batch_size=16")
    one = schedules(*RECIPE, *only)["plain"]
    two = schedules(*RECIPE, *only, "--set", "engine.replicas=2", "--set", "engine.mode=processes")["plain"]
    assert two["microbatches_per_s"] < 0.9 * one["microbatches_per_s"]


def test_interleaved_stages_are_cut_from_the_net() -> None:
    def of(*more: str) -> dict[str, float]:
        k = ("--set", "method.accumulation=6", "--flops", "--schedules", "interleaved")
        return schedules("digits_revnet18", *k, *more)["interleaved"]

    fair = of("--set", "partition.stages=3")
    assert fair["share_of_limit"] < 1
    assert len(fair["stages"]) == 3  # type: ignore[arg-type]
    result = run("digits_revnet18", "--flops", "--schedules", "interleaved")
    assert result.exit_code == 2
    assert "10 processes of two stages need 20 units, and there are 10" in result.stderr
    # By default, what the net cannot do is not compared.
    assert "interleaved" not in schedules("digits_revnet18", "--flops")
    own = ("engine.schedule=interleaved-1f1b", "method.name=backprop", "partition.stages=6")
    whole = schedules("digits_revnet18", "--flops", *(word for key in own for word in ("--set", key)))
    assert next(iter(whole)) == "backprop/interleaved-1f1b"
    assert len(next(iter(whole.values()))["stages"]) == 3  # type: ignore[arg-type]


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


def test_a_run_that_was_trained_block_by_block(tmp_path: Path) -> None:
    journal(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"petra"', '"forward-gradient"'))
    result = run("--compare", str(tmp_path))
    assert result.exit_code == 2
    assert "forward-gradient trains block by block" in result.stderr


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
        (("--stages", "2", "--forward-ms", "0", "--backward-ms", "0"), "less than 1e-06 ms"),
        (("--stages", "2", "--forward-ms", "0", "--backward-ms", "1e-320"), "less than 1e-06 ms"),
        (("--stages", "2", "--forward-ms", "1e300", "--backward-ms", "1"), "from 0 to 1,000,000,000"),
        ((*NUMBERS, "--schedules", ""), "(empty)"),
        ((*NUMBERS, "--sweep", "2,4", "--plot", "p.png"), "numbers of stages of its own"),
        ((*NUMBERS, "--message-kib", "1", "--bandwidth-gbps", "1e-300"), "no link's bandwidth"),
        ((*NUMBERS, "--speeds", "0"), "must be above 0"),
        ((*NUMBERS, "--schedules", "[1,0]"), "2 entries for 4 stages"),
        ((*NUMBERS, "--schedules", "tigth"), "is no schedule"),
        ((*NUMBERS, "--gantt", "g.pdf"), "is not a PNG file"),
        ((*NUMBERS, "--trace", "nowhere/t.json"), "there is no folder nowhere"),
        ((*NUMBERS, "--plot", "p.png"), "draws a sweep"),
        ((*NUMBERS, "--set", "a.b=1"), "changes a recipe"),
        ((*TIMES, "--sweep", "2,x"), "not a list of numbers of stages"),
        ((*TIMES, "--sweep", "2,...,8"), "not a list of numbers of stages"),
        ((*TIMES, "--sweep", "99999"), "too many"),
        ((*TIMES, "--sweep", "2,4", "--microbatches", "4"), "no timeline"),
        ((*TIMES, "--sweep", "2,4", "--schedules", "[3,2,1,0]"), "is for 4 stages"),
        (("--forward-ms", "1,2", "--backward-ms", "1", "--sweep", "2,4"), "equal stages"),
        (("--compare", ".", "--gantt", "g.png"), "from the run"),
        ((*NUMBERS, "--latency-ms", "nan"), "Invalid value"),
        ((*NUMBERS, "--jitter", "inf"), "Invalid value"),
        ((*NUMBERS, "--forward-ms", "nan"), "not a list of numbers"),
        ((*NUMBERS, "--accumulation", "0"), "Invalid value"),
        ((*NUMBERS, "--microbatches", "9999999"), "Invalid value"),
        ((*NUMBERS, "--microbatches", "200000", "--gantt", "g.png"), "too many to draw"),
        ((*NUMBERS, "--schedules", "[99999999,0,0,0]"), "too many"),
        ((*NUMBERS, "--latency-ms", "1e9", "--schedules", "least"), "too many"),
        ((*NUMBERS, "--flops"), "there is no recipe"),
        ((*NUMBERS, "--device-spec", "t4"), "there is no recipe"),
        ((*NUMBERS, "--seed", "3"), "is the jitter's"),
        (("digits_revnet18", "--flops", "--fresh"), "measures nothing"),
        (("digits_revnet18", "--sweep", "2,4"), "equal stages"),
        (("digits_revnet18", "--flops", "--speeds", "1,2,3"), "3 numbers for 10 stages"),
        (("digits_revnet18", "--device-spec", "gpu9"), "no device is called"),
        (("nothing.toml",), "nothing.toml"),
        (("digits_fg", "--flops"), "forward-gradient trains block by block"),
        (("digits_revnet18", "--flops", "--set", "method.name=local"), "local trains block by block"),
        ((*NUMBERS, "--schedules", "tight,local"), "local trains block by block"),
        ((*NUMBERS, "--schedules", "forward-gradient/tight"), "not planned for"),
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
