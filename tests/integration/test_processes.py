"""Runs in several processes through the real command line: the bits of one process, failures, interruptions.

A start of torch takes seconds per process, so a run serves several checks where it can. Most runs are started
from within the test's own process: `petractl run` then only starts and watches its workers.
"""

import contextlib
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner, Result

from petractl.cli.app import app

SMALL = ("tracking.mlflow=false", "model.width=4", "data.steps_per_epoch=5", "engine.threads=1")
PROCESSES = "engine.mode=processes"
IN_PROCESS = "engine.mode=in-process"
THREE_STAGES = (*SMALL, "method.accumulation=2", "partition.stages=3", "training.epochs=2", "run.keep_last=9")
# A run that ends only when it is ended, and whose epochs do not depend on how many there are.
ENDLESS = (*SMALL, "partition.stages=2", "training.epochs=100000", "training.lr_decay=constant")
END_S = 15.0
START_S = 120.0


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def sets(*overrides: str) -> list[str]:
    return [part for text in overrides for part in ("--set", text)]


def run(folder: Path, *overrides: str, recipe: str = "digits_revnet18", trace: bool = False) -> Result:
    return call("run", recipe, "--dir", str(folder), *sets(*overrides), *(["--trace"] if trace else []))


def resume(folder: Path, *overrides: str) -> Result:
    return call("resume", str(folder), *sets(*overrides))


def journal(folder: Path, event: str = "") -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == event] if event else records


def newest_epoch(folder: Path) -> int:
    found = [path.parent.name for path in (folder / "checkpoints").glob("epoch-*/manifest.json")]
    return max((epoch_of(name) for name in found if "microbatch" not in name), default=0)


def epoch_of(name: str) -> int:
    """Return the epoch of a checkpoint's name, also of one in the middle of it."""
    return int(name.split("-")[1])


def traced(folder: Path, epoch: int = 1) -> tuple[list[dict], list[dict]]:
    """Return the operations and the waits of a trace, all of them within the seconds of its epoch."""
    text = (folder / "traces" / f"epoch-{epoch:04d}.json").read_text()
    events = [event for event in json.loads(text)["traceEvents"] if event["ph"] == "X"]
    seconds = next(r["seconds"] for r in journal(folder, "epoch_trained") if r["epoch"] == epoch)
    for event in events:
        assert event["ts"] >= 0
        assert event["ts"] + event["dur"] <= 1e6 * seconds
    waits = [event for event in events if event["name"] == "wait"]
    return [event for event in events if event["name"] != "wait"], waits


def drop_checkpoints_after(folder: Path, epoch: int) -> None:
    for path in (folder / "checkpoints").iterdir():
        if epoch_of(path.name) > epoch:
            shutil.rmtree(path)


def tensors(folder: Path, epoch: int) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint, of however many files, by group and name."""
    found: dict[str, Tensor] = {}
    for path in (folder / "checkpoints" / f"epoch-{epoch:04d}").glob("*.safetensors"):
        group = path.name.split(".")[0]
        for name, tensor in load_file(path).items():
            assert f"{group}/{name}" not in found, f"{name} is in two files"
            found[f"{group}/{name}"] = tensor
    return found


def assert_same_bits(a: Path, b: Path, epoch: int) -> None:
    ours, theirs = tensors(a, epoch), tensors(b, epoch)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("optimizer/") for name in ours)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def told(folder: Path) -> list[tuple]:
    """Return the losses and accuracies of a run, epoch by epoch."""
    trained = [(r["epoch"], r["loss"], r["top1"], r["samples"]) for r in journal(folder, "epoch_trained")]
    keys = ("epoch", "loss", "top1", "top5", "samples")
    return [*trained, *(tuple(r[key] for key in keys) for r in journal(folder, "evaluated"))]


def processes_of(folder: Path) -> dict[int, dict[str, str]]:
    """Return the environments of all processes but this one that know of a run folder, by process id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            environment = (entry / "environ").read_bytes().decode(errors="replace")
            if str(folder) in environment + (entry / "cmdline").read_bytes().decode(errors="replace"):
                pairs = (line.partition("=") for line in environment.split("\0"))
                found[int(entry.name)] = {name: value for name, _, value in pairs}
    return found


def worker(folder: Path, rank: int) -> int:
    (pid,) = [
        pid
        for pid, environment in processes_of(folder).items()
        if environment.get("RANK") == str(rank) and "PETRACTL_START" in environment
    ]
    return pid


def assert_nothing_left(folder: Path) -> None:
    """Nothing that the run has started is there; what was killed a moment ago gets a second to go."""
    deadline = time.monotonic() + 1.0
    while processes_of(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(folder) == {}


def wait_for(condition: Callable[[], object], *, timeout_s: float = START_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "petractl", *arguments]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def finish(processes: Sequence[subprocess.Popen[str]], *, timeout_s: float = START_S) -> list[str]:
    """Wait for processes, end them if need be, and return what each wrote to stderr."""
    try:
        return [process.communicate(timeout=timeout_s)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


def start(arguments: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )


def torchrun(node: int, nodes: int, per_node: int, port: int, *arguments: str) -> subprocess.Popen[str]:
    options = ["--nnodes", str(nodes), "--node-rank", str(node), "--nproc-per-node", str(per_node)]
    address = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    return start([*launcher, *options, *address, "-m", "petractl", *arguments])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert run(folder, *THREE_STAGES).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several") / "run"
    assert run(folder, *THREE_STAGES, PROCESSES, trace=True).exit_code == 0
    return folder


def test_three_processes_leave_what_one_leaves(alone: Path, several: Path, tmp_path) -> None:
    for epoch in (1, 2):
        assert_same_bits(several, alone, epoch)
    assert told(several) == told(alone)
    exported = []
    for folder in (alone, several):
        out = tmp_path / f"{folder.parent.name}.safetensors"
        assert call("export", str(folder), "--out", str(out)).exit_code == 0
        exported.append(out.read_bytes())
    assert exported[0] == exported[1]
    scores = json.loads(call("eval", str(several), "--json").stdout)
    last = journal(several, "evaluated")[-1]
    assert scores == {key: last[key] for key in scores}


def test_every_stage_is_counted_measured_and_logged(several: Path) -> None:
    places = [(epoch, stage, 0) for epoch in (1, 2) for stage in range(3)]
    counted, measured = journal(several, "stage_counted"), journal(several, "stage_measured")
    assert [(r["epoch"], r["stage"], r["replica"]) for r in counted] == places
    assert [(r["epoch"], r["stage"], r["replica"]) for r in measured] == places
    for r in counted:
        assert (r["microbatches"], r["forwards"], r["backwards"], r["updates"]) == (5, 5, 5, 3)
    for r in measured:
        assert r["rank"] == r["stage"]
        assert 0 < r["compute_percent"] <= 100
        assert (r["bytes_sent_forward"] > 0, r["bytes_sent_backward"] > 0) == (r["stage"] < 2, r["stage"] > 0)
    (plan,) = journal(several, "plan_made")
    assert (plan["processes"], plan["replicas"], plan["backend"]) == (3, 1, "gloo")
    logs = {path.name: path.read_text() for path in (several / "logs").iterdir()}
    assert {"stage-00.log", "stage-01.log", "stage-02.log"} <= logs.keys()
    assert all("run finished" in logs[f"stage-{stage:02d}.log"] for stage in range(3))
    assert not list((several / "checkpoints").glob(".writing-*"))


def test_a_trace_has_the_operations_of_all_processes_on_one_clock(several: Path) -> None:
    for epoch in (1, 2):
        operations, waits = traced(several, epoch)
        rows = [",".join(e["name"] for e in operations if e["tid"] == stage) for stage in range(3)]
        # 5 microbatches in groups of 2, as `tight` orders them.
        assert rows[0] == "F 0,F 1,F 2,B 0,F 3,B 1,U 1,F 4,B 2,B 3,U 3,B 4,U 4"
        assert rows[1] == "F 0,F 1,B 0,F 2,B 1,U 1,F 3,B 2,F 4,B 3,U 3,B 4,U 4"
        assert rows[2] == "FB 0,FB 1,U 1,FB 2,FB 3,U 3,FB 4,U 4"
        start = {(e["tid"], e["name"]): e["ts"] for e in operations}
        end = {(e["tid"], e["name"]): e["ts"] + e["dur"] for e in operations}
        # Clocks of one machine: no message arrives before it is sent, to a hundredth of a second.
        for i in range(5):
            assert start[1, f"F {i}"] > end[0, f"F {i}"] - 1e4
            assert start[2, f"FB {i}"] > end[1, f"F {i}"] - 1e4
            assert start[0, f"B {i}"] > end[1, f"B {i}"] - 1e4
        assert {e["args"]["for"] for e in waits} <= {"forward", "backward", "other"}
    assert (several / "plots" / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_goes_on_in_another_mode_and_with_other_stages(several: Path, tmp_path) -> None:
    same, other = tmp_path / "same", tmp_path / "other"
    for folder in (same, other):
        shutil.copytree(several, folder)
        drop_checkpoints_after(folder, 1)
    assert resume(same, IN_PROCESS).exit_code == 0
    assert_same_bits(same, several, 2)
    assert resume(other, "partition.stages=2", "training.epochs=3").exit_code == 0
    assert resume(other, "partition.stages=4", IN_PROCESS, "training.epochs=4").exit_code == 0
    trained = journal(other, "epoch_trained")
    assert [r["epoch"] for r in trained] == [1, 2, 2, 3, 4]  # the second anew: its checkpoint is gone
    assert all(math.isfinite(r["loss"]) for r in trained)
    stages = [len(r["stages"]) for r in journal(other, "plan_made")]
    assert stages == [3, 2, 4]


def test_two_agents_of_torchrun_give_the_bits_of_one_process(alone: Path, tmp_path) -> None:
    folder, port = tmp_path / "run", free_port()
    arguments = ["run", "digits_revnet18", "--dir", str(folder), *sets(*THREE_STAGES)]
    agents = [torchrun(node, 2, per_node, port, *arguments) for node, per_node in ((0, 2), (1, 1))]
    errors = finish(agents)
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(errors)
    assert_same_bits(folder, alone, 2)
    assert told(folder) == told(alone)
    assert_nothing_left(folder)


@pytest.mark.long
def test_under_torchrun_a_death_is_a_failure_and_nothing_outlives_the_agent(tmp_path) -> None:
    folder = tmp_path / "run"
    first = ("run", "digits_revnet18", "--dir", str(folder), *sets(*ENDLESS))
    for arguments, victim in ((first, 1), (("resume", str(folder)), None)):
        before = newest_epoch(folder)
        agent = torchrun(0, 1, 2, free_port(), *arguments)
        wait_for(lambda before=before: newest_epoch(folder) > before)
        ranks = {environment.get("RANK"): pid for pid, environment in processes_of(folder).items()}
        os.kill(agent.pid if victim is None else ranks[str(victim)], signal.SIGKILL)
        finish([agent], timeout_s=END_S)
        assert_nothing_left(folder)
        if victim is not None:
            assert agent.returncode == 1
            assert journal(folder)[-1]["event"] == "run_failed"


def test_two_replicas_share_the_epoch_and_train_as_twice_the_microbatches(tmp_path) -> None:
    """23 microbatches, the last ragged: the second replica has one fewer, and a last update without data."""
    common = ("data.steps_per_epoch=0", "training.epochs=1", "method.name=backprop", "partition.stages=2")
    both, alone = tmp_path / "both", tmp_path / "alone"
    assert run(both, *SMALL, *common, PROCESSES, "engine.replicas=2").exit_code == 0
    assert run(alone, *SMALL, *common, "method.accumulation=2", IN_PROCESS).exit_code == 0
    counted = {(r["stage"], r["replica"]): r for r in journal(both, "stage_counted")}
    assert {key: r["microbatches"] for key, r in counted.items()} == {
        (0, 0): 12,
        (0, 1): 11,
        (1, 0): 12,
        (1, 1): 11,
    }
    assert {r["updates"] for r in counted.values()} == {12}
    for folder in (both, alone):
        assert [r["samples"] for r in journal(folder, "epoch_trained")] == [1437]
        assert [r["samples"] for r in journal(folder, "evaluated")] == [360]
    ours, theirs = tensors(both, 1), tensors(alone, 1)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if "running" not in name and "num_batches" not in name:  # each replica has seen half of the batches
            assert torch.allclose(tensor, theirs[name], rtol=1e-3, atol=1e-4), name
    losses = [journal(folder, "epoch_trained")[0]["loss"] for folder in (both, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert {"replica-0-stage-00.log", "replica-1-stage-01.log"} <= {
        path.name for path in (both / "logs").iterdir()
    }


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """Return the folder of a run that Ctrl-C has ended, its exit code and what it said."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    process = start(command("run", "digits_revnet18", "--dir", str(folder), *sets(*ENDLESS, PROCESSES)))
    try:
        wait_for(lambda: newest_epoch(folder) >= 2 or process.poll() is not None)
    finally:
        process.send_signal(signal.SIGINT)
        (errors,) = finish([process], timeout_s=END_S)
    return folder, process.returncode, errors


def test_an_interrupted_run_ends_with_130_and_goes_on_to_the_same_bits(interrupted, tmp_path) -> None:
    stopped, code, errors = interrupted
    assert code == 130, errors
    assert_nothing_left(stopped)
    assert f"petractl resume {stopped}" in errors
    assert "Traceback" not in errors
    assert journal(stopped)[-1]["event"] == "run_interrupted"
    assert not any("Traceback" in path.read_text() for path in (stopped / "logs").iterdir())
    here, whole = tmp_path / "here", tmp_path / "whole"
    shutil.copytree(stopped, here)
    last = newest_epoch(stopped)
    end = f"training.epochs={last + 2}"
    assert resume(here, end, IN_PROCESS).exit_code == 0
    assert run(whole, *ENDLESS, end, IN_PROCESS).exit_code == 0
    assert_same_bits(here, whole, last + 2)


@contextlib.contextmanager
def killed_in_the_middle(folder: Path, rank: int, *, after_s: float) -> Iterator[list[float]]:
    """Kill a worker some time after the next checkpoint; yields a list that gets the time of it."""
    before, killed_at = newest_epoch(folder), []

    def kill() -> None:
        wait_for(lambda: newest_epoch(folder) > before)
        time.sleep(after_s)
        os.kill(worker(folder, rank), signal.SIGKILL)
        killed_at.append(time.monotonic())

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield killed_at
    finally:
        killer.join()


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=[pytest.mark.long, pytest.mark.timeout(1200)])])
def test_killed_stages_end_the_run_at_once_and_it_goes_on_to_the_same_bits(
    interrupted, tmp_path, kills: int
) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(interrupted[0], folder)
    chance = random.Random(kills)
    ranks = [0, 1, *chance.choices(range(2), k=kills - 2)]
    chance.shuffle(ranks)
    for rank in ranks:
        with killed_in_the_middle(folder, rank, after_s=chance.uniform(0.0, 0.3)) as killed_at:
            result = resume(folder)
            ended_at = time.monotonic()
        assert result.exit_code == 1, result.stderr
        assert f"error: stage {rank} (rank {rank}) was killed by SIGKILL" in result.stderr
        assert "Traceback" not in result.stderr
        assert ended_at - killed_at[0] < END_S
        assert_nothing_left(folder)
    end = f"training.epochs={newest_epoch(folder) + 1}"
    assert resume(folder, end, IN_PROCESS).exit_code == 0
    assert run(whole, *ENDLESS, end, IN_PROCESS).exit_code == 0
    assert_same_bits(folder, whole, newest_epoch(whole))


TRAPS = '''
import time
import torch
from torch import nn


class Trap(nn.Module):
    """Passes its input on, until the nth one."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.left = kind, 7

    def forward(self, x):
        if x.device.type != "meta" and self.training:
            self.left -= 1
            if not self.left:
                self.spring()
        return x

    def spring(self):
        if self.kind == "sleep":
            time.sleep(10000)
        raise ArithmeticError("the fuse has burnt down")


def net(*, in_channels, classes, width, kind):
    stem = nn.Sequential(nn.Conv2d(in_channels, width, 3), nn.ReLU())
    body = nn.Sequential(nn.Conv2d(width, width, 3), Trap(kind), nn.ReLU())
    return [stem, body, nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))]
'''


@pytest.fixture
def trapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return a recipe whose net is in the working directory, and fails in stage 1."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "traps.py").write_text(TRAPS.replace("LazyLinear(classes)", "Linear(16 * width, classes)"))
    (tmp_path / "trapped.toml").write_text(
        '[model]\nname = "traps:net"\nwidth = 4\narguments = { kind = "raise" }\n'
        '[data]\n[method]\nname = "delayed"\n[partition]\nstages = 3\n[optimizer]\n[training]\nepochs = 1\n'
        '[engine]\nmode = "processes"\nthreads = 1\n[tracking]\nmlflow = false\n'
    )
    yield "trapped.toml"
    sys.modules.pop("traps", None)


def test_a_stage_that_raises_is_told_first_with_its_own_traceback(trapped: str, tmp_path) -> None:
    folder = tmp_path / "run"
    started = time.monotonic()
    result = run(folder, recipe=trapped)
    assert result.exit_code == 1
    assert_nothing_left(folder)
    assert time.time() - journal(folder, "epoch_started")[0]["time"] < END_S
    assert time.monotonic() - started < START_S
    lines = result.stderr.splitlines()
    assert lines[0] == "error: stage 1 (rank 1): ArithmeticError: the fuse has burnt down"
    assert result.stderr.count("Traceback (most recent call last)") == 1
    assert "in spring" in result.stderr
    assert sum(line.startswith(("stage 0 (rank 0)", "stage 2 (rank 2)")) for line in lines) == 2
    failed = journal(folder)[-1]
    assert failed["event"] == "run_failed"
    assert "the fuse has burnt down" in failed["message"]
    assert "the fuse has burnt down" in (folder / "logs" / "stage-01.log").read_text()


def test_a_stage_that_stalls_is_told_by_rank_operation_and_microbatch(trapped: str, tmp_path) -> None:
    folder = tmp_path / "run"
    (tmp_path / trapped).write_text((tmp_path / trapped).read_text().replace('"raise"', '"sleep"'))
    result = run(folder, "engine.stall_timeout=3", recipe=trapped)
    assert result.exit_code == 1
    assert_nothing_left(folder)
    assert time.time() - journal(folder, "epoch_started")[0]["time"] < 3 + END_S
    assert result.stderr.startswith("error: stage 1 (rank 1) did not go on: ")
    assert "in spring" in result.stderr  # where it stood
    assert "stage 2 (rank 2) has waited 3 s for FB 6 from stage 1 (rank 1)" in result.stderr
    assert "engine.stall_timeout" in result.stderr
    assert journal(folder)[-1]["event"] == "run_failed"


def test_a_world_of_the_wrong_size_is_one_clear_error(tmp_path) -> None:
    folder = tmp_path / "run"
    arguments = ["run", "digits_revnet18", "--dir", str(folder), *sets(*SMALL, "partition.stages=3")]
    agent = torchrun(0, 1, 2, free_port(), *arguments)
    (errors,) = finish([agent])
    assert agent.returncode == 1
    product = "partition.stages: stages(3) x replicas(1) = 3 processes, but 2 were started"
    said = errors.partition("failed (exitcode: 2)")[0]  # then torchrun speaks, and says it again
    assert said.count(product) == 1, errors
    assert "hint: start 3, or set partition.stages = 2" in said
    assert "Traceback" not in said
    assert not folder.exists()
    assert_nothing_left(folder)


def test_one_process_started_as_two_is_refused(tmp_path) -> None:
    folder, port = tmp_path / "run", str(free_port())
    arguments = command("run", "digits_revnet18", "--dir", str(folder), *sets(*SMALL, IN_PROCESS))
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [start(arguments, RANK=str(rank), **world) for rank in range(2)]
    errors = finish(processes)
    assert processes[0].returncode == 2
    assert processes[1].returncode != 0
    assert 'engine.mode: "in-process" is one process, but 2 were started' in errors[0]
    assert 'hint: set engine.mode = "processes", or start it without torchrun' in errors[0]
    assert errors[1].splitlines()[-1].startswith("error: process (rank 1): ")
    assert "Traceback" not in errors[0] + errors[1]
    assert not folder.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ['engine.devices=["cpu", "cpu"]'],
            "engine.devices: stages(3) = 3 processes, but 2 devices are given",
        ),
        (['engine.devices=["cpu", "cpu", "cuda:77"]'], "engine.devices: cuda:77: "),
        (["engine.schedule=1f1b", "method.name=backprop"], "engine.schedule: "),
        (["engine.device=cuda:77", PROCESSES], 'engine.device: "cuda:77": '),
        (["engine.replicas=2", IN_PROCESS], "engine.replicas"),
    ],
)
def test_what_cannot_be_is_told_before_anything_starts(tmp_path, overrides: list[str], message: str) -> None:
    result = run(tmp_path / "run", *SMALL, "partition.stages=3", *overrides)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "run").exists()


EXACT = (*SMALL, "method.name=backprop", "method.accumulation=4", "training.epochs=1")


@pytest.fixture(scope="module")
def exact_loss(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Return the loss of an epoch of 5 microbatches in groups of 4, by backprop in one process."""
    folder = tmp_path_factory.mktemp("exact") / "run"
    assert run(folder, *EXACT, IN_PROCESS).exit_code == 0
    loss: float = journal(folder, "epoch_trained")[0]["loss"]
    return loss


@pytest.mark.parametrize(
    ("schedule", "stages"),
    [
        pytest.param("gpipe", 2, marks=pytest.mark.long),
        ("1f1b", 2),
        ("interleaved-1f1b", 4),
        pytest.param("zero-bubble", 2, marks=pytest.mark.long),
    ],
)
def test_an_exact_pipeline_has_the_loss_of_backprop(
    tmp_path, exact_loss: float, schedule: str, stages: int
) -> None:
    folder = tmp_path / "run"
    result = run(folder, *EXACT, f"engine.schedule={schedule}", f"partition.stages={stages}", trace=True)
    assert result.exit_code == 0, result.stderr
    (trained,) = journal(folder, "epoch_trained")
    assert trained["loss"] == pytest.approx(exact_loss, abs=1e-5)
    assert trained["samples"] == 320
    assert [r["samples"] for r in journal(folder, "evaluated")] == [360]
    counted = journal(folder, "stage_counted")
    assert [(r["stage"], r["forwards"], r["backwards"], r["updates"]) for r in counted] == [
        (stage, 5, 5, 2) for stage in range(stages)
    ]
    (plan,) = journal(folder, "plan_made")
    assert plan["processes"] == 2
    operations, _ = traced(folder)
    for stage in range(stages):
        kinds = [e["cat"] for e in operations if e["args"]["stage"] == stage]
        assert (kinds.count("F"), kinds.count("U")) == (5, 2)
        assert kinds.count("B") == 5
    assert {e["tid"] for e in operations} == {0, 1}
    if schedule == "1f1b":
        assert resume(folder, "training.epochs=2").exit_code == 0
        assert [r["epoch"] for r in journal(folder, "epoch_trained")] == [1, 2]


def test_of_stages_that_all_diverge_the_first_to_do_so_is_named(tmp_path) -> None:
    """Each finds its own numbers bad, the last one first: what one process says, several say."""
    diverging = (*SMALL, "partition.stages=2", "optimizer.lr=1e30", "training.warmup_epochs=0")
    said = []
    for mode in (IN_PROCESS, PROCESSES):
        result = run(tmp_path / mode, *diverging, mode)
        assert result.exit_code == 1
        (failed,) = journal(tmp_path / mode, "run_failed")
        said.append(failed["message"].partition("not finite: ")[2].splitlines()[0])
        assert said[-1] in result.stderr
    assert said[0].startswith("activation of unit ")
    assert said[0] == said[1]
