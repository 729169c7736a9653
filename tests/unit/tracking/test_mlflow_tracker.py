"""The tracker with its real process: a real SQLite store, a server that hangs, a run that is killed."""

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tracking_events import make_end, make_run

from petractl.events import EventBus, RunInterrupted, RunStarted, WarningRaised
from petractl.tracking.journal import Journal, read_journal
from petractl.tracking.mlflow_tracker import MlflowTracker, how_to_look, tracking_problem, tracking_uri
from petractl.tracking.plots import CurvePlotter


def track(run_dir, events, *, uri, **settings):
    """Emit the events of a run; return the warnings raised and the seconds that closing took."""
    warnings = []
    bus = EventBus()
    bus.subscribe(Journal(run_dir))
    bus.subscribe(CurvePlotter(run_dir))

    def warn(message, hint):
        warnings.append(f"{message}\n{hint}")
        bus.emit(WarningRaised(message, hint))

    bus.subscribe(MlflowTracker(run_dir, uri=uri, on_warning=warn, **settings))
    for event in events:
        bus.emit(event)
    start_s = time.monotonic()
    bus.close()
    return warnings, time.monotonic() - start_s


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run that was interrupted after epoch 1 and resumed with another key, in a store made by the first."""
    directory = tmp_path_factory.mktemp("my runs") / "50% done"
    run_dir = directory / "one"
    run_dir.mkdir(parents=True)
    (run_dir / "resolved.toml").write_text('[tracking]\nuri = "http://bob:hunter2@host"\n')
    uri = tracking_uri("", directory=directory)
    parameters = {"model.name": "revnet18", "training.epochs": "1", "tracking.uri": "http://bob:hunter2@host"}
    first = [*make_run(run_dir, epochs=1), RunInterrupted(1, "petractl resume x")]
    patient = {"close_wait_s": 120.0, "interrupted_wait_s": 120.0}
    warnings, _ = track(run_dir, first, uri=uri, parameters=parameters, run_name="first", **patient)
    run_id = (run_dir / "mlflow_run_id").read_text()
    second = [*make_run(run_dir, epochs=3, first=2), make_end()]
    more, _ = track(
        run_dir, second, uri=uri, parameters=parameters | {"training.epochs": "3"}, close_wait_s=120.0
    )
    assert warnings + more == []
    assert (run_dir / "mlflow_run_id").read_text() == run_id
    return directory, uri, run_id.strip()


@pytest.fixture
def client(tracked, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracked[1])


def test_a_resumed_run_is_one_run_in_the_store(tracked, client):
    experiment = client.get_experiment_by_name("petractl")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == tracked[2]
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"


def test_metrics_of_both_sessions_are_there_once(tracked, client):
    history = client.get_metric_history(tracked[2], "test/top1")
    assert [(point.step, point.value) for point in history] == [(1, 82.0), (2, 83.0), (3, 84.0)]
    journal = [record for record in read_journal(tracked[0] / "one") if record["event"] == "evaluated"]
    assert [point.timestamp for point in history] == [round(1000 * record["time"]) for record in journal]


def test_parameters_are_flat_masked_and_never_changed(tracked, client):
    run = client.get_run(tracked[2])
    assert run.data.params["model.name"] == "revnet18"
    assert run.data.params["training.epochs"] == "1"
    assert run.data.tags["resumed.training.epochs"] == "3"
    assert run.data.params["plan.schedule"] == "tight"
    assert run.data.params["tracking.uri"] == "http://***@host"


def test_recipe_and_plots_lie_beside_the_store_without_credentials(tracked, client):
    directory, _, run_id = tracked
    files = directory / "mlartifacts" / run_id / "artifacts"
    assert (files / "plots" / "curves.png").stat().st_size > 1000
    assert (files / "resolved.toml").read_text() == '[tracking]\nuri = "http://***@host"\n'
    assert {item.path for item in client.list_artifacts(run_id)} == {"plots", "resolved.toml"}
    assert sorted(path.name for path in directory.iterdir()) == ["mlartifacts", "mlflow.db", "one"]


def test_nothing_is_printed_and_the_log_is_empty(tracked):
    assert (tracked[0] / "one" / "logs" / "mlflow.log").read_text() == ""


def test_a_run_that_is_killed_is_marked_as_failed(tracked, client, run_dir):
    uri = f"sqlite:///{run_dir.parent / 'mlflow.db'}"
    shutil.copyfile(tracked[0] / "mlflow.db", run_dir.parent / "mlflow.db")
    code = (
        "import os, sys; from pathlib import Path\n"
        "from petractl.events import *; from petractl.tracking.journal import Journal\n"
        "from petractl.tracking.mlflow_tracker import MlflowTracker\n"
        "bus = EventBus(); run = Path(sys.argv[1]); bus.subscribe(Journal(run))\n"
        "bus.subscribe(MlflowTracker(run, uri=sys.argv[2]))\n"
        "bus.emit(RunStarted(str(run), 'r', 'petra', 'revnet18', 'digits'))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run_dir), uri], check=False)
    assert done.returncode == -9
    from mlflow import MlflowClient

    def status():
        written = run_dir / "mlflow_run_id"
        return (
            MlflowClient(tracking_uri=uri).get_run(written.read_text().strip()).info.status
            if written.is_file()
            else ""
        )

    until_s = time.monotonic() + 60.0
    while status() != "FAILED" and time.monotonic() < until_s:
        time.sleep(0.2)
    assert status() == "FAILED"


def test_a_server_that_never_answers_does_not_hold_up_the_end(run_dir):
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://bob:hunter2@127.0.0.1:{server.getsockname()[1]}"
        start_s = time.monotonic()
        events = [*make_run(run_dir), make_end()]
        warnings, close_s = track(run_dir, events, uri=uri, stall_s=1.0, close_wait_s=4.0)
    assert close_s < 5.0
    assert time.monotonic() - start_s < 10.0
    assert len(warnings) == 1
    assert "http://***@127.0.0.1" in warnings[0]
    assert "metrics.jsonl holds everything" in warnings[0]
    assert "hunter2" not in (run_dir / "metrics.jsonl").read_text()
    assert read_journal(run_dir)[-1]["event"] == "warning_raised"


def test_a_server_that_is_absent_costs_one_warning(run_dir):
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://bob:hunter2@127.0.0.1:{server.getsockname()[1]}"
    warnings, _ = track(run_dir, [*make_run(run_dir), make_end()], uri=uri, stall_s=20.0)
    assert len(warnings) == 1
    assert "hunter2" not in warnings[0] + (run_dir / "logs" / "mlflow.log").read_text()


def test_a_process_that_cannot_start_its_work_costs_one_warning(run_dir, monkeypatch):
    """A process that ends at once (here: another program) neither stops the run nor makes it wait."""
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    warnings, close_s = track(run_dir, make_run(run_dir), uri="http://127.0.0.1:1")
    assert [warning.partition("\n")[0] for warning in warnings] == [
        "MLflow at http://127.0.0.1:1: not everything could be sent"
    ]
    assert close_s < 5.0


def test_no_process_is_started_before_the_run_or_for_a_bad_address(run_dir, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    assert track(run_dir, [], uri="http://127.0.0.1:1") == ([], pytest.approx(0.0, abs=1.0))
    started = RunStarted(str(run_dir), "r", "petra", "revnet18", "digits")
    warnings, _ = track(run_dir, [started, started], uri="./mlruns")
    assert len(warnings) == 1
    assert "not a tracking server or database" in warnings[0]


def test_the_default_store_lies_in_the_directory_of_the_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tracking_uri("", directory=Path("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert tracking_uri("sqlite:///x.db", directory=Path("runs")) == f"sqlite:///{tmp_path}/x.db"
    assert tracking_uri("http://host:5000", directory=Path("runs")) == "http://host:5000"


@pytest.mark.parametrize(
    "uri",
    [
        "http://h",
        "http://[::1]:5000",
        "https://u:p@h",
        "sqlite:////a/b.db",
        "postgresql+psycopg2://h/db",
        "databricks",
        "databricks://p",
    ],
)
def test_good_addresses(uri):
    assert tracking_problem(uri) == ""


@pytest.mark.parametrize(
    "uri",
    [
        "./mlruns",
        "file:///x",
        "runs",
        "sqlite://",
        "sqlite:////a?b/x.db",
        "ftp://h",
        "C:\\x",
        "http://",
        "https://:5000",
        "http://u:p@[bad",
        "http://h:port",
    ],
)
def test_bad_addresses(uri):
    assert tracking_problem(uri)


def test_where_something_is_left_the_last_word_is_how_to_send_it(run_dir, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    tracker = MlflowTracker(run_dir, uri="http://127.0.0.1:1", on_warning=lambda *_: None)
    assert tracker.how_to_look() == "http://127.0.0.1:1"
    tracker.look()
    tracker.close()
    assert tracker.how_to_look() == f"not everything is there; send it with: petractl sync {run_dir}"


def test_how_to_look():
    assert (
        how_to_look("sqlite:////my runs/mlflow.db")
        == "mlflow ui --backend-store-uri 'sqlite:////my runs/mlflow.db'"
    )
    assert how_to_look("https://u:p@host/") == "https://***@host/"


def test_the_end_says_that_it_waits_and_what_was_left(run_dir):
    """One warning, however much goes wrong; what it cannot say any more is said in plain lines."""
    notices = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        warnings, close_s = track(run_dir, make_run(run_dir), uri=uri, stall_s=1.5, on_notice=notices.append)
    assert notices == ["waiting for MLflow, 30 s at most"]
    assert len(warnings) == 1
    assert f"petractl sync {run_dir}" in warnings[0]
    assert close_s < 6.0


def test_what_was_left_after_a_warning_is_no_second_warning(run_dir, monkeypatch):
    """A process that warns and then dies."""
    code = (
        "import json\n"
        "for _ in range(3): print(json.dumps({'kind': 'warning', 'message': 'no'}), flush=True)\n"
    )
    real = subprocess.Popen

    def popen(command, **settings):
        return real([sys.executable, "-c", code], **settings)

    monkeypatch.setattr(subprocess, "Popen", popen)
    notices = []
    settings = {"stall_s": 30.0, "on_notice": notices.append}
    warnings, close_s = track(run_dir, make_run(run_dir), uri="http://127.0.0.1:1", **settings)
    assert [warning.partition("\n")[0] for warning in warnings] == ["MLflow at http://127.0.0.1:1: no"]
    assert notices[-1] == f"MLflow: not everything could be sent; later: petractl sync {run_dir}"
    assert close_s < 20.0


def test_an_interrupted_run_waits_less(run_dir):
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        events = [*make_run(run_dir), RunInterrupted(1, "petractl resume x")]
        _, close_s = track(run_dir, events, uri=uri, stall_s=9.0, interrupted_wait_s=1.0)
    assert close_s < 6.0


def test_a_log_that_cannot_be_written_costs_one_warning(run_dir):
    (run_dir / "logs").write_text("")
    warnings, _ = track(run_dir, make_run(run_dir), uri="http://127.0.0.1:1")
    assert len(warnings) == 1
    assert "its process cannot be started: File exists" in warnings[0]


def test_settings_survive_the_pipe_whatever_their_size(run_dir):
    """More than a pipe holds (64 KiB), to a process that is slow to read."""
    parameters = {f"key{i}": "x" * 500 for i in range(400)}
    assert len(json.dumps(parameters)) > 2**17
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        warnings, _ = track(run_dir, make_run(run_dir), uri=uri, parameters=parameters, stall_s=0.5)
    assert len(warnings) == 1
