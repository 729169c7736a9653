"""What the doctor says of Python, torch, GPUs, disk and shared memory, good and bad."""

import json
import os
import shutil
from pathlib import Path

import pytest

from petractl.doctor import disk, machine
from petractl.doctor.check import Check, Status
from petractl.doctor.child import NoAnswerError, ask, last_words

GPU = {"name": "NVIDIA H100", "memory_bytes": 80 * 2**30}
SEEN = {"cuda": "12.8", "gpus": [], "why": ""}


def explained(check: Check) -> bool:
    """Whether a check that is not well says what to do, and one that is well does not."""
    return bool(check.hint) == (check.status is not Status.OK)


@pytest.mark.parametrize(
    ("version", "system", "status"),
    [
        ((3, 11, 0), "Linux", Status.OK),
        ((3, 10, 14), "Linux", Status.FAILURE),
        ((3, 12, 1), "Darwin", Status.WARNING),
    ],
)
def test_python(version: tuple[int, int, int], system: str, status: Status) -> None:
    check = machine.check_python(version, system)
    assert check.status is status
    assert explained(check)
    assert ".".join(map(str, version)) in check.what


@pytest.mark.parametrize(
    ("version", "status"), [("2.9.1+cu128", Status.OK), ("2.8.0", Status.FAILURE), ("3.0", Status.OK)]
)
def test_torch(version: str, status: Status) -> None:
    check = machine.judge_torch(version, "0.24", threads=2)
    assert check.status is status
    assert explained(check)


def test_a_torch_that_cannot_be_imported_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    check = machine.check_torch()
    assert check.status is Status.FAILURE
    assert "torchvision" in check.what
    assert explained(check)


@pytest.mark.parametrize(
    ("answer", "has_driver", "status", "words"),
    [
        (SEEN, False, Status.OK, "no GPU"),
        ({**SEEN, "gpus": [GPU, GPU]}, True, Status.OK, "2 GPUs: NVIDIA H100 (80 GiB), NVIDIA H100"),
        ({**SEEN, "why": "driver too old"}, True, Status.WARNING, "driver too old"),
        ({**SEEN, "cuda": None}, True, Status.WARNING, "for CPUs only"),
    ],
)
def test_gpus(answer: dict[str, object], has_driver: bool, status: Status, words: str) -> None:
    check = machine.judge_gpus(answer, has_driver=has_driver, driver="550.1")
    assert check.status is status
    assert words in check.what
    assert explained(check)


def test_gpus_that_do_not_answer_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_args: object, **_options: object) -> dict[str, object]:
        raise NoAnswerError("no answer within 60 s")

    monkeypatch.setattr(machine, "ask", nothing)
    check, gpus = machine.check_gpus()
    assert check.status is Status.FAILURE
    assert "no answer within 60 s" in check.what
    assert explained(check)
    assert gpus == 0


def test_the_disk_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    check = disk.check_disk(tmp_path / "deep" / "runs")
    assert check.status is not Status.FAILURE or shutil.disk_usage(tmp_path).free < 2**28
    assert "GiB free" in check.what
    assert "ms" in check.what
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_of_the_folder_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    check = disk.check_disk(tmp_path / "runs" / "here")
    assert check.status is Status.FAILURE
    assert explained(check)


def test_a_disk_that_refuses_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_descriptor: int) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "fsync", refuse)
    check = disk.check_disk(tmp_path)
    assert check.status is Status.FAILURE
    assert "Read-only file system" in check.what
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("free", "sync_s", "status"),
    [
        (2**40, 0.01, Status.OK),
        (2**40, 1.0, Status.WARNING),
        (2**31, 0.01, Status.WARNING),
        (2**20, 0.01, Status.FAILURE),
    ],
)
def test_room_and_speed_of_the_disk(free: int, sync_s: float, status: Status) -> None:
    check = disk.judge_disk(Path("runs"), free=free, sync_s=sync_s)
    assert check.status is status
    assert explained(check)


@pytest.mark.parametrize(("free", "status"), [(2**33, Status.OK), (2**26, Status.WARNING)])
def test_shared_memory(free: int, status: Status) -> None:
    check = disk.judge_shared_memory(disk.SHARED_MEMORY, total=2**34, free=free)
    assert check.status is status
    assert explained(check)


def test_shared_memory_that_is_not_there_is_a_warning(tmp_path: Path) -> None:
    assert disk.check_shared_memory(tmp_path / "none").status is Status.WARNING


def question(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> str:
    """Make a module that can be asked, and return its name."""
    (folder / "question.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return "question"


def test_a_question_goes_by_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "import sys\nprint('noise')\nassert len(sys.argv) == 1\nprint(sys.stdin.read())"
    module = question(tmp_path, monkeypatch, body)
    assert ask(module, {"uri": "a"}, timeout_s=30.0) == {"uri": "a"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("import time; time.sleep(60)", "no answer within 1 s"),
        ("raise RuntimeError('broken driver')", "RuntimeError: broken driver"),
        ("import os; os.abort()", "ended with -6"),
        ("print(1)", "ended with 0"),
    ],
)
def test_no_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, words: str) -> None:
    with pytest.raises(NoAnswerError, match=words):
        ask(question(tmp_path, monkeypatch, body), {}, timeout_s=1.0 if "sleep" in body else 30.0)


def test_the_last_words_are_the_error() -> None:
    assert last_words("Traceback\n  File x\nValueError: no\n\n") == "ValueError: no"
    assert last_words("") == ""


def test_a_check_is_data() -> None:
    import dataclasses

    told = dataclasses.asdict(machine.check_python((3, 12, 0), "Linux"))
    assert json.loads(json.dumps(told)) == {
        "name": "Python",
        "status": "ok",
        "what": "3.12.0 on Linux",
        "hint": "",
    }
