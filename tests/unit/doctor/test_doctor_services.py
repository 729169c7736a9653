"""What the doctor says of messages between processes, of MLflow and of data sets."""

import socket
from pathlib import Path

import pytest

from petractl.doctor import datasets, tracking
from petractl.doctor.check import Check, Status
from petractl.doctor.child import NoAnswerError
from petractl.doctor.messages import check_messages

SECRET = "hunter2"


def test_processes_that_hang_end_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "import signal, time\nsignal.alarm(1)\ntime.sleep(60)"
    (tmp_path / "hangs.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = check_messages("gloo", timeout_s=1, module="hangs")
    assert check == Check("gloo", Status.FAILURE, "no answer within 1 s", check.hint)
    assert "127.0.0.1" in check.hint


def test_processes_that_fail_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = check_messages("nccl", timeout_s=30, module="fails")
    assert check.status is Status.FAILURE
    assert "process " in check.what
    assert "gloo" in check.hint


def test_a_store_that_is_not_there_is_left_so(tmp_path: Path) -> None:
    check = tracking.check_tracking("", directory=tmp_path)
    assert check.status is Status.OK
    assert "made by the first run" in check.what
    assert list(tmp_path.iterdir()) == []


def test_a_store_where_a_file_is_in_the_way_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check = tracking.check_tracking(f"sqlite:///{tmp_path}/file/mlflow.db", directory=tmp_path)
    assert check.status is Status.FAILURE
    assert check.hint


@pytest.mark.parametrize("uri", ["./mlruns", f"ftp://me:{SECRET}@host/x"])
def test_an_address_that_runs_refuse_is_a_failure(tmp_path: Path, uri: str) -> None:
    check = tracking.check_tracking(uri, directory=tmp_path)
    assert check.status is Status.FAILURE
    assert check.hint
    assert SECRET not in check.what


def test_a_server_that_is_down_is_a_warning(tmp_path: Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # nobody listens here
        port = bound.getsockname()[1]
        uri = f"http://me:{SECRET}@127.0.0.1:{port}"
        check = tracking.check_tracking(uri, directory=tmp_path)
    assert check.status is Status.WARNING
    assert "petractl sync" in check.hint
    assert check.what == f"http://***@127.0.0.1:{port}: nothing listens there (connection refused)"
    assert SECRET not in check.what


def answers(monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    def ask(_module: str, question: dict[str, object], **_options: object) -> dict[str, object]:
        assert question == {"uri": "http://host"}
        return {"error": error, "seconds": 0.25, "version": "3.1"}

    monkeypatch.setattr(tracking, "ask", ask)


def test_a_server_that_answers_is_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, "")
    check = tracking.check_tracking("http://host", directory=tmp_path)
    assert check == Check("MLflow", Status.OK, "http://host answers in 0.25 s, MLflow 3.1")


def test_a_server_that_refuses_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, "401: Unauthorized")
    check = tracking.check_tracking("http://host", directory=tmp_path)
    assert check.status is Status.WARNING
    assert "401: Unauthorized" in check.what


def test_a_server_that_hangs_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_question: object, **_options: object) -> dict[str, object]:
        raise NoAnswerError("no answer within 30 s")

    monkeypatch.setattr(tracking, "ask", ask)
    assert tracking.check_tracking("http://host", directory=tmp_path).status is Status.WARNING


def test_every_set_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from petractl.data import list_datasets

    monkeypatch.chdir(tmp_path)
    found = {check.name.removeprefix("data "): check for check in datasets.check_datasets([])}
    assert list(found) == list_datasets()
    for name, check in found.items():
        wanted = Status.OK if name in ("digits", "fake") else Status.WARNING
        assert check.status is wanted, name
        if wanted is Status.WARNING:
            assert str(tmp_path / "data" / name) in check.what
            assert check.hint


def test_a_set_that_is_asked_for_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    digits, cifar = datasets.check_datasets(["digits", "cifar10"])
    assert (digits.status, cifar.status) == (Status.OK, Status.FAILURE)
    assert digits.what == "1,437 + 360 images, no files needed"


def test_a_damaged_set_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(b"nothing")
    check = datasets.check_dataset("cifar10", is_needed=False)
    assert check.status is Status.WARNING
    assert "not found" not in check.what
    assert check.hint
