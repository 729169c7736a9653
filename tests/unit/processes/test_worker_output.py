"""Rank 0 keeps the terminal; the others have their logs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from petractl.processes import log_name

CODE = """
import logging, os, sys
from pathlib import Path
from petractl.processes import redirect_output
rank = int(sys.argv[1])
redirect_output(Path(sys.argv[2]), rank, f"stage {rank}")
print("printed")
os.write(2, b"from below\\n")
logging.getLogger("petractl.x").info("logged")
"""


def run(rank: int, log_dir: Path, *, ours: bool) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PETRACTL_LAUNCHER"}
    env |= {"PETRACTL_LAUNCHER": str(os.getpid())} if ours else {}
    command = [sys.executable, "-c", CODE, str(rank), str(log_dir)]
    done = subprocess.run(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True
    )
    return done.stdout


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("stage 2", "stage-02.log"),
        ("stage 12 of replica 1", "replica-1-stage-12.log"),
        ("stages 0 and 2", "stages-00-and-02.log"),
    ],
)
def test_the_log_is_named_by_the_title(title: str, name: str) -> None:
    assert log_name(title) == name


def test_others_than_rank_0_write_to_their_logs_one_after_the_other(tmp_path: Path) -> None:
    for _ in range(2):
        assert run(1, tmp_path / "logs", ours=True) == ""
    lines = (tmp_path / "logs" / "stage-01.log").read_text().splitlines()
    assert len(lines) == 6
    assert sorted(lines)[-2:] == ["printed", "printed"]
    assert lines.count("from below") == 2
    assert lines[-1].endswith("INFO petractl.x: logged")


def test_rank_0_keeps_the_terminal_and_logs_too(tmp_path: Path) -> None:
    assert sorted(run(0, tmp_path, ours=True).splitlines()) == ["from below", "printed"]
    assert "logged" in (tmp_path / "stage-00.log").read_text()


def test_under_torchrun_everybody_keeps_the_terminal(tmp_path: Path) -> None:
    assert "printed" in run(1, tmp_path, ours=False)
    assert "printed" not in (tmp_path / "stage-01.log").read_text()


def test_a_full_disk_is_told_in_one_line_and_disturbs_nothing(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))\n"
    code = limit + CODE + 'logging.getLogger("petractl.x").info("logged again")\nprint("the end")\n'
    done = subprocess.run(
        [sys.executable, "-c", code, "0", str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("the end\n")
    (told,) = [line for line in done.stderr.splitlines() if line != "from below"]
    assert told == f"warning: {tmp_path / 'stage-00.log'} cannot be written: File too large"
