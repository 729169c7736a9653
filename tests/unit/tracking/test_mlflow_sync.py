"""`petractl sync` with its real process, on a server in memory and on MLflow's own SQLite store."""

import json
import sqlite3
from pathlib import Path

import pytest
from fake_mlflow import FakeMlflow
from typer.testing import CliRunner

from petractl.cli.app import app
from petractl.events import Evaluated, EventBus, RunFinished, RunStarted
from petractl.run_folder import RunFolder
from petractl.tracking.journal import Journal

RECIPE = """
[model]
name = "revnet18"
[data]
name = "digits"
[method]
name = "petra"
[run]
directory = "{directory}"
[tracking]
mlflow = false
"""


def make_run(folder: Path, *, top1=(50.0, 60.0), ended=True, recipe=RECIPE):
    """A run folder as a run leaves it, with three values per epoch and two at the end."""
    folder.mkdir(parents=True)
    (folder / "resolved.toml").write_text(recipe.format(directory=folder.parent))
    bus = EventBus()
    bus.subscribe(Journal(folder))
    bus.emit(RunStarted(str(folder), "digits", "petra", "revnet18", "digits"))
    for epoch, value in enumerate(top1, start=1):
        bus.emit(Evaluated(epoch, 0.5, value, 99.0, 360, 0.1))
    if ended:
        bus.emit(RunFinished(len(top1), 1.0, None, 1, None, None, None, None))
    bus.close()
    return folder


def sync(*arguments):
    return CliRunner().invoke(app, ["sync", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def server():
    server = FakeMlflow().start()
    yield server
    server.stop()


def test_runs_of_a_folder_that_never_arrived_are_sent_once(tmp_path, server):
    for name in ("a", "b"):
        make_run(tmp_path / "runs" / name)
    result = sync(tmp_path / "runs", tmp_path / "runs" / "a", "--uri", server.uri, "--json")
    assert result.exit_code == 0, result.output
    lines = json.loads(result.stdout)
    assert [(Path(line["run"]).name, line["values"], line["sent"]) for line in lines] == [
        ("a", 8, 8),
        ("b", 8, 8),
    ]
    assert {run["info"]["run_name"] for run in server.runs.values()} == {"a", "b"}
    assert {line["mlflow_run_id"] for line in lines} == set(server.runs)
    for run in server.runs.values():
        assert set(server.counts(run).values()) == {1}
        assert run["params"]["model.name"] == "revnet18"
        assert run["info"]["status"] == "FINISHED"


def test_a_store_that_has_all_is_left_as_it_is(tmp_path):
    """Also values that a database writes in another way: not a number, and the infinities."""
    run = make_run(tmp_path / "runs" / "a", top1=(float("nan"), float("inf"), float("-inf")))
    assert "11 of 11 values sent" in sync(run).stdout

    def rows():
        with sqlite3.connect(tmp_path / "runs" / "mlflow.db") as store:
            return sorted(store.execute("select key, step, timestamp, value, is_nan from metrics"))

    before = rows()
    assert len(before) == 11
    result = sync(run)
    assert result.exit_code == 0
    assert "nothing was missing" in result.stdout
    assert rows() == before
    assert (run / "logs" / "mlflow.log").read_text() == ""


def test_a_run_that_cannot_be_sent_does_not_keep_the_others(tmp_path, server):
    server.stop()
    good = make_run(tmp_path / "runs" / "a")
    result = sync(good, "--uri", f"http://bob:hunter2@127.0.0.1:{server.port}")
    server.start()
    assert result.exit_code == 1
    assert result.stderr.startswith(
        f"error: {good}: MLflow at http://***@127.0.0.1:{server.port}: nothing lis"
    )
    assert "hunter2" not in result.output + (good / "logs" / "mlflow.log").read_text()
    damaged = make_run(tmp_path / "runs" / "b", recipe="[model")
    result = sync(damaged, good, "--uri", server.uri)
    assert result.exit_code == 2
    assert "not valid TOML" in result.stderr
    assert "8 of 8 values sent" in result.stdout


def test_what_is_damaged_in_a_journal_is_told_and_the_rest_is_sent(tmp_path, server):
    run = make_run(tmp_path / "a")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    broken = [lines[0], "no json", '{"event": "evaluated"}', "[]", *lines[1:], lines[-1][:20]]
    (run / "metrics.jsonl").write_text("\n".join(broken))
    result = sync(run, "--uri", server.uri)
    assert result.exit_code == 0
    assert "8 of 8 values sent" in result.stdout
    assert "2 lines of its metrics.jsonl cannot be read, the first is line 2" in result.stderr
    assert "is cut short" in result.stderr


def test_wrong_input_is_one_clear_error(tmp_path):
    run = make_run(tmp_path / "a")
    empty = make_run(tmp_path / "b")
    (empty / "metrics.jsonl").unlink()
    hidden = RECIPE + 'uri = "http://***@host"'
    for arguments, words in (
        ([tmp_path / "none", tmp_path / "x\ny"], "is no run folder and holds none; "),
        ([run, "--uri", "ftp://bob:hunter2@host"], "not a tracking server or database"),
        ([empty], "there is nothing to send"),
        ([make_run(tmp_path / "c", recipe=hidden)], "its credentials are hidden"),
    ):
        result = sync(*arguments)
        assert result.exit_code == 2
        assert result.stderr.count("error: ") == 1
        assert words in result.stderr
        assert "hunter2" not in result.stderr
        assert result.stdout == ""


def test_a_run_that_is_training_is_left_to_its_own_process(tmp_path):
    run = make_run(tmp_path / "a", ended=False)
    with RunFolder(run).locked():
        result = sync(run)
    assert result.exit_code == 2
    assert "another process is training in this folder" in result.stderr


def test_a_process_that_does_not_get_on_is_given_up(tmp_path, monkeypatch):
    import socket

    from petractl.errors import RunError
    from petractl.tracking.mlflow_sync import send_late
    from petractl.tracking.mlflow_tracker import tracking_settings

    run = make_run(tmp_path / "a")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = tracking_settings(run, uri=uri, experiment="e", run_name="r", parameters={}, is_live=False)
        with pytest.raises(RunError, match="has not answered for 1 s"):
            send_late(settings, stall_s=1.0)
