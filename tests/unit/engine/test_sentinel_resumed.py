"""A sentinel that goes on in the middle of an epoch counts on."""

import torch
from small_nets import make_stages, make_units

from petractl.engine.numbers import Numbers
from petractl.engine.sentinel import Kind, Place


def numbers(stages):
    return Numbers(stages, device=torch.device("cpu"), skips=True, drift_every=0, drift_limit=1.0)


def test_what_was_left_out_before_a_cut_is_counted_after_it():
    before = make_stages(make_units(), "petra")
    numbers(before)
    assert [stage.sentinel.suspended() for stage in before] == [None] * 4
    place = Place(1, 2, "Coupling", Kind.ACTIVATION, 17)
    before[1].sentinel._skipped, before[1].sentinel._first = 3, place
    after = make_stages(make_units(), "petra")
    watched = numbers(after)
    watched.resume({1: before[1].sentinel.suspended()})
    (skipped,) = watched.findings(replica=0).skipped
    assert (skipped.stage, skipped.count, skipped.first) == (1, 3, place)
