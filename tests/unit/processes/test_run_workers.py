"""Real processes: how they start, fail, hang and are stopped, and that none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from petractl.errors import RunError, UserError
from petractl.processes import run_workers

PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
from petractl.errors import *
from petractl.processes import *
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
die_with_parent()
here = Path(sys.argv[1])
redirect_output(here / "logs", rank, f"stage {rank}")
def say(name):
    (here / f".{name}").write_text(str(os.getpid())); (here / f".{name}").rename(here / name)
def until(name):
    while not (here / name).exists():
        time.sleep(0.01)
def others_are_ready():
    [until(f"ready-{other}") for other in range(size)]
def stop(number, frame):
    raise KeyboardInterrupt
def wait_for_a_neighbour():
    until("gone")
    raise PeerLost("lost its neighbour")
signal.signal(signal.SIGTERM, stop)
"""
READY = "say(f'ready-{rank}')\nothers_are_ready()\n"


def script(folder: Path, body: str) -> list[str]:
    """Write a worker: the preamble, then `body` within `reported`."""
    text = READY + textwrap.dedent(body)
    reported = 'with reported(f"stage {rank}", rank):\n' + textwrap.indent(text, "    ")
    (folder / "worker.py").write_text(PREAMBLE + reported)
    return [sys.executable, str(folder / "worker.py"), str(folder)]


def launch(folder: Path, body: str, *, size: int = 3, shutdown_s: float = 10.0) -> int:
    titles = [f"stage {rank}" for rank in range(size)]
    return run_workers(script(folder, body), titles=titles, log_dir=folder / "logs", shutdown_s=shutdown_s)


def failure(folder: Path, body: str, *, size: int = 3) -> tuple[list[str], float]:
    """Return the lines of the error, and the seconds from the beginning of the trouble to it."""
    with pytest.raises(RunError) as caught:
        launch(folder, body, size=size)
    ended = time.time()
    assert_nobody_is_left(folder)
    return str(caught.value).splitlines(), ended - (folder / "trouble").stat().st_mtime


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (OSError, ProcessLookupError):
        return False


def assert_nobody_is_left(folder: Path) -> None:
    pids = [int(file.read_text()) for file in [*folder.glob("ready-*"), *folder.glob("child-*")]]
    assert pids
    end = time.monotonic() + 2.0  # what was killed gets a moment to go
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not [pid for pid in pids if is_running(pid)]


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start_parent(folder: Path, body: str, *, shutdown_s: float = 10.0) -> subprocess.Popen[str]:
    """Start a parent of three workers as a process, and wait until all are ready."""
    code = f"""
import sys
from pathlib import Path
from petractl.processes import run_workers
titles = ["stage 0", "stage 1", "stage 2"]
folder = Path({str(folder)!r})
command = {script(folder, body)!r}
sys.exit(run_workers(command, titles=titles, log_dir=folder / "logs", shutdown_s={shutdown_s}))
"""
    # A parent that is killed leaves its temporary files: let them be in the test's folder.
    env = {**os.environ, "TMPDIR": str(folder)}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=env)
    wait_until(lambda: len(list(folder.glob("ready-*"))) == 3)
    return process


def test_all_end_well(tmp_path: Path) -> None:
    body = 'say(f"done-{rank}-of-{size}-" + os.environ["MASTER_ADDR"])'
    assert launch(tmp_path, body) == 0
    assert len(list(tmp_path.glob("done-*-of-3-127.0.0.1"))) == 3
    assert not (tmp_path / "logs" / "launcher.log").exists()
    assert_nobody_is_left(tmp_path)


def test_the_environment_and_the_arguments_arrive_as_they_stand(tmp_path: Path) -> None:
    worker = """
import os, sys
open(sys.argv[1], "w").write(" ".join([*sys.argv[2:], os.environ["MINE"]]))
"""
    command = [sys.executable, "-c", worker, str(tmp_path / "out"), "$$x", "${local_rank}"]
    assert run_workers(command, titles=["stage 0"], log_dir=tmp_path, environment={"MINE": "m"}) == 0
    assert (tmp_path / "out").read_text().split() == ["$$x", "${local_rank}", "m"]
    assert "TORCHELASTIC_SIGNALS_TO_HANDLE" not in os.environ


def test_no_name_server_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*args: object, **kwargs: object) -> str:
        raise AssertionError("asked for a name")

    for name in ("getfqdn", "gethostbyname", "gethostbyaddr", "getaddrinfo"):
        monkeypatch.setattr(f"socket.{name}", slow)
    body = 'assert "lo" in os.environ["GLOO_SOCKET_IFNAME"]; assert rank == 0, "bad"'
    lines, _ = failure(tmp_path, f"say('trouble')\n{body}", size=2)
    assert lines[0] == "stage 1 (rank 1): AssertionError: bad"


def test_the_signal_handlers_of_the_caller_come_back(tmp_path: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGURG)
    before = [signal.getsignal(number) for number in numbers]
    launch(tmp_path, "pass", size=1)
    assert [signal.getsignal(number) for number in numbers] == before


def test_one_raises(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
    if rank == 1:
        say("trouble")
        say("gone")
        time.sleep(0.2)
        raise ValueError("bad thing")
    wait_for_a_neighbour()
    """
    lines, seconds = failure(tmp_path, body)
    assert lines[:2] == ["stage 1 (rank 1): ValueError: bad thing", "Traceback (most recent call last):"]
    assert lines[-4:] == [
        "ValueError: bad thing",
        "stage 0 (rank 0): lost its neighbour",
        "stage 2 (rank 2): lost its neighbour",
        f"hint: its log is {tmp_path / 'logs' / 'stage-01.log'}",
    ]
    assert seconds < 5
    assert capfd.readouterr() == ("", "")
    assert "ValueError: bad thing" in (tmp_path / "logs" / "stage-01.log").read_text()


def test_one_is_killed_while_another_does_not_notice(tmp_path: Path) -> None:
    """The one that does not notice also takes no notice of SIGTERM."""
    body = """
    if rank == 2:
        say("trouble"); say("gone")
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(100)
    wait_for_a_neighbour()
    """
    lines, seconds = failure(tmp_path, body)
    assert lines[0] == "stage 2 (rank 2) was killed by SIGKILL"
    assert lines[1:3] == ["stage 0 (rank 0): lost its neighbour", "stage 1 (rank 1) was stopped"]
    assert "out of memory" in lines[3]
    assert seconds < 12


def test_rank_0_is_killed(tmp_path: Path) -> None:
    body = """
    if rank == 0:
        say("trouble"); say("gone")
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for_a_neighbour()
    """
    lines, seconds = failure(tmp_path, body)
    assert lines[0] == "stage 0 (rank 0) was killed by SIGKILL"
    assert seconds < 5


def test_what_a_killed_worker_started_goes_with_it(tmp_path: Path) -> None:
    body = """
    import subprocess
    if rank == 1:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        (here / "child-1").write_text(str(child.pid))
        say("trouble"); say("gone")
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for_a_neighbour()
    """
    failure(tmp_path, body)


def test_one_hangs_and_the_message_says_where(tmp_path: Path) -> None:
    body = """
    def stuck():
        time.sleep(100)
    if rank == 1:
        stuck()
    if rank == 0:
        say("trouble")
        say("gone")
        raise Stalled("stage 0 (rank 0) has waited 1 s for B 3", waiting_for=1, hint="raise the limit")
    wait_for_a_neighbour()
    """
    lines, seconds = failure(tmp_path, body)
    assert lines[0] == "stage 1 (rank 1) did not go on: stage 0 (rank 0) waited for it"
    assert lines[1] == "it stood here:"
    assert lines[2].endswith(" in stuck")
    assert "stage 0 (rank 0) has waited 1 s for B 3" in lines
    assert lines[-1].startswith("hint: raise the limit; its log is")
    assert seconds < 12


def test_the_users_error(tmp_path: Path) -> None:
    body = """
    if rank == 0:
        say("trouble")
        raise UserError("no such file", where="data.train", hint="build it")
    time.sleep(100)
    """
    with pytest.raises(UserError) as caught:
        launch(tmp_path, body)
    assert caught.value.where == "data.train"
    assert caught.value.what == "no such file\n(found by stage 0 (rank 0))"
    assert time.time() - (tmp_path / "trouble").stat().st_mtime < 5
    assert_nobody_is_left(tmp_path)


def test_one_that_fails_before_it_has_a_log(tmp_path: Path) -> None:
    code = "import os\nif os.environ['RANK'] == '1': import nowhere"
    with pytest.raises(RunError) as caught:
        run_workers([sys.executable, "-c", code], titles=["stage 0", "stage 1"], log_dir=tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "stage 1 (rank 1) ended with exit code 1 and left no report"
    assert lines[-1] == "ModuleNotFoundError: No module named 'nowhere'"


def test_no_such_command(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be started: No such file"):
        run_workers([str(tmp_path / "none")], titles=["stage 0"], log_dir=tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_lets_the_workers_save(tmp_path: Path, number: signal.Signals) -> None:
    body = """
    try:
        time.sleep(100)
    except KeyboardInterrupt:
        time.sleep(0.5)
        say(f"saved-{rank}")
        raise
    """
    process = start_parent(tmp_path, body)
    process.send_signal(number)
    _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (130, "")
    assert len(list(tmp_path.glob("saved-*"))) == 3
    assert_nobody_is_left(tmp_path)


def test_an_interruption_does_not_wait_for_ever(tmp_path: Path) -> None:
    process = start_parent(
        tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)", shutdown_s=1
    )
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert process.wait(timeout=10) == 130
    assert time.monotonic() - started > 0.8
    assert_nobody_is_left(tmp_path)
    process.communicate()


def test_the_third_signal_ends_it_at_once(tmp_path: Path) -> None:
    body = """
    while True:
        try:
            time.sleep(100)
        except KeyboardInterrupt:
            say(f"signal-{rank}-{len(list(here.glob(f'signal-{rank}-*')))}")
    """
    process = start_parent(tmp_path, body, shutdown_s=100)
    for count in range(2):
        process.send_signal(signal.SIGINT)
        wait_until(lambda count=count: len(list(tmp_path.glob(f"signal-*-{count}"))) == 3)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert_nobody_is_left(tmp_path)
    process.communicate()


def test_a_worker_that_alone_is_told_to_stop_ends_the_run_in_order(tmp_path: Path, monkeypatch) -> None:
    """The others are told by it; who has not been, and does not end, is stopped after a while."""
    monkeypatch.setattr("petractl.processes.agent._GRACE_TO_LEAVE_S", 2.0)
    body = """
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    try:
        time.sleep(1.0 if rank == 0 else 100)
        say(f"by-itself-{rank}")
        sys.exit(130)
    except KeyboardInterrupt:
        say(f"stopped-{rank}")
        raise
    """
    started = time.monotonic()
    assert launch(tmp_path, body) == 130
    assert time.monotonic() - started < 10
    assert sorted(path.name for path in tmp_path.glob("by-itself-*")) == ["by-itself-0"]
    assert sorted(path.name for path in tmp_path.glob("stopped-*")) == ["stopped-2"]
    assert_nobody_is_left(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise")
def test_nobody_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    process = start_parent(tmp_path, "time.sleep(100)")
    process.kill()
    process.communicate()
    pids = [int(file.read_text()) for file in tmp_path.glob("ready-*")]
    wait_until(lambda: not any(is_running(pid) for pid in pids), timeout_s=5)


GLOO = """
import datetime
import torch, torch.distributed as dist
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
total = torch.tensor([float(rank)])
dist.all_reduce(total)
assert total.item() == 1.0
if rank == 1:
    say("trouble")
    os.kill(os.getpid(), signal.SIGKILL)
dist.recv(total, src=1)
"""


def test_gloo_finds_its_way_and_a_lost_connection_is_no_cause(tmp_path: Path) -> None:
    lines, seconds = failure(tmp_path, GLOO, size=2)
    assert lines[0] == "stage 1 (rank 1) was killed by SIGKILL"
    assert lines[1].startswith("stage 0 (rank 0): lost another process (RuntimeError: ")
    assert seconds < 5


def test_a_plain_torchrun_shows_the_error_too(tmp_path: Path) -> None:
    body = """
    if rank == 1:
        say("gone")
        time.sleep(0.1)
        raise ValueError("bad thing")
    until("gone")
    time.sleep(0.5)
    raise PeerLost("lost its neighbour")
    """
    command = script(tmp_path, body)[1:]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "error: stage 1 (rank 1): ValueError: bad thing\nTraceback" in done.stderr
    assert "raise ValueError" in done.stderr.partition("Root Cause")[2]
