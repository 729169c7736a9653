"""Oracle 7: at a learning rate of 0, running statistics after an epoch are plain training's.

The same bits where graph or inputs are kept, float tolerance where inputs are rebuilt; and also where the
forward gathers them (`bn_statistics = "forward"`), then to the bit for every method: a forward sees true
inputs.
"""

import pytest
import torch
from oracle_cases import AT_REST, EXACT, REBUILT, engine_at_rest, plain_at_rest
from oracle_nets import (
    Tensors,
    assert_close,
    assert_same_bits,
    case_id,
    cases,
    make_net,
    run_engine,
    sgd_at_rest,
    statistics,
)

from petractl.methods.keeping import InputKeeper


def assert_statistics(actual: Tensors, expected: Tensors, *, exact: bool) -> None:
    if exact:
        assert_same_bits(actual, expected)
    else:
        assert_close(actual, expected, tolerance=1e-10)
    counts = [b for name, b in expected.items() if name.endswith("num_batches_tracked")]
    assert counts
    assert len({int(count) for count in counts}) == 1


@pytest.mark.parametrize(("stages", "k", "schedule"), cases(), ids=case_id)
def test_statistics_follow_the_differentiated_evaluation(stages, k, schedule):
    expected = plain_at_rest(k).statistics
    for method, keep in EXACT + REBUILT:
        actual = engine_at_rest(stages, k, schedule, method=method, keep=keep)
        assert_statistics(actual.statistics, expected, exact=(method, keep) in EXACT)


@pytest.mark.parametrize(("stages", "k", "schedule"), cases(ks=[2]), ids=case_id)
def test_statistics_follow_the_forward(stages, k, schedule):
    expected = plain_at_rest(k).statistics
    for method, keep in EXACT + REBUILT:
        actual = engine_at_rest(stages, k, schedule, method=method, keep=keep, statistics_in_forward=True)
        assert_statistics(actual.statistics, expected, exact=True)


@pytest.mark.parametrize("method", ["backprop", "reversible"])
@pytest.mark.parametrize("stages", [1, 3])
def test_locked_methods(stages, method):
    actual = engine_at_rest(stages, 2, "sequential", method=method, keep="")
    assert_statistics(actual.statistics, plain_at_rest(2).statistics, exact=method == "backprop")


def test_the_statistics_change():
    start = statistics(make_net())
    assert all(not torch.equal(b, start[name]) for name, b in plain_at_rest(2).statistics.items())


@pytest.mark.parametrize("wrong", ["twice", "never"])
def test_statistics_updated_twice_or_never_are_detected(wrong, monkeypatch):
    right_forward, right_backward = InputKeeper.forward, InputKeeper.backward

    def forward(self, *arguments, **options):
        self._statistics_in_forward = wrong == "twice"
        return right_forward(self, *arguments, **options)

    def backward(self, *arguments, **options):
        self._statistics_in_forward = wrong == "never"
        return right_backward(self, *arguments, **options)

    monkeypatch.setattr(InputKeeper, "forward", forward)
    monkeypatch.setattr(InputKeeper, "backward", backward)
    actual = run_engine(
        make_net(),
        AT_REST,
        stages=3,
        k=2,
        schedule="tight",
        method="delayed",
        keep="inputs",
        optimizer=sgd_at_rest,
    )
    with pytest.raises(AssertionError, match="other bits"):
        assert_statistics(actual.statistics, plain_at_rest(2).statistics, exact=True)
