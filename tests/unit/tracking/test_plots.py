import math

import matplotlib.image
import numpy as np
import pytest
from tracking_events import make_end, make_run

from petractl.errors import DataError
from petractl.events import EpochTrained, Evaluated, EventBus, RunInterrupted
from petractl.tracking.journal import Journal, read_journal
from petractl.tracking.plots import CurvePlotter, curves_of, plot_curves, spread


def write(run_dir, events, *others):
    bus = EventBus()
    for listener in (Journal(run_dir), *others):
        bus.subscribe(listener)
    for event in events:
        bus.emit(event)
    bus.close()


def test_curves_are_a_picture_in_the_run_folder(run_dir):
    write(run_dir, make_run(run_dir))
    path = plot_curves(run_dir)
    assert path == run_dir / "plots" / "curves.png"
    picture = matplotlib.image.imread(path)
    assert picture.shape[:2] == (720, 1200)
    assert np.unique(picture.reshape(-1, picture.shape[2]), axis=0).shape[0] > 50


@pytest.mark.parametrize("end", [make_end(), RunInterrupted(2, "petractl resume x")])
def test_the_plotter_draws_when_the_run_ends(run_dir, end):
    write(run_dir, [*make_run(run_dir)], CurvePlotter(run_dir))
    assert not (run_dir / "plots").exists()
    write(run_dir, [end], CurvePlotter(run_dir))
    assert (run_dir / "plots" / "curves.png").is_file()


def test_nothing_is_drawn_before_an_epoch_is_trained(run_dir):
    write(run_dir, [*make_run(run_dir)][:3])
    assert plot_curves(run_dir) is None
    with pytest.raises(DataError):
        plot_curves(run_dir / "nothing")


def test_curves_hold_train_and_test_and_the_later_of_two_equal_epochs(run_dir):
    again = [
        EpochTrained(2, 0.25, 99.0, 1437, 5000.0, 0.3, 0.01, 24),
        Evaluated(2, 0.5, 98.0, 100.0, 360, 0.1),
    ]
    write(run_dir, [*make_run(run_dir, evaluate_every=2), *again])
    curves = curves_of(read_journal(run_dir))
    assert curves.title == "digits_revnet18: revnet18 on digits by petra"
    assert [curve.label for curve in curves.loss] == ["train", "test"]
    assert curves.loss[0].epochs == (1, 2, 3)
    assert curves.loss[0].values == (1.0, 0.25, 1.0 / 3)
    assert curves.top1[1].epochs == (2,)
    assert curves.top1[1].values == (98.0,)
    assert curves.lr.values == (0.05, 0.01, 0.05)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("losses", [[math.nan], [2.0, math.inf, math.nan], [0.0, 0.0], [2.0, 1e-6]])
def test_losses_that_are_not_finite_or_span_decades_are_drawn(run_dir, losses):
    events = []
    for epoch, loss in enumerate(losses, start=1):
        events += [
            EpochTrained(epoch, loss, loss, 10, 1.0, 1.0, 0.0, epoch),
            Evaluated(epoch, loss, loss, loss, 5, 0.1),
        ]
    write(run_dir, events)
    assert plot_curves(run_dir) is not None


def test_labels_are_spread_without_moving_those_far_apart():
    assert spread([0.0, 100.0], least=10.0) == [0.0, 100.0]
    assert spread([50.0, 50.0], least=10.0) == [45.0, 55.0]
    assert spread([], least=10.0) == []
