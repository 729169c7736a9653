"""Oracle 2: reversible backprop is backprop: to 1e-10 in float64, to 1e-4 per tensor in float32."""

import pytest
import torch
from oracle_nets import assert_close, epochs, make_net, microbatches, run_engine, sgd_at_rest
from oracle_references import train_plainly

from petractl.models.units import Coupling, Reconstruction

DEPTHS = [1, 16, 50]


def gradients_of_both(network, data, *, J=1, k=1, cuts=None):
    actual = run_engine(
        network,
        data,
        J=J,
        k=k,
        schedule="sequential",
        method="reversible",
        optimizer=sgd_at_rest,
        cuts=cuts,
    )
    expected = train_plainly(network, data, k=k, optimizer=sgd_at_rest)
    assert len(actual.gradients) == len(expected.gradients) > 0
    return zip(actual.gradients, expected.gradients, strict=True)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("J", [1, 2, 3, 10])
def test_reversible_equals_backprop(J, k):
    for ours, theirs in gradients_of_both(make_net(), epochs(J), J=J, k=k):
        assert_close(ours, theirs, tolerance=1e-10)


@pytest.mark.parametrize("depth", DEPTHS)
def test_reversible_equals_backprop_at_any_depth(depth):
    network = make_net("revnet-iso", depth=depth, width=4)
    data = [microbatches(2, size=8, side=8)]
    for ours, theirs in gradients_of_both(network, data, J=2, cuts=[1 + depth // 2]):
        assert_close(ours, theirs, tolerance=1e-10)


@pytest.mark.parametrize("depth", DEPTHS)
def test_reversible_equals_backprop_in_single_precision(depth):
    network = make_net("revnet-iso", depth=depth, width=4, dtype=torch.float32)
    data = [microbatches(2, size=8, side=8, dtype=torch.float32)]
    for ours, theirs in gradients_of_both(network, data, J=2, cuts=[1 + depth // 2]):
        assert_close(ours, theirs, tolerance=1e-4)


def test_training_stays_on_backprops_path():
    """With a learning rate, too: the locked methods have no delay, so the errors stay at rounding."""
    options = {"J": 3, "k": 2, "schedule": "sequential", "method": "reversible"}
    actual = run_engine(make_net(), epochs(3), **options)
    expected = train_plainly(make_net(), epochs(3), k=2)
    assert_close(actual.parameters[-1], expected.parameters[-1], tolerance=1e-9)


def test_a_reconstruction_without_the_carried_gradient_is_detected(monkeypatch):
    right = Coupling.reconstruct

    def wrong(self, *outputs):
        rebuilt = right(self, *outputs)
        return Reconstruction(
            rebuilt.inputs,
            lambda gradients, parameters: rebuilt.vjp(
                (gradients[0], torch.zeros_like(gradients[1])), parameters
            ),
        )

    monkeypatch.setattr(Coupling, "reconstruct", wrong)
    with pytest.raises(AssertionError, match="relative error"):
        for ours, theirs in gradients_of_both(make_net(), epochs(3), J=3):
            assert_close(ours, theirs, tolerance=1e-10)


def test_a_slightly_wrong_reconstruction_is_detected(monkeypatch):
    """An error of 1e-7 of the rebuilt input, float32's rounding, is far above the tolerance."""
    right = Coupling.reconstruct

    def wrong(self, *outputs):
        rebuilt = right(self, *outputs)
        return Reconstruction(tuple(x * (1 + 1e-7) for x in rebuilt.inputs), rebuilt.vjp)

    monkeypatch.setattr(Coupling, "reconstruct", wrong)
    with pytest.raises(AssertionError, match="relative error"):
        for ours, theirs in gradients_of_both(make_net(), epochs(3), J=3):
            assert_close(ours, theirs, tolerance=1e-10)
