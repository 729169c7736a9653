"""What the trainer tells of its data; what it computes is what the numerics tests are about."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from petractl import build
from petractl.data.encoded import BadSample
from petractl.engine.evaluation import Scores
from petractl.engine.trainer import Trainer, TrainingState
from petractl.engine.world import Alone
from petractl.errors import Stopped
from petractl.events import EpochTrained, Evaluated, Event, SamplesSkipped, StepsDone, WarningRaised
from petractl.recipe.load import load_recipe

RECIPE = """
[model]
name = "revnet18"
width = 2
[data]
name = "fake"
image_size = 8
fake_samples = 32
batch_size = 8
[method]
name = "petra"
[partition]
stages = 2
[engine]
device = "cpu"
"""


class Loader:
    """A loader that says that it was waited for, and that it left samples out."""

    def __init__(self, loader, *, wait_s, bad=()):
        self._loader, self._wait_s, self._bad = loader, wait_s, bad
        self.wait_s, self.start_s, self.skipped = 100.0, 100.0, []
        self.slow_hint, self.max_skipped = "set data.workers = 2", 100

    def epoch(self, epoch, *, start=0):
        self.skipped += self._bad
        for batch in self._loader.epoch(epoch, start=start):
            self.wait_s += self._wait_s
            self.start_s += self._wait_s if batch.index == 0 else 0.0
            yield batch


class Saver:
    """Saves nothing, and notes what it was asked for; stops once it was asked `stops_at` times."""

    def __init__(self, stops_at=None):
        self.epochs, self.trained, self.polls = [], [], 0
        self._stops_at, self._asked = stops_at, 0

    def begin(self, state):
        pass

    def poll(self):
        self.polls += 1

    def is_stopping(self):
        self._asked += 1
        return self._asked == self._stops_at

    def save_trained(self, state):
        self.trained.append(state)

    def is_due(self):
        return False

    def save_epoch(self, state, *, is_best, is_last, is_due):
        self.epochs.append((is_best, state.best_epoch, is_last))

    def decide(self, microbatch):
        return 0

    def before_update(self, microbatch):
        pass

    def after_update(self, microbatch):
        pass


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> build.Built:
    path = Path(tmp_path_factory.mktemp("recipe"), "recipe.toml")
    path.write_text(RECIPE)
    return build.build(build.check(load_recipe(str(path))))


def events_of(built, loader, *, epochs, evaluate=None, saver=None, world=None) -> list[Event]:
    events: list[Event] = []
    trainer = Trainer(
        pipeline=built.pipeline,
        world=world or built.world,
        training_data=loader,
        length=built.length,
        evaluate=evaluate or built.evaluate,
        placement=built.placement,
        epochs=epochs,
        evaluate_every=1,
        emit=events.append,
        saver=saver or Saver(),
    )
    trainer.run(TrainingState())
    return events


def test_waiting_for_data_is_told_and_warned_of_once(built):
    events = events_of(built, Loader(built.training_data, wait_s=30.0), epochs=3)
    trained = [event for event in events if isinstance(event, EpochTrained)]
    assert [round(e.data_wait_percent * e.seconds / 100.0) for e in trained] == [120, 120, 120]
    (warning,) = [event for event in events if isinstance(event, WarningRaised)]
    assert "of epoch 1 (90.0 s) was spent waiting for data" in warning.message
    assert warning.hint == "set data.workers = 2"


def test_a_long_epoch_is_warned_of_before_its_end(built, monkeypatch):
    monkeypatch.setattr("petractl.engine.trainer.PROGRESS_INTERVAL_S", 0.0)
    monkeypatch.setattr("petractl.engine.data_watch._EARLY_WARNING_S", 0.0)
    events = events_of(built, Loader(built.training_data, wait_s=30.0), epochs=2)
    told = [event for event in events if isinstance(event, EpochTrained | WarningRaised)]
    assert [event.name for event in told] == ["warning_raised", "epoch_trained", "epoch_trained"]
    assert "of epoch 1 so far (30.0 s)" in told[0].message


def test_fast_data_are_no_reason_to_warn(built):
    events = events_of(built, Loader(built.training_data, wait_s=0.0), epochs=1)
    assert not [event for event in events if isinstance(event, WarningRaised)]
    assert [event.data_wait_percent for event in events if isinstance(event, EpochTrained)] == [0.0]


def test_progress_tells_the_waiting_of_the_epoch_so_far(built, monkeypatch):
    monkeypatch.setattr("petractl.engine.trainer.PROGRESS_INTERVAL_S", 0.0)
    events = events_of(built, Loader(built.training_data, wait_s=30.0), epochs=1)
    steps = [event for event in events if isinstance(event, StepsDone)]
    assert len(steps) == 4
    assert all(event.data_wait_percent > 100.0 for event in steps)


def test_an_evaluation_of_nothing_is_no_best(built):
    scores = iter([Scores(math.nan, math.nan, math.nan, 0), Scores(1.0, 20.0, 50.0, 5)])
    saver = Saver()
    loader = Loader(built.training_data, wait_s=0.0)
    events_of(
        built,
        loader,
        epochs=2,
        evaluate=lambda is_stopping: next(scores),
        saver=saver,
    )
    assert saver.epochs == [(False, None, False), (True, 2, True)]
    assert saver.polls == 10, "after each microbatch and each epoch"


@pytest.mark.parametrize("asked", [3, 4])
def test_a_stop_after_training_or_in_evaluation_is_saved_as_trained(built, asked):
    """Each epoch asks once after training, and once for each batch, of which there is one, in evaluation."""
    saver = Saver(stops_at=asked)
    with pytest.raises(Stopped):
        events_of(built, Loader(built.training_data, wait_s=0.0), epochs=3, saver=saver)
    (state,) = saver.trained
    assert (state.epochs_done, state.microbatches_done, state.is_drained) == (1, 4, True)
    assert [is_last for *_, is_last in saver.epochs] == [False]


def test_a_process_stops_where_the_first_one_does(built):
    class Second(Alone):
        def share(self, value):
            return (True, False)

    saver = Saver()
    with pytest.raises(Stopped):
        events_of(built, Loader(built.training_data, wait_s=0.0), epochs=3, saver=saver, world=Second())
    assert [state.microbatches_done for state in saver.trained] == [4]


def test_samples_left_out_are_told_after_the_epoch_and_after_its_evaluation(built):
    loader = Loader(built.training_data, wait_s=0.0, bad=[BadSample("a.tar", "7", "no label")])

    def evaluate(is_stopping):
        loader.skipped.append(BadSample("b.tar", "1", "broken"))
        return built.evaluate(is_stopping)

    events = events_of(built, loader, epochs=2, evaluate=evaluate)
    skipped = [event for event in events if isinstance(event, SamplesSkipped)]
    train, val = SamplesSkipped(1, 1, ("a.tar: 7: no label",)), SamplesSkipped(1, 1, ("b.tar: 1: broken",))
    assert skipped == [train, val, replace(train, epoch=2), replace(val, epoch=2)]
    names = [event.name for event in events if isinstance(event, EpochTrained | SamplesSkipped | Evaluated)]
    assert names[:4] == ["epoch_trained", "samples_skipped", "evaluated", "samples_skipped"]
