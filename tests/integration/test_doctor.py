"""`petractl doctor` as a person and as a program calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from petractl.cli.app import app
from petractl.doctor import examine
from petractl.doctor.check import Check, Status, failure, ok, warning


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Look at this machine from an empty folder, for a set that is here and for one that is missing."""
    folder = tmp_path_factory.mktemp("doctor")
    command = [sys.executable, "-m", "petractl", "doctor", "--json", "--data", "digits", "--data", "cifar10"]
    return folder, subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_it_looks_at_everything(looked: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = looked
    found = {entry["name"]: entry for entry in json.loads(done.stdout)}
    names = [
        "Python",
        "torch",
        "CUDA",
        "gloo",
        "disk",
        "shared memory",
        "MLflow",
        "data digits",
        "data cifar10",
    ]
    assert [name for name in found if name != "nccl"] == names
    assert found["gloo"]["status"] == "ok", found["gloo"]
    assert "2 processes" in found["gloo"]["what"]
    assert found["data digits"]["status"] == "ok"
    assert found["data cifar10"]["status"] == "failure"
    assert str(folder) in found["data cifar10"]["what"]
    for entry in found.values():
        assert (entry["status"] == "ok") == (not entry["hint"])


def test_a_failure_is_exit_code_1(looked: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, done = looked
    assert done.returncode == 1
    assert "failures: 1" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_leaves_nothing_behind(looked: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = looked
    assert list(folder.iterdir()) == []


def fake(monkeypatch: pytest.MonkeyPatch, *checks: Check) -> None:
    monkeypatch.setattr(examine, "examine", lambda **_options: iter(checks))


@pytest.mark.parametrize(
    ("last", "code"),
    [
        (ok("disk", "room"), 0),
        (warning("disk", "slow", "wait"), 0),
        (failure("disk", "full", "make room"), 1),
    ],
)
def test_the_exit_code(monkeypatch: pytest.MonkeyPatch, last: Check, code: int) -> None:
    fake(monkeypatch, ok("Python", "3.12"), last)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == code
    assert done.stdout.splitlines()[0].split() == ["ok", "Python", "3.12"]
    assert last.status in done.stdout
    assert last.hint in done.stdout
    assert ("hint:" in done.stdout) == (last.status is not Status.OK)


def test_an_unknown_set_is_refused_before_anything_is_looked_at() -> None:
    done = CliRunner().invoke(app, ["doctor", "--data", "cifar01"])
    assert done.exit_code == 2
    assert "cifar10" in done.stderr
    assert done.stdout == ""
