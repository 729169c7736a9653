"""The loop of a sweep with stand-ins for petractl: small programs that write a journal and end as told."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from petractl.run_folder import RunFolder
from petractl.sweep import runner
from petractl.sweep.cells import Cell, State
from petractl.sweep.runner import Job, Outcome, Runner, last_error

# argv: -c, then what petractl is told: run RECIPE --dir DIR --set what=..., or resume DIR.
STAND_IN = """
import json, os, signal, sys, time
words = sys.argv[1:]
folder = words[1] if words[0] == "resume" else words[words.index("--dir") + 1]
os.makedirs(folder, exist_ok=True)
open(folder + "/resolved.toml", "a").close()
journal = open(folder + "/metrics.jsonl", "a")
def tell(event, **rest):
    print(json.dumps({"event": event, "time": time.time(), **rest}), file=journal, flush=True)
def stop(*_):
    tell("run_interrupted")
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
name = os.path.basename(folder)
tell("run_started", threads=os.environ.get("OMP_NUM_THREADS"), words=words)
if name.startswith("slow") and words[0] == "run":
    time.sleep(60)
if name.startswith("deaf"):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tell("ready")
    time.sleep(60)
if name.startswith("bad"):
    print("error: c.toml: 1 problem in the recipe\\n  a.b: is wrong\\nhint: look", file=sys.stderr)
    sys.exit(2)
if name.startswith("bug"):
    tell("run_failed", message="ValueError: no\\nmore")
    sys.exit(1)
if name.startswith("killed"):
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.2)
tell("run_finished")
"""


class Notes:
    """Writes down what it hears; `on_pass` may act on what is running."""

    def __init__(self, on_pass: Callable[[Sequence[Cell]], None] = lambda running: None) -> None:
        self.heard: list[tuple[str, ...]] = []
        self.most = 0
        self._on_pass = on_pass

    def began(self, cell: Cell) -> None:
        self.heard.append(("began", cell.name))

    def ended(self, cell: Cell, failure: str) -> None:
        self.heard.append(("ended", cell.name, failure))

    def passed(self, running: Sequence[Cell]) -> None:
        self.most = max(self.most, len(running))
        self._on_pass(running)

    def stopping(self, running: Sequence[Cell]) -> None:
        self.heard.append(("stopping", *(cell.name for cell in running)))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PETRACTL", (sys.executable, "-S", "-c", STAND_IN))


def jobs(folder: Path, *names: str, threads: int | None = None) -> list[Job]:
    cells = [Cell(name, folder / name, ("method.name=petra",)) for name in names]
    return [Job(cell, folder / "r.toml", folder / "logs" / f"{cell.name}.log", threads) for cell in cells]


def run(work: Sequence[Job], notes: Notes, *, num_parallel: int = 2) -> Outcome:
    return Runner(work, num_parallel=num_parallel, watcher=notes).run()


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_all_run_and_never_more_than_allowed(tmp_path: Path) -> None:
    notes = Notes()
    outcome = run(jobs(tmp_path, "a", "b", "c", "d", threads=3), notes)
    assert outcome == Outcome()
    assert notes.most == 2
    assert notes.heard[:2] == [("began", "a"), ("began", "b")]
    assert {heard for heard in notes.heard if heard[0] == "ended"} == {("ended", name, "") for name in "abcd"}
    assert events(tmp_path / "a")[0]["threads"] == "3"
    assert events(tmp_path / "a")[0]["words"][-2:] == ["--set", "method.name=petra"]
    assert f"petractl run {tmp_path}/r.toml --dir {tmp_path}/a" in (tmp_path / "logs/a.log").read_text()


def test_one_that_fails_is_named_with_its_reason_and_the_others_go_on(tmp_path: Path) -> None:
    outcome = run(jobs(tmp_path, "bad", "bug", "killed", "fine"), Notes(), num_parallel=4)
    assert outcome.failures == {
        "bad": "c.toml: 1 problem in the recipe: a.b: is wrong",
        "bug": "ValueError: no",
        "killed": "was killed by SIGKILL (was there memory enough?)",
    }
    assert not outcome.is_interrupted
    assert Cell("fine", tmp_path / "fine", ()).state is State.FINISHED


def test_what_was_begun_is_resumed(tmp_path: Path) -> None:
    (work,) = jobs(tmp_path, "slow")
    work.cell.folder.mkdir()
    (work.cell.folder / "resolved.toml").touch()
    assert work.arguments == ["resume", str(work.cell.folder)]
    assert run([work], Notes()) == Outcome()
    assert work.cell.state is State.FINISHED


def test_what_a_killed_start_has_left_is_no_obstacle(tmp_path: Path) -> None:
    (work,) = jobs(tmp_path, "a")
    (work.cell.folder / "logs").mkdir(parents=True)
    (work.cell.folder / "recipe.toml").touch()
    assert run([work], Notes()) == Outcome()
    assert not (work.cell.folder / "recipe.toml").exists()


def interrupt_when(ready: Callable[[], bool], times: int = 1) -> Callable[[Sequence[Cell]], None]:
    """Return what presses Ctrl-C, so many times, once `ready`."""
    pressed: list[float] = []

    def on_pass(running: Sequence[Cell]) -> None:
        if len(pressed) < times and ready() and (not pressed or time.monotonic() - pressed[-1] > 0.5):
            pressed.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

    return on_pass


def has(folder: Path, event: str) -> bool:
    path = folder / "metrics.jsonl"
    return path.exists() and event in path.read_text()


def test_ctrl_c_lets_each_save_and_starts_no_more(tmp_path: Path) -> None:
    work = jobs(tmp_path, "slow1", "slow2", "later")
    notes = Notes(interrupt_when(lambda: all(has(tmp_path / n, "run_started") for n in ("slow1", "slow2"))))
    outcome = run(work, notes)
    assert outcome == Outcome(is_interrupted=True)
    assert ("stopping", "slow1", "slow2") in notes.heard
    assert ("ended", "slow1", "interrupted") in notes.heard
    assert [events(tmp_path / name)[-1]["event"] for name in ("slow1", "slow2")] == ["run_interrupted"] * 2
    assert not (tmp_path / "later").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_kills(tmp_path: Path) -> None:
    notes = Notes(interrupt_when(lambda: has(tmp_path / "deaf", "ready"), times=2))
    started = time.monotonic()
    outcome = run(jobs(tmp_path, "deaf"), notes)
    assert outcome.is_interrupted
    assert time.monotonic() - started < 30


def test_a_run_that_another_process_still_ends_is_waited_for(tmp_path: Path) -> None:
    held, free = jobs(tmp_path, "held", "free")
    held.cell.folder.mkdir()
    (held.cell.folder / "resolved.toml").touch()
    lock = ExitStack()
    lock.enter_context(RunFolder(held.cell.folder).locked())
    notes = Notes(lambda running: lock.close() if ("ended", "free", "") in notes.heard else None)
    assert held.cell.is_held()
    assert run([held, free], notes) == Outcome()
    assert [heard[1] for heard in notes.heard if heard[0] == "began"] == ["free", "held"]


def test_runs_of_a_killed_sweep_are_told_to_stop(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3])\n"
        "import test_sweep_runner as t\n"
        "t.runner.PETRACTL = (sys.executable, '-S', '-c', t.STAND_IN)\n"
        "t.run(t.jobs(Path(sys.argv[1]), 'slow'), t.Notes())\n"
    )
    here = str(Path(__file__).parent)
    sweep = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), "-", here])
    try:
        _wait_for(lambda: has(tmp_path / "slow", "run_started"))
    finally:
        sweep.kill()
        sweep.wait()
    _wait_for(lambda: has(tmp_path / "slow", "run_interrupted"))


def _wait_for(condition: Callable[[], bool], *, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", ""),
        ("all is well\n", ""),
        ("error: first\nhint: a\nerror: second\nhint: b\n", "second"),
        (
            "error: r.toml: 2 problems in the recipe\n  a.b: no\n  c.d: no\n",
            "r.toml: 2 problems in the recipe: a.b: no",
        ),
    ],
)
def test_the_last_error_of_a_log(text: str, told: str) -> None:
    assert last_error(text) == told
