"""Runs that are killed again and again, at any moment, and end with the bits of one that never was.

Each case starts a run, kills one of its processes, starts the same command again (`run --resume auto`), until
its kills are used up; then it lets the run end. The seeds fix who is killed, how, and when; where in training
that is depends on the machine. Every second kill waits for a checkpoint that is being written.
"""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

EPOCHS, MICROBATCHES, STAGES = 2, 23, 3
RECIPE = """
[model]
name = "revnet18"
width = 2
[data]
name = "digits"
batch_size = 64
[method]
name = "{method}"
accumulation = 2
[partition]
stages = {stages}
[engine]
device = "cpu"
mode = "{mode}"
threads = 1
[training]
epochs = {epochs}
warmup_epochs = 1.0
[run]
checkpoint_every = "2 updates"
[tracking]
mlflow = false
"""
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
START_TIMEOUT_S, RUN_TIMEOUT_S = 90.0, 180.0


@dataclass(frozen=True)
class Case:
    """One run: how it runs, and how often it is killed."""

    method: str
    mode: str
    kills: int
    seed: int


DEFAULT = [
    Case("petra", "in-process", 2, 1),
    Case("petra", "processes", 2, 2),
    Case("delayed", "in-process", 1, 3),
    Case("delayed", "processes", 1, 4),
]
LONG = [Case(method, mode, 5, 10 + n) for n in range(2) for method in ("petra", "delayed")
        for mode in ("in-process", "processes")]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Give the exported weights of a method's run that nobody kills."""

    @functools.cache
    def weights(method: str) -> bytes:
        return bits(train(tmp_path_factory.mktemp("undisturbed"), method, "in-process"))

    return weights


def recipe(folder: Path, method: str, mode: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(method=method, mode=mode, stages=STAGES, epochs=EPOCHS))
    return path


def command(folder: Path) -> list[str]:
    run = folder / "run"
    arguments = ["run", str(folder / "recipe.toml"), "--dir", str(run), "--resume", "auto"]
    return [sys.executable, "-m", "petractl", *arguments]


def train(folder: Path, method: str, mode: str) -> Path:
    recipe(folder, method, mode)
    done = subprocess.run(command(folder), capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def bits(run: Path) -> bytes:
    out = run.parent / "weights.safetensors"
    export = [sys.executable, "-m", "petractl", "export", str(run), "--out", str(out)]
    subprocess.run(export, check=True, capture_output=True, timeout=60)
    return out.read_bytes()


def family(pid: int) -> list[int]:
    """Return a process and all that it has started, itself first."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def wait_until(condition, process: subprocess.Popen, *, timeout_s: float) -> None:
    """Wait until the condition holds or the process has ended."""
    end = time.monotonic() + timeout_s
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "it did not get so far"
        time.sleep(0.001)


def kill_one(process: subprocess.Popen, run: Path, draw: random.Random, *, while_writing: bool) -> str:
    """Kill a process of the run at a moment that `draw` decides; returns who and how."""
    journal, checkpoints = run / "metrics.jsonl", run / "checkpoints"
    size = journal.stat().st_size if journal.exists() else 0
    wait_until(lambda: journal.exists() and journal.stat().st_size > size, process, timeout_s=START_TIMEOUT_S)
    if while_writing:
        wait_until(lambda: any(checkpoints.glob(".writing-*")), process, timeout_s=START_TIMEOUT_S)
    else:
        time.sleep(draw.uniform(0.0, 1.5))
    number = draw.choice(SIGNALS)
    victims = family(process.pid)
    victim = draw.choice(victims)
    try:
        os.kill(victim, number)
    except ProcessLookupError:
        return "nobody"
    return f"{number.name} to process {victims.index(victim)} of {len(victims)}"


def journal_of(run: Path, event: str) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == event]


def check_counts(run: Path) -> None:
    """Every stage has had every microbatch of every epoch once, whatever was begun in between."""
    for epoch in range(1, EPOCHS + 1):
        counted = [record for record in journal_of(run, "stage_counted") if record["epoch"] == epoch]
        last = {record["stage"]: record for record in counted}
        assert sorted(last) == list(range(STAGES))
        for record in last.values():
            done = {record[key] for key in ("microbatches", "forwards", "backwards")}
            assert done == {MICROBATCHES}, record
            assert record["updates"] == -(-MICROBATCHES // 2)
    manifest = run / "checkpoints" / f"epoch-{EPOCHS:04d}" / "manifest.json"
    counters = json.loads(manifest.read_text())["state"]["counters"]
    assert counters["forwards"] == counters["backwards"] == EPOCHS * MICROBATCHES


def check_that_the_stop_was_saved(run: Path) -> None:
    """Nothing that was told as done is lost by a stop: it goes on no further back than what was in flight."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    started = max(n for n, record in enumerate(lines) if record["event"] == "run_started")
    session, end = lines[started:], lines[-1]
    done = [(r["epoch"], r["microbatches"]) for r in session if r["event"] == "steps_done"]
    assert end["event"] == "run_interrupted"
    told = (end["epoch"], end["microbatch"] or 0)
    folders = [path.name for path in (run / "checkpoints").glob("epoch-*")]
    if told != (1, 0):
        epoch, microbatches = told
        in_mid_epoch = f"epoch-{epoch:04d}-microbatch-{microbatches:06d}"
        assert (in_mid_epoch if microbatches else f"epoch-{epoch - 1:04d}") in folders
    if done:
        epoch, microbatches = done[-1]
        assert told >= (epoch, microbatches - (STAGES - 1)), (told, done[-1])


def crash(folder: Path, case: Case, expected: bytes) -> None:
    draw = random.Random(case.seed)
    recipe(folder, case.method, case.mode)
    run, log = folder / "run", []
    for kill in range(case.kills):
        with (folder / f"output-{kill}.txt").open("w") as output:
            process = subprocess.Popen(command(folder), stdout=output, stderr=subprocess.STDOUT)
        began = family(process.pid)
        try:
            log.append(kill_one(process, run, draw, while_writing=kill % 2 == 0))
            began = family(process.pid) or began
            code = process.wait(timeout=RUN_TIMEOUT_S)
        finally:
            process.kill()
        assert code in (0, 1, 130, -signal.SIGKILL, -signal.SIGTERM), (log, code)
        assert not list((run / "checkpoints").glob(".replaced-*")), log
        if code == 130 and journal_of(run, "run_interrupted"):
            check_that_the_stop_was_saved(run)
        wait_until_gone(began)
    assert bits(train(folder, case.method, case.mode)) == expected, log
    check_counts(run)
    assert not list((run / "checkpoints").glob(".writing-*")), "what killed processes left is cleared away"


def wait_until_gone(pids: list[int]) -> None:
    end = time.monotonic() + 20.0
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert not left, "a process outlives its run"


@pytest.mark.parametrize("case", DEFAULT, ids=lambda case: f"{case.method}-{case.mode}")
def test_a_run_that_is_killed_and_resumed_has_the_same_bits(tmp_path, undisturbed, case) -> None:
    crash(tmp_path, case, undisturbed(case.method))


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", LONG, ids=lambda case: f"{case.method}-{case.mode}-{case.seed}")
def test_forty_kills(tmp_path, undisturbed, case) -> None:
    crash(tmp_path, case, undisturbed(case.method))
