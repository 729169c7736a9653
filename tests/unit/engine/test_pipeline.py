"""The in-process engine: nothing is dropped, nothing is left, and the order of the sweep changes nothing."""

import random

import pytest
import torch
from small_nets import (
    ALL_METHODS,
    make_pipeline,
    make_stages,
    make_units,
    microbatches,
    sgd_updater,
    tensors,
    train,
)
from torch import nn

from petractl.engine.messages import Activation
from petractl.engine.schedule import (
    Kind,
    group_size,
    lookaheads,
    num_updates,
    operations,
    updates_seen_by_backward,
    updates_seen_by_forward,
)
from petractl.engine.update import Updater
from petractl.errors import RunError, UserError

SCHEDULES = ["tight", "paper", "sequential", [5, 1, 1, 0]]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(("method", "keep"), ALL_METHODS)
def test_counters_prove_that_nothing_was_dropped(method, keep, k, schedule):
    stages = make_stages(make_units(), method, keep)
    pipeline = make_pipeline(stages, k=k, schedule=schedule)
    counts, done = [7, 1, 4], []
    for count in counts:
        data = iter(microbatches(count + 2))
        pipeline.train(data, num_microbatches=count, offset=sum(done))
        assert len(list(data)) == 2, "the source is read no further than asked"
        done.append(count)
        for stage in stages:
            assert stage.counters.forwards == stage.counters.backwards == sum(done)
            assert stage.microbatches_in_flight() == 0
    for stage in stages:
        assert stage.counters.updates == sum(num_updates(num_microbatches=c, accumulation=k) for c in counts)
        assert stage.counters.partial_groups == sum(c % k > 0 for c in counts)
    assert stages[-1].totals.samples == 5 * sum(counts)
    assert not any(seat.activations.ready() or seat.gradients.ready() for seat in pipeline._seats)


def test_an_epoch_of_nothing():
    units = make_units()
    before = tensors(units)
    train(units, "petra", count=0)
    assert all(torch.equal(value, before[name]) for name, value in tensors(units).items())


def test_a_microbatch_is_reported_after_its_backward():
    stages = make_stages(make_units(), "petra")
    seen = []

    def report(i: int) -> None:
        seen.append((i, stages[-1].counters.backwards))

    pipeline = make_pipeline(stages)
    pipeline.train(iter(microbatches(4)), num_microbatches=4, on_microbatch=report)
    assert seen == [(0, 1), (1, 2), (2, 3), (3, 4)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_in_flight_are_at_most_one_more_than_the_lookahead(schedule):
    stages = make_stages(make_units(), "petra")
    pipeline = make_pipeline(stages, schedule=schedule)
    most = [0] * len(stages)

    def look(_: int) -> None:
        for j, stage in enumerate(stages):
            most[j] = max(most[j], stage.microbatches_in_flight())

    pipeline.train(iter(microbatches(9)), num_microbatches=9, on_microbatch=look)
    assert most[-1] == 0
    for w, held in zip(pipeline.lookahead[:-1], most[:-1], strict=True):
        assert w <= held <= w + 1


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_updates_are_told_their_delay_and_position(schedule, k):
    told: dict[int, list[tuple[int, int]]] = {}

    class Spy(Updater):
        def __init__(self, named):
            super().__init__(sgd_updater(named).optimizer, learning_rate=lambda _: 0.1)
            self.told = told.setdefault(len(told), [])

        def step(self, *, delay, position):
            self.told.append((delay, position))
            super().step(delay=delay, position=position)

    pipeline = make_pipeline(make_stages(make_units(), "petra", make_updater=Spy), k=k, schedule=schedule)
    for _ in range(2):
        pipeline.train(iter(microbatches(7)), num_microbatches=7)
    ends = [i for i in range(7) if (i + 1) % k == 0 or i == 6]
    for j, w in enumerate(pipeline.lookahead):
        delays = [
            updates_seen_by_backward(i, accumulation=k)
            - updates_seen_by_forward(i, lookahead=w, accumulation=k)
            for i in ends
        ]
        assert told[j] == list(zip(delays * 2, range(2 * len(ends)), strict=True))


def drive(stages, data, *, k, lookahead, choose) -> None:
    """Execute the lists of operations in any order that the messages allow; `choose` picks the stage."""
    lists = [list(x) for x in operations(lookahead=lookahead, num_microbatches=len(data), accumulation=k)]
    up, down = [{} for _ in stages], [{} for _ in stages]
    up[0] = {i: Activation(i, (x,), y) for i, (x, y) in enumerate(data)}
    while any(lists):
        able = [
            j
            for j, todo in enumerate(lists)
            if todo
            and (
                todo[0].kind is Kind.UPDATE
                or todo[0].microbatch in (down[j] if todo[0].kind is Kind.BACKWARD else up[j])
            )
        ]
        j = choose(able)
        o = lists[j].pop(0)
        i = o.microbatch
        size = group_size(i, num_microbatches=len(data), accumulation=k)
        if o.kind is Kind.UPDATE:
            stages[j].update(partial=size < k)
        elif o.kind is Kind.FORWARD:
            up[j + 1][i] = stages[j].forward(up[j].pop(i))
        else:
            run = stages[j].backward if o.kind is Kind.BACKWARD else stages[j].forward_backward
            message = run((down if o.kind is Kind.BACKWARD else up)[j].pop(i), group_size=size)
            if j > 0:
                down[j - 1][i] = message


@pytest.mark.parametrize(("method", "keep"), ALL_METHODS)
@pytest.mark.parametrize("choose", [min, max, random.Random(0).choice], ids=["lowest", "highest", "random"])
def test_the_result_depends_on_the_lists_alone(choose, method, keep):
    """Slow and fast stages, in any order: the same bits."""
    data = microbatches(7)
    ours, theirs = make_units(), make_units()
    make_pipeline(make_stages(ours, method, keep), k=2).train(iter(data), num_microbatches=7)
    stages = make_stages(theirs, method, keep)
    drive(stages, data, k=2, lookahead=lookaheads("tight", num_stages=4), choose=choose)
    expected = tensors(ours)
    assert all(torch.equal(value, expected[name]) for name, value in tensors(theirs).items())


@pytest.mark.parametrize(("method", "keep"), [("backprop", ""), ("reversible", "")])
def test_locked_methods_give_the_same_bits_whatever_the_partition(method, keep):
    results = []
    for cuts in ([], [1], [3], [1, 3, 5], [1, 2, 3, 4, 5, 6]):
        units = make_units()
        train(units, method, keep, k=2, cuts=cuts)
        results.append(tensors(units))
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_the_second_epoch_knows_how_many_microbatches_came_before():
    """In-unit randomness counts from the start of training: another epoch draws other numbers."""
    torch.manual_seed(0)
    units = [nn.Linear(6, 4).double(), nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).double()]
    stages = make_stages(units, "delayed", "inputs", cuts=[1], make_updater=lambda n: sgd_updater(n, lr=0.0))
    pipeline = make_pipeline(stages)
    losses = []
    for offset in (0, 1, 0):
        stages[-1].totals.loss = None
        pipeline.train(iter(microbatches(1)), num_microbatches=1, offset=offset)
        losses.append(float(stages[-1].totals.loss))
    assert losses[0] == losses[2] != losses[1]


def test_stages_and_lookahead_must_match():
    with pytest.raises(AssertionError):
        make_pipeline(make_stages(make_units(), "petra")).__class__(
            make_stages(make_units(), "petra"), lookahead=(1, 0), accumulation=1
        )


def test_a_source_that_ends_too_early_is_an_error_that_says_so():
    """StopIteration would end a caller's loop over a generator as if all were well."""
    pipeline = make_pipeline(make_stages(make_units(), "petra"))
    with pytest.raises((RunError, UserError), match="microbatch"):
        pipeline.train(iter(microbatches(2)), num_microbatches=3)
