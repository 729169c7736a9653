"""Nothing that a server does loses a value or sends one twice; `sync` completes what is missing.

The server keeps whatever it gets, so a value that is sent twice is there twice.
"""

import io
import json

import pytest
from fake_mlflow import FakeMlflow
from tracking_events import make_end, make_measured, make_run

from petractl.events import EventBus, RunInterrupted, RunStarted
from petractl.tracking import mlflow_run
from petractl.tracking.journal import Journal, read_journal
from petractl.tracking.mlflow_metrics import metric_points
from petractl.tracking.mlflow_run import RUN_ID_NAME, TrackingSettings
from petractl.tracking.mlflow_worker import BUSY, Reporter, Turn, follow


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


@pytest.fixture
def server():
    server = FakeMlflow().start()
    yield server
    server.stop()


class Rounds:
    """Ends the run after so many rounds, without waiting; `before` is called before each."""

    def __init__(self, rounds, before=lambda: None):
        self.left, self.before = rounds, before

    def closing(self, timeout_s):
        self.before()
        self.left -= 1
        return self.left <= 0


def write(run_dir, events):
    bus = EventBus()
    bus.subscribe(Journal(run_dir))
    for event in events:
        bus.emit(event)
    bus.close()


@pytest.fixture
def finished(run_dir):
    write(run_dir, [*make_run(run_dir), make_measured(3, 0), make_end()])
    (run_dir / "resolved.toml").write_text('[tracking]\nuri = "http://bob:hunter2@host"\n')
    return run_dir


def send(run_dir, server, *, rounds=1, before=lambda: None, is_live=True):
    """Follow a run; return whether all was sent, and the reports."""
    settings = TrackingSettings(str(run_dir), server.uri, "", "petractl", "one", {"a.b": "c"}, is_live)
    stream = io.BytesIO()
    complete = follow(settings, Rounds(rounds, before), Reporter(stream))
    return complete, [json.loads(line) for line in stream.getvalue().splitlines()]


def sent(reports):
    (report,) = [json.loads(report["message"]) for report in reports if report["kind"] == "sent"]
    return report["sent"], report["values"]


def expected(run_dir):
    return {
        (p.key, p.step, p.time_ms, str(p.value))
        for record in read_journal(run_dir)
        for p in metric_points(record)
    }


def assert_each_value_once(run_dir, server):
    assert server.counts() == dict.fromkeys(expected(run_dir), 1)


def test_a_run_arrives_whole(finished, server):
    complete, reports = send(finished, server)
    assert complete
    assert_each_value_once(finished, server)
    assert sent(reports) == (len(expected(finished)),) * 2
    run = server.run
    times = [round(1000 * record["time"]) for record in read_journal(finished)]
    assert (run["info"]["status"], run["info"]["start_time"]) == ("FINISHED", times[0])
    assert run["info"]["end_time"] == times[-1]
    assert run["params"]["a.b"] == "c"
    (text,) = server.files.values()
    assert text == b'[tracking]\nuri = "http://***@host"\n'


@pytest.mark.parametrize("fault", ["refuse", "lose"])
def test_whichever_request_fails_each_value_is_there_once(run_dir, fault):
    """The n-th request is refused, or done and its answer lost: for every n of a run and its resumption."""
    n, done = 0, False
    while not done:
        n += 1
        server = FakeMlflow().start()
        server.fault = lambda name, server=server, n=n: fault if len(server.requests) == n else ""
        folder = run_dir.parent / f"{fault}-{n}"
        folder.mkdir()
        write(folder, [*make_run(folder, epochs=1), RunInterrupted(1, "x")])
        complete = send(folder, server, rounds=2)[0]
        write(folder, [*make_run(folder, epochs=2, first=2), make_end(2)])
        complete = send(folder, server, rounds=2)[0] and complete
        if not complete:  # the very last try failed: nobody was left to try again
            assert send(folder, server, is_live=False)[0]
        assert_each_value_once(folder, server)
        assert server.run["info"]["status"] == "FINISHED"
        done = len(server.requests) < n
        server.stop()
    assert n > 20


def test_sending_late_completes_a_part_and_changes_nothing_when_repeated(finished, server, monkeypatch):
    monkeypatch.setattr(mlflow_run, "_METRICS_PER_REQUEST", 10)
    server.fault = lambda name: "refuse" if server.requests.count("runs/log-batch") > 4 else ""
    assert not send(finished, server)[0]
    part = sum(server.counts().values())
    server.fault = lambda name: "lose" if name == "runs/update" else ""
    assert not send(finished, server, is_live=False)[0]
    server.fault = lambda name: ""
    complete, reports = send(finished, server, is_live=False)
    assert complete
    assert_each_value_once(finished, server)
    assert sent(reports) == (0, len(expected(finished)))
    assert 0 < part < len(expected(finished))
    assert send(finished, server, is_live=False)[0]
    assert_each_value_once(finished, server)


def test_a_run_whose_id_was_never_written_is_found_again(finished, server):
    assert send(finished, server)[0]
    for content in ("", "../x", "no\x00id"):
        (finished / RUN_ID_NAME).write_text(content)
        assert send(finished, server, is_live=False)[0]
        assert (finished / RUN_ID_NAME).read_text().strip() in server.runs
    (finished / RUN_ID_NAME).unlink()
    (finished / RUN_ID_NAME).mkdir()  # it cannot be written either
    assert send(finished, server, is_live=False)[0]
    assert len(server.runs) == 1


def test_a_late_run_is_at_no_time_running_again(finished, server):
    assert send(finished, server)[0]
    server.requests.clear()
    server.fault = lambda name: "" if server.run["info"]["status"] == "FINISHED" else "refuse"
    assert send(finished, server, is_live=False)[0]


def test_a_server_that_is_killed_and_comes_back_gets_all_without_a_word(finished, server):
    """One failure between two that went well may be a dropped connection: nobody is told."""
    rounds = iter(("up", "stop", "start", "up"))

    def change():
        now = next(rounds)
        if now != "up":
            getattr(server, now)()

    complete, reports = send(finished, server, rounds=4, before=change)
    assert complete
    assert {report["kind"] for report in reports} == {"progress", "sent"}
    assert_each_value_once(finished, server)


def test_a_server_that_fails_throughout_is_told_of_and_logged_once(finished, server, capsys):
    server.fault = lambda name: "refuse"
    complete, reports = send(finished, server, rounds=3)
    assert not complete
    assert [report["kind"] for report in reports if report["kind"] != "progress"] == ["warning", "warning"]
    assert reports[-1]["message"] == "it answers with error 500"
    assert capsys.readouterr().err.count("in _follow") == 1


def test_of_two_processes_one_sends(finished, server):
    """The process of a run that was killed may still be at it when the run is restarted."""
    other = Turn(finished)
    assert other.take()
    complete, reports = send(finished, server, rounds=2)
    assert not complete
    assert [report["message"] for report in reports] == [BUSY]
    assert server.requests == []
    other.give_back()
    assert send(finished, server)[0]
    assert Turn(finished).take()  # it was given back


def test_a_folder_that_cannot_be_written_is_nobody_elses(run_dir):
    assert Turn(run_dir / "not there").take()


def test_a_restarted_run_goes_on_in_the_same_run(run_dir, server):
    write(run_dir, list(make_run(run_dir, epochs=2)))  # killed: no end
    assert send(run_dir, server)[0]
    assert server.run["info"]["status"] == "FAILED"
    write(run_dir, [RunStarted(str(run_dir), "r", "petra", "m", "d", 1)])
    seen = []
    server.fault = lambda name: seen.append(server.run["info"]["status"]) or ""
    write(run_dir, [*list(make_run(run_dir, epochs=3, first=2))[1:], make_end()])
    assert send(run_dir, server)[0]
    assert "RUNNING" in seen
    assert server.run["info"]["status"] == "FINISHED"
    assert_each_value_once(run_dir, server)
