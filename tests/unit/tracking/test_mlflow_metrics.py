import math
from dataclasses import replace

import pytest
from tracking_events import make_end, make_measured, make_plan, make_process_plan, make_run

from petractl.events import RunFailed, RunInterrupted, RunStarted, SamplesSkipped, StepsDone, as_record
from petractl.tracking.mlflow_metrics import (
    MetricPoint,
    final_status,
    matters,
    metric_points,
    mlflow_name,
    plan_parameters,
)


def records(events):
    return [as_record(event, time=float(i)) for i, event in enumerate(events)]


def test_metrics_are_named_by_split_and_stepped_by_epoch(tmp_path):
    points = [p for record in records(make_run(tmp_path, epochs=2)) for p in metric_points(record)]
    by_key = {(p.key, p.step): p.value for p in points}
    assert by_key["train/loss", 1] == 1.0
    assert by_key["train/top1", 2] == 82.0
    assert by_key["test/top1", 2] == 83.0
    assert by_key["images_per_s", 2] == 5321.4
    assert by_key["staleness_updates/stage_00", 0] == 0.5
    assert "data_wait_percent" not in {p.key for p in points}  # it was not measured


def test_what_a_stage_measured_is_named_by_stage_and_replica():
    points = metric_points(as_record(make_measured(4, 2, idle=12.0), time=0.0))
    assert {(p.key, p.value) for p in points} == {
        ("idle_percent/stage_02", 12.0),
        ("wait_forward_percent/stage_02", 6.0),
        ("wait_backward_percent/stage_02", 3.0),
        ("bytes_sent/stage_02", 1.5 * 2**20),
        ("staleness_measured/stage_02", 0.5),
    }
    assert {p.step for p in points} == {4}
    of_replica = metric_points(as_record(make_measured(4, 12, replica=1), time=0.0))
    assert of_replica[0].key == "idle_percent/stage_12_replica_1"


def test_what_a_stage_did_not_measure_is_no_metric():
    measured = replace(make_measured(1, 0), idle_percent=None, bytes_sent_forward=None)
    keys = {p.key: p.value for p in metric_points(as_record(measured, time=0.0))}
    assert "idle_percent/stage_00" not in keys
    assert keys["bytes_sent/stage_00"] == 2**19
    nothing = replace(measured, bytes_sent_backward=None)
    assert "bytes_sent/stage_00" not in {p.key for p in metric_points(as_record(nothing, time=0.0))}


def test_progress_within_an_epoch_is_no_metric():
    assert metric_points(as_record(StepsDone(1, 2, 3, 0.5, 50.0, 9.0, 0.1, 7), time=0.0)) == []
    old = as_record(StepsDone(1, 2, 3, 0.5, 50.0, 9.0, 0.1, 7), time=0.0)
    del old["data_wait_percent"]
    assert metric_points(old) == []  # of a journal of an earlier version


def test_waiting_for_data_is_stepped_by_update_and_what_was_left_out_by_epoch():
    steps = StepsDone(1, 2, 3, 0.5, 50.0, 9.0, 0.1, 7, data_wait_percent=3.5)
    (point,) = metric_points(as_record(steps, time=0.0))
    assert (point.key, point.value, point.step) == ("steps/data_wait_percent", 3.5, 7)
    (point,) = metric_points(as_record(SamplesSkipped(4, 12, ("a",)), time=0.0))
    assert (point.key, point.value, point.step) == ("samples_skipped", 12.0, 4)


def test_what_was_not_finite_is_sent_as_such():
    record = records(make_run("x", epochs=1))[3] | {"loss": "NaN", "time": 1.5}
    point = metric_points(record)[0]
    assert (point.key, point.step, point.time_ms) == ("train/loss", 1, 1500)
    assert math.isnan(point.value)


def test_the_end_gives_the_best_value():
    assert MetricPoint("best_top1", 84.0, 3, 0) in metric_points(as_record(make_end(), time=0.0))


def test_names_hold_only_what_mlflow_accepts():
    assert mlflow_name("top-1 (%) at k=2") == "top-1 ___ at k_2"
    assert mlflow_name("test/top1.x_y: z") == "test/top1.x_y: z"
    assert mlflow_name("/a//../b") == "_/a/_/_/b"
    assert len(mlflow_name("x" * 1000)) < 250


def test_the_plan_adds_parameters():
    parameters = plan_parameters(as_record(make_plan(), time=0.0))
    assert parameters["plan.stages"] == "2"
    assert parameters["plan.samples_per_update"] == "128"
    of_processes = plan_parameters(as_record(make_process_plan(), time=0.0))
    assert (of_processes["plan.processes"], of_processes["plan.replicas"]) == ("4", "2")
    assert of_processes["plan.backend"] == "nccl"


def test_the_plan_of_an_older_journal_has_fewer_parameters():
    record = as_record(make_plan(), time=0.0)
    older = {key: value for key, value in record.items() if key not in ("replicas", "processes", "backend")}
    assert "plan.replicas" not in plan_parameters(older)
    assert plan_parameters(older)["plan.threads"] == "1"


@pytest.mark.parametrize(
    ("events", "status"),
    [
        ([], "FAILED"),
        ([RunStarted("d", "r", "petra", "m", "d")], "FAILED"),
        ([RunStarted("d", "r", "petra", "m", "d"), make_end()], "FINISHED"),
        ([RunStarted("d", "r", "petra", "m", "d"), RunInterrupted(1, "x")], "KILLED"),
        ([RunStarted("d", "r", "petra", "m", "d"), RunFailed("x")], "FAILED"),
        ([RunInterrupted(1, "x"), RunStarted("d", "r", "petra", "m", "d", 1), make_end()], "FINISHED"),
        ([make_end(), RunStarted("d", "r", "petra", "m", "d", 3)], "FAILED"),
    ],
)
def test_the_status_is_that_of_the_last_session(events, status):
    assert final_status(records(events)) == status


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"event": "evaluated"},
        {"event": ["evaluated"], "time": 1.0},
        {"event": "evaluated", "time": 1.0, "epoch": 1, "split": "test"},
        {"event": "evaluated", "time": "NaN", "epoch": 1, "split": "test", "loss": 1, "top1": 1, "top5": 1},
        {"event": "evaluated", "time": 1e300, "epoch": 1, "split": "test", "loss": 1, "top1": 1, "top5": 1},
        {"event": "evaluated", "time": 1.0, "epoch": -1, "split": "test", "loss": 1, "top1": 1, "top5": 1},
        {"event": "evaluated", "time": 1.0, "epoch": 2**70, "split": "x", "loss": 1, "top1": 1, "top5": 1},
        {"event": "evaluated", "time": 1.0, "epoch": 1, "split": "x", "loss": {}, "top1": "1", "top5": True},
        {"event": "plan_made", "time": 1.0, "stages": [1, None]},
        {"event": "plan_made", "time": 1.0, "stages": [{"index": [], "staleness_updates": 1.0}]},
        {"event": "stage_measured", "time": 1.0, "epoch": 1, "stage": 0, "replica": 0},
    ],
)
def test_a_record_that_is_not_as_it_should_be_holds_nothing(record):
    assert metric_points(record) == []
    assert not matters(record)


def test_the_plan_of_a_damaged_record_is_still_text():
    assert plan_parameters({"event": "plan_made", "stages": 3, "method": None}) == {
        "plan.stages": "0",
        "plan.method": "None",
    }
    assert final_status([{}, {"event": None}, {"event": ["run_finished"]}]) == "FAILED"
