"""Inputs that are rebuilt are compared with the true ones, on every stage alone, and too far off is told."""

import math

import pytest
import torch
from small_nets import make_pipeline, make_stages, make_units, microbatches, tensors
from torch import Tensor, nn

from petractl.engine.diagnosis import observe
from petractl.engine.drift import Drift, DriftWatch, watch_drift
from petractl.engine.numbers import Findings, Numbers
from petractl.engine.sentinel import Kind, Place, SkippedUpdates
from petractl.errors import RunError
from petractl.events import ReconstructionChecked, UpdatesSkipped, WarningRaised

CPU = torch.device("cpu")
COUNT = 6


class Rough(nn.Module):
    """An inner function that is another in the backward: what a unit rebuilds with it is wrong."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + (0.5 if torch.is_grad_enabled() else 0.0)


def watched(units: list[nn.Module], method: str = "petra", *, every: int = 1, schedule: str = "sequential"):
    stages = make_stages(units, method)
    watches = watch_drift(stages, every=every)
    make_pipeline(stages, schedule=schedule).train(iter(microbatches(COUNT)), num_microbatches=COUNT)
    return [watch.take() for watch in watches], watches


def test_where_nothing_is_updated_in_between_the_error_is_that_of_rounding() -> None:
    found, watches = watched(make_units(), "reversible", every=2)
    assert found[0] is None, "the stem rebuilds nothing"
    assert all(each.error < 1e-12 and each.checks == 3 for each in found[1:])
    assert all(watch.take() is None for watch in watches)


def test_updates_in_between_are_in_the_error() -> None:
    found, _ = watched(make_units(), schedule="tight")
    assert all(1e-6 < each.error < 1.0 for each in found[1:3])


def test_the_unit_that_rebuilds_worst_is_named() -> None:
    units = make_units()
    units[5].f = Rough(units[5].f)
    found, _ = watched(units)
    assert (found[3].stage, found[3].unit, found[3].name) == (3, 5, "Coupling")
    assert found[3].error > 0.1
    assert 0 <= found[3].microbatch < COUNT


def test_the_error_is_that_of_a_diagnosis() -> None:
    stages = make_stages(make_units(), "petra")
    diagnosed = {}
    observe(stages, every=3).report = lambda found: diagnosed.update({f.stage: f for f in found})
    watches = watch_drift(stages, every=3)
    make_pipeline(stages).train(iter(microbatches(3)), num_microbatches=3)
    for j, watch in enumerate(watches):
        errors = [e for e in diagnosed[j].reconstruction_errors if e is not None]
        found = watch.take()
        assert (found is None) == (not errors)
        if found is not None:
            # A watch looks at four of the five samples.
            assert found.error == pytest.approx(max(errors), rel=0.5, abs=1e-12)


def test_few_samples_are_kept_and_none_for_long() -> None:
    stage = make_stages(make_units(), "petra")[1]
    watch = DriftWatch(1, stage.evaluators, every=2)
    big = torch.ones(100, 3)
    watch.unit_inputs(1, 1, 0, (big, big))
    assert [x.shape[0] for x in watch._inputs[1, 0]] == [4, 4]
    watch.unit_gradients(1, 1, 0, [], inputs=(big * 1.1, big))
    assert not watch._inputs
    assert watch.take().error == pytest.approx(0.1 / math.sqrt(2), rel=1e-4)


def test_training_has_the_same_bits() -> None:
    plain, observed = make_units(), make_units()
    make_pipeline(make_stages(plain, "petra")).train(iter(microbatches(COUNT)), num_microbatches=COUNT)
    watched(observed, every=1, schedule="tight")
    for name, value in tensors(plain).items():
        assert torch.equal(value, tensors(observed)[name])


def numbers(*, limit: float = 1.0, skips: bool = False) -> Numbers:
    stages = make_stages(make_units(), "petra")
    return Numbers(stages, device=CPU, skips=skips, drift_every=2, drift_limit=limit)


def drift(error: float, stage: int = 1) -> Drift:
    return Drift(stage, 4, "block4", 17, error, 3)


def test_what_is_too_far_off_is_warned_of_once() -> None:
    watch = numbers(limit=0.2)
    found = [Findings(0, (), (drift(0.1), drift(0.3, 2))), Findings(1, (), (drift(0.25, 3),))]
    first = list(watch.events(5, found, updates=9))
    warnings = [event for event in first if isinstance(event, WarningRaised)]
    assert len(warnings) == 1
    assert "unit 4 (block4, stage 2)" in warnings[0].message
    assert "0.3" in warnings[0].message
    checked = [event for event in first if isinstance(event, ReconstructionChecked)]
    assert [(e.stage, e.replica, e.error, e.checks) for e in checked] == [
        (1, 0, 0.1, 3),
        (2, 0, 0.3, 3),
        (3, 1, 0.25, 3),
    ]
    assert not [e for e in watch.events(6, found, updates=9) if isinstance(e, WarningRaised)]


def test_what_is_not_a_number_is_the_worst() -> None:
    found = [Findings(0, (), (drift(5.0), drift(math.nan, 2)))]
    (warning,) = [e for e in numbers().events(1, found, updates=1) if isinstance(e, WarningRaised)]
    assert "stage 2" in warning.message
    assert "nan" in warning.message


def test_updates_that_were_left_out_are_counted_and_told_once() -> None:
    place = Place(2, 5, "block5", Kind.ACTIVATION, 31)
    found = [Findings(1, (SkippedUpdates(2, 3, place), SkippedUpdates(0, 1, None)), ())]
    watch = numbers()
    events = list(watch.events(4, found, updates=10))
    assert events[:2] == [
        UpdatesSkipped(4, 0, 1, 1, None, None, "", None),
        UpdatesSkipped(4, 2, 1, 3, "activation", 5, "block5", 31),
    ]
    assert "3 of 10 updates" in events[2].message
    assert "activation of unit 5 (block5), stage 2, microbatch 31" in events[2].message
    assert len(events) == 3
    assert len(list(watch.events(5, found, updates=10))) == 2


def test_a_stage_that_no_longer_updates_ends_the_run() -> None:
    found = [Findings(0, (SkippedUpdates(2, 10, Place(2, 5, "block5", Kind.GRADIENT, 31)),), ())]
    with pytest.raises(RunError, match="stage 2 has left out all 10 updates of epoch 4"):
        list(numbers().events(4, found, updates=10))


def test_what_the_stages_find_is_gathered() -> None:
    stages = make_stages(make_units(), "petra")
    watch = Numbers(stages, device=CPU, skips=True, drift_every=2, drift_limit=1.0)
    data = microbatches(COUNT)
    data[3][0][0, 0] = math.nan
    make_pipeline(stages).train(iter(data), num_microbatches=COUNT)
    watch.settle()
    found = watch.findings(replica=1)
    assert [(each.stage, each.count, each.first.microbatch) for each in found.skipped] == [
        (j, 1, 3) for j in range(4)
    ]
    assert found.skipped[0].first.kind is Kind.RECEIVED_ACTIVATION
    assert [each.stage for each in found.drifts] == [1, 2, 3]
    assert watch.findings(replica=1) == Findings(1, (), ())
