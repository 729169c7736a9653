"""What a journal tells of its stages, and that one which is damaged is told as that."""

import json
from typing import Any

import pytest

from petractl.errors import DataError
from petractl.planning.measured import measured_run


def records() -> list[dict[str, Any]]:
    """A run of two stages and two epochs, of which the first counts for nothing."""
    plan = {
        "event": "plan_made",
        "method": "petra",
        "schedule": "tight",
        "accumulation": 1,
        "replicas": 1,
        "steps_per_epoch": 10,
        "stages": [{"lookahead": 1}, {"lookahead": 0}],
    }
    rows: list[dict[str, Any]] = [plan]
    for epoch in (1, 2):
        rows.append({"event": "epoch_trained", "epoch": epoch, "samples": 640, "seconds": 2.0 / epoch})
        for stage in (0, 1):
            measured = {
                "seconds": 1.0,
                "compute_percent": 80.0,
                "idle_percent": 20.0,
                "staleness_updates": 1.0 - stage,
            }
            rows.append({"event": "stage_measured", "epoch": epoch, "stage": stage, **measured})
    return rows


def test_the_mean_is_over_the_epochs_after_the_first() -> None:
    run = measured_run(records(), where="run")
    assert (run.epochs, run.seconds, run.images_per_s) == (1, 1.0, 640.0)
    assert run.lookahead == (1, 0)
    assert [stage.slot_s for stage in run.stages] == pytest.approx([0.08, 0.08])
    assert [stage.staleness_updates for stage in run.stages] == [1.0, 0.0]


def test_lines_that_are_no_events_are_left_out() -> None:
    assert measured_run([{}, {"event": None}, {"event": []}, *records()], where="run").epochs == 1


DAMAGES: dict[str, tuple[int, str, object]] = {
    "no-schedule": (0, "schedule", None),
    "stages-are-a-number": (0, "stages", 3),
    "stages-are-words": (0, "stages", ["a", "b"]),
    "no-lookahead": (0, "stages", [{}, {}]),
    "lookahead-is-a-word": (0, "stages", [{"lookahead": "1"}, {"lookahead": 0}]),
    "lookahead-increases": (0, "stages", [{"lookahead": 0}, {"lookahead": 1}]),
    "no-microbatches": (0, "steps_per_epoch", 0),
    "half-an-accumulation": (0, "accumulation", 0.5),
    "no-replicas": (0, "replicas", True),
    "samples-are-words": (4, "samples", "many"),
    "no-samples": (4, "samples", 0),
    "no-time": (4, "seconds", 0.0),
    "time-is-no-number": (4, "seconds", float("nan")),
    "time-without-end": (4, "seconds", float("inf")),
    "epoch-is-a-list": (4, "epoch", [2]),
    "computes-less-than-nothing": (5, "compute_percent", -80.0),
    "idle-is-nothing": (5, "idle_percent", None),
    "staleness-is-a-table": (5, "staleness_updates", {}),
    "seconds-are-words": (6, "seconds", "NaN"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_journal_is_told(damage: str) -> None:
    rows, (number, key, value) = records(), DAMAGES[damage]
    rows[number][key] = value
    with pytest.raises(DataError, match="run: ") as caught:
        measured_run(rows, where="run")
    assert caught.value.hint


@pytest.mark.parametrize(
    "key", ["method", "schedule", "accumulation", "replicas", "steps_per_epoch", "stages"]
)
def test_a_plan_without_a_key_is_told(key: str) -> None:
    rows = json.loads(json.dumps(records()))
    del rows[0][key]
    with pytest.raises(DataError, match="damaged"):
        measured_run(rows, where="run")
