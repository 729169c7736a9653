"""Oracle 3: at a learning rate of 0 every delayed method gives backprop's averaged gradients at each update.

Same bits where graph or inputs are kept, oracle 2's tolerance where inputs are rebuilt.
"""

import pytest
from oracle_cases import AT_REST, EXACT, REBUILT, engine_at_rest, plain_at_rest
from oracle_nets import (
    Trace,
    adamw_at_rest,
    assert_close,
    assert_same_bits,
    case_id,
    cases,
    make_net,
    run_engine,
    sgd_at_rest,
)

from petractl.methods.keeping import InputKeeper


def assert_gradients(actual: Trace, expected: Trace, *, exact: bool) -> None:
    assert len(actual.gradients) == len(expected.gradients) > 0
    for ours, theirs in zip(actual.gradients, expected.gradients, strict=True):
        if exact:
            assert_same_bits(ours, theirs)
        else:
            assert_close(ours, theirs, tolerance=1e-10)


@pytest.mark.parametrize(("stages", "k", "schedule"), cases(), ids=case_id)
def test_delayed_methods_at_rest_give_backprops_gradients(stages, k, schedule):
    expected = plain_at_rest(k)
    for method, keep in EXACT + REBUILT:
        actual = engine_at_rest(stages, k, schedule, method=method, keep=keep)
        assert_gradients(actual, expected, exact=(method, keep) in EXACT)


@pytest.mark.parametrize(("stages", "k", "schedule"), cases([3], [2]), ids=case_id)
def test_adamw_at_rest(stages, k, schedule):
    for method, keep in EXACT + REBUILT:
        actual = engine_at_rest(stages, k, schedule, method=method, keep=keep, optimizer=adamw_at_rest)
        assert_gradients(actual, plain_at_rest(k), exact=(method, keep) in EXACT)


@pytest.mark.parametrize(("stages", "k", "schedule"), cases([3], [3]), ids=case_id)
def test_without_reversible_units_petra_is_exact_too(stages, k, schedule):
    expected = plain_at_rest(k, net="resnet18")
    for method, keep in [*EXACT, ("petra", "")]:
        actual = engine_at_rest(stages, k, schedule, method=method, keep=keep, net="resnet18")
        assert_gradients(actual, expected, exact=True)


@pytest.mark.parametrize(("stages", "k", "schedule"), cases([3], [2]), ids=case_id)
def test_a_fully_reversible_net(stages, k, schedule):
    expected = plain_at_rest(k, net="revnet-iso")
    for method, keep in EXACT + REBUILT:
        actual = engine_at_rest(stages, k, schedule, method=method, keep=keep, net="revnet-iso")
        assert_gradients(actual, expected, exact=(method, keep) in EXACT)


@pytest.mark.parametrize("optimizer", [sgd_at_rest, adamw_at_rest])
def test_nothing_moves_at_rest(optimizer):
    actual = engine_at_rest(3, 2, "paper", method="petra", keep="", optimizer=optimizer)
    start = {name: p.detach() for name, p in make_net().named_parameters()}
    for parameters in actual.parameters:
        assert_same_bits(parameters, start)


def test_an_input_of_another_microbatch_is_detected(monkeypatch):
    """Without a queue of kept inputs a backward finds the input of the latest forward."""
    right_forward, right_backward = InputKeeper.forward, InputKeeper.backward

    def forward(self, inputs, **options):
        self.latest = inputs
        return right_forward(self, inputs, **options)

    def backward(self, kept, *arguments, **options):
        return right_backward(self, self.latest, *arguments, **options)

    monkeypatch.setattr(InputKeeper, "forward", forward)
    monkeypatch.setattr(InputKeeper, "backward", backward)
    options = {"stages": 3, "k": 2, "schedule": "tight", "optimizer": sgd_at_rest}
    expected = plain_at_rest(2)
    delayed = run_engine(make_net(), AT_REST, method="delayed", keep="inputs", **options)
    with pytest.raises(AssertionError, match="other bits"):
        assert_gradients(delayed, expected, exact=True)
    petra = run_engine(make_net(), AT_REST, method="petra", **options)
    with pytest.raises(AssertionError, match="relative error"):
        assert_gradients(petra, expected, exact=False)
