"""What a worker leaves behind: for torch's launcher, for ours, and for who has neither."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from torch.distributed import DistBackendError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from petractl.errors import DataError, PeerLost, RunError, Stalled, UserError
from petractl.processes.report import Kind, read_report, report_of, write_report

PREAMBLE = "import os, sys, time, signal\nfrom petractl.errors import *\nfrom petractl.processes import *\n"


def run_worker(
    body: str, *, error_file: Path | None = None, launcher: str = ""
) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("PETRACTL_LAUNCHER", "TORCHELASTIC_ERROR_FILE")}
    env |= {"TORCHELASTIC_ERROR_FILE": str(error_file)} if error_file else {}
    env |= {"PETRACTL_LAUNCHER": launcher} if launcher else {}
    code = PREAMBLE + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (ValueError("x"), "error", 1),
        (RunError("x"), "error", 1),
        (UserError("x"), "user", 2),
        (DataError("x"), "user", 2),
        (PeerLost("x"), "lost", 1),
        (Stalled("x"), "stalled", 1),
        (KeyboardInterrupt(), "interrupted", 130),
        (SystemExit(130), "interrupted", 130),
        (SystemExit(3), "error", 1),
        (DistBackendError("NCCL error"), "lost", 1),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"), "lost", 1),
        (ConnectionResetError("data server"), "error", 1),
    ],
)
def test_the_kind_of_an_exception(error: BaseException, kind: Kind, code: int) -> None:
    report = report_of(error, title="stage 1", rank=1)
    assert (report.kind, report.exit_code) == (kind, code)


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    error = raised(Stalled("has waited", where="here", hint="do", waiting_for=3))
    report = report_of(error, title="stage 2 of replica 1", rank=5)
    write_report(report, tmp_path / "error.json")
    assert read_report(tmp_path / "error.json") == report
    assert report.waiting_for == 3
    assert 0 <= time.monotonic() - report.time < 60
    told = json.loads((tmp_path / "error.json").read_text())["message"]["extraInfo"]["timestamp"]
    assert abs(int(told) - time.time()) < 60  # torch counts by the clock on the wall


def test_what_is_no_report_is_none(tmp_path: Path) -> None:
    for text in ("", "{", "[]", '{"message": "torch wrote this"}', '{"petractl": {"kind": "error"}}'):
        (tmp_path / "error.json").write_text(text)
        assert read_report(tmp_path / "error.json") is None
    assert read_report(tmp_path / "none") is None


def test_torchs_launcher_reads_it_and_takes_a_lost_neighbour_for_a_consequence(tmp_path: Path) -> None:
    errors: list[Exception] = [PeerLost("lost its neighbour"), ValueError("the cause")]
    failures = {}
    for rank, error in enumerate(errors):
        report = report_of(raised(error), title=f"stage {rank}", rank=rank)
        write_report(report, tmp_path / str(rank))
        failures[rank] = ProcessFailure(
            local_rank=rank, pid=1, exitcode=1, error_file=str(tmp_path / str(rank))
        )
    error = ChildFailedError("petractl", failures)
    assert error.get_first_failure()[0] == 1
    assert "raise error" in str(error).partition("Root Cause")[2]
    assert "ValueError: the cause" in str(error).partition("Root Cause")[2]


@pytest.mark.parametrize(
    ("number", "what"),
    [
        (errno.ENOSPC, "no space left on the device: runs/x"),
        (errno.EACCES, "permission denied: runs/x"),
        (errno.EROFS, "read-only file system: runs/x"),
    ],
)
def test_what_the_system_refuses_needs_no_traceback(number: int, what: str) -> None:
    report = report_of(OSError(number, os.strerror(number), "runs/x"), title="stage 1", rank=1)
    assert report.what == what
    assert report.explained


def test_a_file_that_is_not_there_is_a_bug_with_its_traceback() -> None:
    report = report_of(FileNotFoundError(errno.ENOENT, "No such file", "x"), title="stage 1", rank=1)
    assert not report.explained


def test_an_interruption_of_a_failing_worker_does_not_hide_the_failure() -> None:
    error = KeyboardInterrupt()
    error.__context__ = ValueError("bad")
    assert report_of(error, title="stage 1", rank=1).what == "ValueError: bad"


def test_without_a_launcher_of_ours_the_worker_speaks_for_itself() -> None:
    done = run_worker('with reported("stage 2", 2):\n    raise ValueError("bad")')
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0] == "error: stage 2 (rank 2): ValueError: bad"
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-1] == "ValueError: bad"
    assert "report.py" not in done.stderr


def test_a_lost_neighbour_is_one_line() -> None:
    done = run_worker('with reported("stage 2", 2):\n    raise PeerLost("lost its neighbour", hint="none")')
    assert (done.returncode, done.stderr) == (1, "error: stage 2 (rank 2): lost its neighbour\n")


def test_a_users_error_has_its_place_and_hint() -> None:
    done = run_worker(
        'with reported("stage 0", 0):\n    raise UserError("no", where="data.train", hint="give it")'
    )
    assert done.returncode == 2
    assert done.stderr == "error: stage 0 (rank 0): data.train: no\nhint: give it\n"


def test_an_interruption_is_silent() -> None:
    done = run_worker('with reported("stage 0", 0):\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(9)')
    assert (done.returncode, done.stderr) == (130, "")


def test_a_good_end_is_none_of_its_business(tmp_path: Path) -> None:
    done = run_worker(
        'with reported("stage 0", 0):\n    print("here")\nprint("there")', error_file=tmp_path / "e"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "here\nthere\n", "")
    assert not (tmp_path / "e").exists()
    done = run_worker('with reported("stage 0", 0):\n    sys.exit()')
    assert (done.returncode, done.stderr) == (0, "")


def test_a_thread_that_waits_for_ever_does_not_hold_back_the_end(tmp_path: Path) -> None:
    body = """
    import threading
    threading.Thread(target=time.sleep, args=(50,)).start()
    with reported("stage 0", 0):
        raise RunError("bad")
    """
    started = time.monotonic()
    done = run_worker(body, error_file=tmp_path / "e", launcher="1")
    assert (done.returncode, done.stderr) == (1, "")
    assert time.monotonic() - started < 20
    assert json.loads((tmp_path / "e").read_text())["message"]["message"] == "bad"


def test_a_fault_leaves_the_stack(tmp_path: Path) -> None:
    body = 'def here():\n    os.kill(os.getpid(), signal.SIGSEGV)\nwith reported("stage 0", 0):\n    here()'
    done = run_worker(body, error_file=tmp_path / "e")
    assert done.returncode == -signal.SIGSEGV
    assert " in here" in (tmp_path / "e.stacks").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise")
def test_a_worker_dies_with_its_parent(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    write = f"open({str(pid)!r}, 'w').write(str(os.getpid()))"
    child = f"{PREAMBLE}die_with_parent()\n{write}\ntime.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent])
    deadline = time.monotonic() + 30
    while not pid.exists() or not pid.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    stat = Path(f"/proc/{pid.read_text()}/stat")
    while stat.exists() and ") Z " not in stat.read_text():
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise")
def test_a_worker_whose_launcher_was_gone_before_ends_at_once() -> None:
    assert run_worker("die_with_parent()\nprint('on')", launcher=str(os.getpid())).stdout == "on\n"
    done = run_worker("die_with_parent()\nprint('on')", launcher="1")
    assert (done.returncode, done.stdout) == (1, "")


def test_the_folder_of_the_fork_server_goes_with_the_process(tmp_path: Path) -> None:
    code = (
        "from multiprocessing import util; from petractl.processes.report import end_process; "
        "print(util.get_temp_dir()); end_process(3)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 3
    assert ended.stdout.strip().startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
