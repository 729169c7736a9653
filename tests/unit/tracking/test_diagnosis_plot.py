import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from tracking_events import make_end, make_run

from petractl.errors import DataError
from petractl.events import Event, EventBus, GradientsDiagnosed, RunFailed, RunInterrupted, as_record
from petractl.tracking.diagnosis_plot import (
    MAX_COLUMNS,
    DiagnosisPlotter,
    diagnoses_of,
    plot_diagnoses,
)
from petractl.tracking.journal import Journal, read_journal
from petractl.tracking.mlflow_metrics import metric_points


def diagnosed(stage: int, microbatch: int, *, cosine: float | None = 0.9, **others) -> GradientsDiagnosed:
    return GradientsDiagnosed(
        epoch=1,
        update=microbatch // 2,
        stage=stage,
        microbatch=microbatch,
        delay_updates=1 - stage,
        cosine=cosine,
        norm_ratio=1.1,
        cosine_forward=0.95,
        norm_ratio_forward=0.9,
        delayed_cosine=0.8,
        delayed_norm_ratio=1.2,
        **others,
    )


def write(run_dir: Path, events: list[Event], *others) -> None:
    bus = EventBus()
    for listener in (Journal(run_dir), *others):
        bus.subscribe(listener)
    for event in events:
        bus.emit(event)
    bus.close()


def columns(events: list[Event]):
    return diagnoses_of(as_record(event, time=0.0) for event in events)


@pytest.mark.parametrize("end", [make_end(), RunInterrupted(2, "petractl resume x"), RunFailed("no memory")])
def test_the_heat_maps_are_drawn_when_a_run_ends_however_it_ends(run_dir, end):
    found = [diagnosed(stage, i, reconstruction_error=0.1) for i in (4, 9) for stage in (0, 1)]
    write(run_dir, [*make_run(run_dir), *found], DiagnosisPlotter(run_dir))
    assert not (run_dir / "plots").exists()
    write(run_dir, [end], DiagnosisPlotter(run_dir))
    picture = matplotlib.image.imread(run_dir / "plots" / "diagnosis.png")
    assert np.unique(picture.reshape(-1, picture.shape[2]), axis=0).shape[0] > 50


def test_nothing_is_drawn_where_nothing_was_diagnosed(run_dir):
    write(run_dir, [*make_run(run_dir)])
    assert plot_diagnoses(run_dir) is None
    with pytest.raises(DataError):
        plot_diagnoses(run_dir / "nothing")


def test_values_by_stage_and_update(run_dir):
    write(
        run_dir, [*make_run(run_dir), *(diagnosed(j, i, cosine=j + i / 10) for j in (1, 0) for i in (9, 4))]
    )
    found = diagnoses_of(read_journal(run_dir))
    assert found.title == "digits_revnet18: revnet18 on digits by petra"
    assert found.stages == (0, 1)
    assert found.updates == (2, 4)
    assert found.values["cosine"] == [[0.4, 0.9], [1.4, 1.9]]
    assert not found.has("reconstruction_error")
    assert not found.has("guess_cosine")


def test_a_microbatch_diagnosed_again_counts_as_it_was_last():
    assert columns([diagnosed(0, 4, cosine=0.1), diagnosed(0, 4, cosine=0.7)]).values["cosine"] == [[0.7]]


def test_what_is_undefined_is_left_out_of_a_mean():
    events = [diagnosed(0, i, cosine=None if i % 2 else 0.5) for i in range(4 * MAX_COLUMNS)]
    found = columns(events)
    assert len(found.updates) == MAX_COLUMNS
    assert found.updates[-1] == (4 * MAX_COLUMNS - 1) // 2
    assert set(found.values["cosine"][0]) == {0.5}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("cosine", "ratio", "error"),
    [
        (None, None, None),
        (math.nan, math.inf, math.nan),
        (-1.0, 0.0, 0.0),
        (1.0, 1.0, 1e-7),
        (0.5, 1e9, 1e3),
    ],
)
def test_values_that_are_not_finite_or_span_decades_are_drawn(run_dir, cosine, ratio, error):
    values = {"norm_ratio": ratio, "guess_cosine": cosine, "guess_norm_ratio": ratio}
    values |= {"reconstruction_error": error, "cosine_forward": cosine, "norm_ratio_forward": ratio}
    record = as_record(diagnosed(0, 3), time=0.0)
    event = GradientsDiagnosed(**{k: v for k, v in (record | values).items() if k not in ("event", "time")})
    write(run_dir, [*make_run(run_dir), event])
    assert plot_diagnoses(run_dir) is not None


def test_mlflow_has_every_value_that_is_defined_by_stage_and_update():
    event = diagnosed(7, 9, cosine=None, reconstruction_error=0.25)
    points = metric_points(as_record(event, time=2.0))
    assert {point.key: point.value for point in points} == {
        "diagnosis/norm_ratio/stage_07": 1.1,
        "diagnosis/cosine_forward/stage_07": 0.95,
        "diagnosis/norm_ratio_forward/stage_07": 0.9,
        "diagnosis/delayed_cosine/stage_07": 0.8,
        "diagnosis/delayed_norm_ratio/stage_07": 1.2,
        "diagnosis/reconstruction_error/stage_07": 0.25,
    }
    assert {(point.step, point.time_ms) for point in points} == {(4, 2000)}
