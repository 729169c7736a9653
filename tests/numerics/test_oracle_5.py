"""Oracle 5: PETRA is what its equations say, step by step, through a drain.

Delayed with kept inputs is compared with the same simulation, in which no unit rebuilds its input.
"""

import pytest
from oracle_cases import geometry
from oracle_nets import Trace, case_id, cases, compare, epochs, make_net, run_engine
from oracle_references import train_by_petra

from petractl.methods.keeping import InputKeeper, Reconstructor

TOLERANCE = 1e-11


def simulate(stages: int, k: int, schedule: str | list[int], *, net: str = "revnet18", **options) -> Trace:
    return train_by_petra(make_net(net), epochs(stages), k=k, **geometry(stages, schedule), **options)


def engine(stages: int, k: int, schedule: str | list[int], *, net: str = "revnet18", **options) -> Trace:
    return run_engine(make_net(net), epochs(stages), stages=stages, k=k, schedule=schedule, **options)


@pytest.mark.parametrize(("stages", "k", "schedule"), cases(), ids=case_id)
def test_petra_equals_its_equations(stages, k, schedule):
    compare(engine(stages, k, schedule, method="petra"), simulate(stages, k, schedule), tolerance=TOLERANCE)


@pytest.mark.parametrize(("stages", "k", "schedule"), cases(), ids=case_id)
def test_delayed_with_inputs_equals_its_equations(stages, k, schedule):
    expected = simulate(stages, k, schedule, reversible=False)
    compare(engine(stages, k, schedule, method="delayed", keep="inputs"), expected)


@pytest.mark.parametrize(("stages", "k", "schedule"), cases([3], [2]), ids=case_id)
def test_a_fully_reversible_net(stages, k, schedule):
    actual = engine(stages, k, schedule, net="revnet-iso", method="petra")
    compare(actual, simulate(stages, k, schedule, net="revnet-iso"), tolerance=TOLERANCE)


@pytest.mark.parametrize(("stages", "k", "schedule"), cases([3], [2]), ids=case_id)
def test_without_reversible_units_petra_is_delayed_with_inputs(stages, k, schedule):
    actual = engine(stages, k, schedule, net="resnet18", method="petra")
    compare(actual, simulate(stages, k, schedule, net="resnet18"))


@pytest.mark.parametrize(("stages", "k", "schedule"), cases([3], [2]), ids=case_id)
def test_statistics_gathered_in_the_forward(stages, k, schedule):
    actual = engine(stages, k, schedule, method="petra", statistics_in_forward=True)
    compare(actual, simulate(stages, k, schedule, statistics_in_forward=True), tolerance=TOLERANCE)


def test_the_parameters_of_the_forward_are_detected():
    """Rebuilding with the forward's parameters is another method."""
    with pytest.raises(AssertionError, match="relative error"):
        compare(
            engine(3, 2, "tight", method="delayed", keep="parameters"),
            simulate(3, 2, "tight"),
            tolerance=TOLERANCE,
        )


def test_kept_inputs_are_detected():
    with pytest.raises(AssertionError, match="relative error"):
        compare(
            engine(3, 2, "tight", method="delayed", keep="inputs"),
            simulate(3, 2, "tight"),
            tolerance=TOLERANCE,
        )


@pytest.mark.parametrize("wrong", [[2, 2, 0], [3, 1, 0], [1, 1, 0]], ids=case_id)
def test_a_schedule_off_by_one_is_detected(wrong):
    with pytest.raises(AssertionError, match="relative error"):
        compare(engine(3, 1, wrong, method="petra"), simulate(3, 1, "tight"), tolerance=TOLERANCE)


@pytest.mark.parametrize("keeper", [InputKeeper, Reconstructor])
def test_statistics_that_follow_both_evaluations_are_detected(keeper, monkeypatch):
    def forward(self, inputs, *, microbatch, parameters):
        outputs = self.evaluator.plain(inputs, microbatch=microbatch, live=True, parameters=parameters)
        return outputs, inputs

    monkeypatch.setattr(keeper, "forward", forward)
    with pytest.raises(AssertionError, match=r"relative error .* in .*(running|num_batches)"):
        compare(engine(3, 2, "tight", method="petra"), simulate(3, 2, "tight"), tolerance=TOLERANCE)
