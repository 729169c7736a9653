import io
import json

import pytest

from petractl.tracking import mlflow_sweep
from petractl.tracking.mlflow_run import TrackingSettings
from petractl.tracking.mlflow_sweep import follow_sweep, run_ids, table_metrics
from petractl.tracking.mlflow_worker import Reporter


class FakeRun:
    """Stands for MLflow: fails to open the first `failures` times."""

    failures = 0
    last: "FakeRun"

    def __init__(self, settings, *, progress):
        self.nested, self.metrics, self.files, self.status = [], {}, [], None
        FakeRun.last = self

    def open(self):
        if FakeRun.failures > 0:
            FakeRun.failures -= 1
            raise ConnectionError("down")

    def nest(self, run_id):
        self.nested.append(run_id)

    def log(self, metrics, files):
        self.metrics, self.files = metrics, [path.name for path in files]

    def finish(self, status):
        self.status = status


class Rounds:
    """Ends the sweep after so many rounds; before each, `between` may change the folder."""

    def __init__(self, between):
        self.between = list(between)

    def closing(self, timeout_s):
        self.between.pop(0)()
        return not self.between


def make_cell(directory, name, run_id):
    (directory / name).mkdir()
    (directory / name / "mlflow_run_id").write_text(f"{run_id}\n")


def row(name, top1):
    numbers = dict.fromkeys(("top1_std", "best_top1_mean", "peak_memory_bytes"))
    return {
        "name": name,
        "top1_mean": top1,
        "images_per_s": 5.0,
        "finished": int(top1 is not None),
        **numbers,
    }


TABLE = {"status": "failed", "rows": [row("lr=0.1", 90.0), row("lr=0.2", 95.0), row("lr=0.3", None)]}


@pytest.mark.parametrize("failures", [0, 1])
def test_runs_are_nested_as_they_come_and_the_table_follows(tmp_path, monkeypatch, failures):
    monkeypatch.setattr(mlflow_sweep, "MlflowRun", FakeRun)
    monkeypatch.setattr(FakeRun, "failures", failures)
    (tmp_path / "sweep.json").write_text(json.dumps(TABLE))
    (tmp_path / "mlflow_run_id").write_text("parent\n")
    stream = io.BytesIO()
    rounds = Rounds(
        [lambda: make_cell(tmp_path, "a", "id1"), lambda: make_cell(tmp_path, "b", "id2"), lambda: None]
    )
    settings = TrackingSettings(str(tmp_path), "http://host", "", "petractl", "", {})
    assert follow_sweep(settings, rounds, Reporter(stream))
    run = FakeRun.last
    assert run.nested == ["id1", "id2"]
    assert run.status == "FAILED"
    assert run.files == ["sweep.json"]
    assert run.metrics == table_metrics(TABLE)
    kinds = [json.loads(line)["kind"] for line in stream.getvalue().splitlines()]
    assert kinds == ["warning"] * failures + ["progress"] * 2


def test_a_server_that_stays_down_costs_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_sweep, "MlflowRun", FakeRun)
    monkeypatch.setattr(FakeRun, "failures", 9)
    settings = TrackingSettings(str(tmp_path), "http://host", "", "petractl", "", {})
    assert not follow_sweep(settings, Rounds([lambda: None]), Reporter(io.BytesIO()))


def test_a_sweep_without_a_table_was_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_sweep, "MlflowRun", FakeRun)
    monkeypatch.setattr(FakeRun, "failures", 0)
    settings = TrackingSettings(str(tmp_path), "http://host", "", "petractl", "", {})
    assert follow_sweep(settings, Rounds([lambda: None]), Reporter(io.BytesIO()))
    assert FakeRun.last.status == "KILLED"
    assert FakeRun.last.metrics == {"runs_finished": 0.0}


def test_the_numbers_of_the_table_are_metrics():
    assert table_metrics(TABLE) == {
        "top1_mean/lr=0.1": 90.0,
        "images_per_s/lr=0.1": 5.0,
        "top1_mean/lr=0.2": 95.0,
        "images_per_s/lr=0.2": 5.0,
        "images_per_s/lr=0.3": 5.0,
        "best_row_top1_mean": 95.0,
        "runs_finished": 2.0,
    }


def test_only_ids_are_taken(tmp_path):
    make_cell(tmp_path, "a", "0123abc")
    make_cell(tmp_path, "b", "not an id")
    make_cell(tmp_path, "c", "")
    assert run_ids(tmp_path) == {"0123abc"}
