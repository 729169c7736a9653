import io
import json
import os

import pytest
from tracking_events import make_end, make_run

from petractl.events import EventBus
from petractl.tracking import mlflow_worker
from petractl.tracking.journal import Journal, read_journal
from petractl.tracking.mlflow_run import TrackingSettings
from petractl.tracking.mlflow_worker import MaskedStream, Reporter, StdinCommands, follow, reason


class FakeRun:
    """Stands for MLflow: fails the first `failures` times."""

    failures = 0

    def __init__(self, settings, *, progress):
        self.sent, self.status = [], None
        FakeRun.last = self

    def send(self, records):
        if FakeRun.failures > 0:
            FakeRun.failures -= 1
            raise ConnectionError("http://bob:hunter2@host is down")
        self.sent += records

    def finish(self, status, *, end_ms):
        self.status, self.end_ms = status, end_ms

    run_id, num_sent = "id", 7


class Rounds:
    """Ends the run after so many rounds, and notes how long each was to wait."""

    def __init__(self, rounds):
        self.left, self.waits = rounds, []

    def closing(self, timeout_s):
        self.waits.append(timeout_s)
        self.left -= 1
        return self.left <= 0


def run_follow(run_dir, monkeypatch, *, rounds, failures):
    monkeypatch.setattr(mlflow_worker, "MlflowRun", FakeRun)
    monkeypatch.setattr(FakeRun, "failures", failures)
    stream, commands = io.BytesIO(), Rounds(rounds)
    settings = TrackingSettings(str(run_dir), "http://host", "", "petractl", "", {})
    complete = follow(settings, commands, Reporter(stream))
    return (
        complete,
        FakeRun.last,
        commands.waits,
        [json.loads(line) for line in stream.getvalue().splitlines()],
    )


@pytest.fixture
def finished_run(run_dir):
    bus = EventBus()
    bus.subscribe(Journal(run_dir))
    for event in [*make_run(run_dir), make_end()]:
        bus.emit(event)
    bus.close()
    return run_dir


def test_every_record_is_sent_once(finished_run, monkeypatch):
    complete, run, waits, reports = run_follow(finished_run, monkeypatch, rounds=3, failures=0)
    assert complete
    assert [record["epoch"] for record in run.sent if record["event"] == "epoch_trained"] == [1, 2, 3]
    assert run.status == "FINISHED"
    assert waits == [0.0, 1.0, 1.0]
    (report,) = reports
    assert report["kind"] == "sent"
    assert json.loads(report["message"]) == {"run_id": "id", "values": 33, "sent": 7}
    assert run.end_ms == round(1000 * read_journal(finished_run)[-1]["time"])


def test_a_failing_server_is_tried_again_more_and_more_rarely_and_gets_all(finished_run, monkeypatch, capsys):
    complete, run, waits, reports = run_follow(finished_run, monkeypatch, rounds=9, failures=7)
    assert complete
    assert waits == [0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 1.0]
    assert len([record for record in run.sent if record["event"] == "evaluated"]) == 3
    warnings = [report["message"] for report in reports if report["kind"] == "warning"]
    assert warnings == 6 * ["http://***@host is down"]  # the first failure is not told of
    assert capsys.readouterr().err.count("Traceback") == 1


def test_a_server_that_is_down_to_the_end_gets_one_last_try(finished_run, monkeypatch):
    complete, run, _, _ = run_follow(finished_run, monkeypatch, rounds=2, failures=9)
    assert not complete
    assert run.status is None
    assert FakeRun.failures == 7


def test_close_or_the_end_of_the_pipe_ends_the_run():
    for last_words in (b"close\n", b""):
        read, write = os.pipe()
        commands = StdinCommands(read)
        assert not commands.closing(0.0)
        os.write(write, last_words)
        os.close(write)
        assert commands.closing(1.0)
        assert commands.closing(1.0)
        os.close(read)


def test_reports_to_a_run_that_is_gone_do_not_fail():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb", buffering=0) as stream:
        Reporter(stream).tell("progress")


def test_reasons_are_one_short_line_without_credentials():
    assert reason(ValueError("a\n  b http://u:p@h")) == "a b http://***@h"
    assert reason(TimeoutError()) == "TimeoutError"
    assert len(reason(ValueError("x" * 1000))) == 300
    buried = "pool at http://u:p@h: (Caused by ResponseError('too many 503 error responses'))"
    assert reason(ValueError(buried)) == "it answers with error 503"


def test_the_log_is_masked():
    log = io.StringIO()
    print("at http://u:p@h", file=MaskedStream(log))
    assert log.getvalue() == "at http://***@h\n"
