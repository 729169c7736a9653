"""A run that goes on from a cut has the bits of one that was never cut, whatever was in flight."""

import copy
import itertools

import pytest
import torch
from small_nets import ALL_METHODS, inner, make_pipeline, make_stages, make_units, microbatches, tensors

from petractl.engine.cut import SAVE, STOP, PendingCuts, StageCut, recorded_state, restore_recorded
from petractl.engine.schedule import Stretch
from petractl.engine.tensor_tree import put_together, taken_apart
from petractl.errors import Stopped
from petractl.methods.family import method_spec

COUNT, OFFSET = 8, 20
CPU = torch.device("cpu")


def written(value):
    """Return a tree as it comes back from a file: other memory, no strides but the described ones."""
    found, described = taken_apart(value, name="x")
    return put_together(described, {key: t.contiguous().clone() for key, t in found.items()}, device=CPU)


class Recorder:
    """A cutter that keeps what it is given; `wanted` maps microbatches to flags."""

    def __init__(self, wanted):
        self.wanted, self.parts, self.heard = wanted, {}, []

    def decide(self, microbatch):
        return self.wanted.get(microbatch, 0)

    def before_update(self, microbatch):
        self.heard.append(("before", microbatch))

    def after_update(self, microbatch):
        self.heard.append(("after", microbatch))

    def take(self, stage, cut):
        parameters = [p for group in stage.updater.optimizer.param_groups for p in group["params"]]
        tree = {
            "state": cut.state,
            "sent": [[list(m.streams), m.labels, m.microbatch] for m in cut.sent],
            "recorded": recorded_state(stage),
            "optimizer": [stage.updater.optimizer.state[p].get("momentum_buffer") for p in parameters],
            "gradients": [p.grad for p in parameters],
            "units": [[*k.evaluator.unit.state_dict().values()] for k in stage.keepers],
        }
        self.parts.setdefault(cut.microbatch, {})[stage.index] = (cut, copy.deepcopy(written(tree)))


def restored(parts, stages):
    """Put all that a cutter was given into new stages; returns the cuts for the pipeline."""
    from petractl.engine.messages import Activation

    cuts = []
    for stage in stages:
        cut, tree = parts[stage.index]
        for keeper, values in zip(stage.keepers, tree["units"], strict=True):
            names = keeper.evaluator.unit.state_dict().keys()
            keeper.evaluator.unit.load_state_dict(dict(zip(names, values, strict=True)))
        optimizer = stage.updater.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p, momentum, gradient in zip(parameters, tree["optimizer"], tree["gradients"], strict=True):
            p.grad = gradient
            if momentum is not None:
                optimizer.state[p]["momentum_buffer"] = momentum
        restore_recorded(stage, tree["recorded"])
        sent = tuple(Activation(m, tuple(streams), labels) for streams, labels, m in tree["sent"])
        cuts.append(StageCut(stage.index, cut.microbatch, cut.flags, sent, tree["state"]))
    return cuts


def fresh(method, keep, schedule, k, *, seed=0):
    units = make_units(lambda: inner(dropout=0.3), seed=seed)
    stages = make_stages(units, method, keep)
    return units, stages, make_pipeline(stages, k=k, schedule=schedule)


def everything(units, stages):
    state = [
        (stage.counters, stage.totals.samples, float(stage.totals.loss or 0), int(stage.totals.correct or 0))
        for stage in stages
    ]
    return tensors(units), state


def assert_equal(actual, expected):
    assert actual[1] == expected[1]
    assert all(torch.equal(actual[0][name], value) for name, value in expected[0].items())


SCHEDULES = ["tight", "paper", [5, 1, 1, 0], "sequential"]


@pytest.mark.parametrize(("method", "keep"), ALL_METHODS)
@pytest.mark.parametrize("k", [1, 3])
def test_a_run_that_goes_on_from_any_cut_has_the_same_bits(method, keep, k):
    schedules = ["sequential"] if method_spec(method, keep=keep).locked else SCHEDULES
    for schedule in schedules:
        data = microbatches(COUNT)
        units, stages, pipeline = fresh(method, keep, schedule, k)
        recorder = Recorder(dict.fromkeys(range(COUNT), SAVE))
        pipeline.train(iter(data), num_microbatches=COUNT, offset=OFFSET, cutter=recorder)
        expected = everything(units, stages)
        assert sorted(recorder.parts) == list(range(COUNT)), "every cut is taken"
        for m, parts in recorder.parts.items():
            units, stages, pipeline = fresh(method, keep, schedule, k, seed=9)
            stretch = Stretch(after=m)
            pipeline.resume(restored(parts, stages), offset=OFFSET)
            entered = pipeline.entered(stretch, num_microbatches=COUNT)
            rest = itertools.islice(data, entered, None)
            pipeline.train(rest, num_microbatches=COUNT, offset=OFFSET, stretch=stretch)
            assert_equal(everything(units, stages), expected)


def test_being_cut_changes_nothing():
    results = []
    for wanted in ({}, dict.fromkeys(range(COUNT), SAVE)):
        units, stages, pipeline = fresh("delayed", "graph", "tight", 2)
        recorder = Recorder(wanted)
        pipeline.train(iter(microbatches(COUNT)), num_microbatches=COUNT, cutter=recorder)
        results.append(everything(units, stages))
    assert_equal(*results)


@pytest.mark.parametrize(("method", "keep"), [("petra", ""), ("delayed", "graph"), ("delayed", "parameters")])
def test_a_run_that_was_resumed_can_be_cut_and_resumed_again(method, keep):
    data = microbatches(COUNT)
    units, stages, pipeline = fresh(method, keep, "paper", 2)
    pipeline.train(iter(data), num_microbatches=COUNT, cutter=Recorder({}))
    expected = everything(units, stages)
    units, stages, pipeline = fresh(method, keep, "paper", 2)
    after, entered = None, 0
    for m in (1, 2, 5):
        # Only a microbatch that has not entered can be decided on: later ones stand in for it.
        recorder = Recorder({max(m, entered): SAVE | STOP})
        stretch = Stretch(after=after)
        with pytest.raises(Stopped):
            pipeline.train(
                itertools.islice(data, entered, None),
                num_microbatches=COUNT,
                stretch=stretch,
                cutter=recorder,
            )
        ((after, parts),) = recorder.parts.items()
        units, stages, pipeline = fresh(method, keep, "paper", 2, seed=after)
        pipeline.resume(restored(parts, stages), offset=0)
        entered = pipeline.entered(Stretch(after=after), num_microbatches=COUNT)
        if entered == COUNT:
            break
    pipeline.train(
        itertools.islice(data, entered, None), num_microbatches=COUNT, stretch=Stretch(after=after)
    )
    assert_equal(everything(units, stages), expected)


def test_stopped_stages_do_nothing_after_the_cut():
    _, stages, pipeline = fresh("petra", "", "tight", 2)
    with pytest.raises(Stopped):
        pipeline.train(iter(microbatches(COUNT)), num_microbatches=COUNT, cutter=Recorder({3: SAVE | STOP}))
    assert [stage.counters.backwards for stage in stages] == [4, 4, 4, 4]
    assert [stage.counters.updates for stage in stages] == [2, 2, 2, 2]


@pytest.mark.parametrize("k", [1, 3])
def test_a_drained_stretch_and_another_partition_go_on_from_the_same_weights(k):
    """After a cut the old partition is drained; what then runs is what begins at that microbatch."""
    data, m = microbatches(COUNT), 2
    units, stages, pipeline = fresh("petra", "", "tight", k)
    recorder = Recorder({m: SAVE | STOP})
    with pytest.raises(Stopped):
        pipeline.train(iter(data), num_microbatches=COUNT, cutter=recorder)
    units, stages, pipeline = fresh("petra", "", "tight", k, seed=3)
    pipeline.resume(restored(recorder.parts[m], stages), offset=0)
    entered = pipeline.entered(Stretch(after=m), num_microbatches=COUNT)
    assert entered == m + 1 + 3, "three forwards ahead"
    pipeline.train(iter([]), num_microbatches=COUNT, stretch=Stretch(after=m, until=entered))
    assert [stage.counters.backwards for stage in stages] == [entered] * 4
    assert [stage.counters.updates for stage in stages] == [entered // k] * 4
    assert not any(stage.counters.partial_groups for stage in stages), "an open group is not closed"
    gradients = [p.grad is not None for unit in units for p in unit.parameters()]
    assert all(gradients) == bool(entered % k)
    other = make_stages(units, "petra", cuts=[4])
    for stage in other:
        stage.resume_group({"microbatches": entered % k, "samples": 5 * (entered % k)})
        stage.counters = copy.copy(stages[0].counters)
    again = make_pipeline(other, k=k)
    again.train(itertools.islice(data, entered, None), num_microbatches=COUNT, stretch=Stretch(first=entered))
    assert {stage.counters.backwards for stage in other} == {COUNT}
    assert {stage.counters.updates for stage in other} == {-(-COUNT // k)}


def test_the_messages_on_their_way_are_those_between_two_stages_at_the_cut():
    pipeline = fresh("petra", "", [5, 1, 1, 0], 1)[2]
    recorder = Recorder({1: SAVE})
    pipeline.train(iter(microbatches(COUNT)), num_microbatches=COUNT, cutter=recorder)
    on_their_way = {j: [m.microbatch for m in cut.sent] for j, (cut, _) in recorder.parts[1].items()}
    assert on_their_way == {0: [3, 4, 5, 6], 1: [], 2: [2], 3: []}
    in_flight = {j: sorted(map(int, cut.state["flights"])) for j, (cut, _) in recorder.parts[1].items()}
    assert in_flight == {0: [2, 3, 4, 5, 6], 1: [2], 2: [2], 3: []}
    assert all(m.cut == 0 for cut, _ in recorder.parts[1].values() for m in cut.sent)


def test_the_first_stage_tells_before_and_after_each_update():
    pipeline = fresh("petra", "", "tight", 3)[2]
    recorder = Recorder({})
    pipeline.train(iter(microbatches(COUNT)), num_microbatches=COUNT, cutter=recorder)
    assert recorder.heard == [(when, m) for m in (2, 5, 7) for when in ("before", "after")]


def test_no_cut_is_pending_that_was_not_heard_of():
    cuts = PendingCuts(lookahead_above=0, num_microbatches=4, accumulation=1)
    cuts.hear(1, 0)
    assert not cuts._flags
