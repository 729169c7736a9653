"""Oracle 2: reversible backprop is backprop: to 1e-10 in float64, to 1e-4 per tensor in float32."""

import statistics

import pytest
import torch
from oracle_nets import (
    CLASSES,
    assert_close,
    epochs,
    make_net,
    microbatches,
    relative_errors,
    run_engine,
    sgd_at_rest,
)
from oracle_references import train_plainly
from torch import nn

from petractl.models.resnet import conv3x3
from petractl.models.revnet import RevNetHead, RevNetStem
from petractl.models.units import Coupling, Network, Reconstruction

DEPTHS = [1, 16, 50]


def smooth_net(depth: int, *, seed: int, width: int = 4) -> Network:
    """A fully reversible net, conv-BN-tanh twice in each coupling."""
    torch.manual_seed(seed)
    couplings = [
        Coupling(
            nn.Sequential(
                *[conv3x3(width, width), nn.BatchNorm2d(width), nn.Tanh()],
                *[conv3x3(width, width), nn.BatchNorm2d(width), nn.Tanh()],
            )
        )
        for _ in range(depth)
    ]
    return Network([RevNetStem(3, width, "cifar"), *couplings, RevNetHead(width, CLASSES)])


def gradients_of_both(network, data, *, stages=1, k=1, cuts=None):
    actual = run_engine(
        network,
        data,
        stages=stages,
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
@pytest.mark.parametrize("stages", [1, 2, 3, 10])
def test_reversible_equals_backprop(stages, k):
    for ours, theirs in gradients_of_both(make_net(), epochs(stages), stages=stages, k=k):
        assert_close(ours, theirs, tolerance=1e-10)


@pytest.mark.parametrize("depth", DEPTHS)
def test_reversible_equals_backprop_at_any_depth(depth):
    network = make_net("revnet-iso", depth=depth, width=4)
    data = [microbatches(2, size=8, side=8)]
    for ours, theirs in gradients_of_both(network, data, stages=2, cuts=[1 + depth // 2]):
        assert_close(ours, theirs, tolerance=1e-10)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("depth", DEPTHS)
def test_reversible_equals_backprop_in_single_precision(depth, seed):
    """With a smooth f; see the next test for ReLU."""
    network = smooth_net(depth, seed=seed).float()
    data = [microbatches(2, size=8, side=8, seed=seed, dtype=torch.float32)]
    for ours, theirs in gradients_of_both(network, data, stages=2, cuts=[1 + depth // 2]):
        assert_close(ours, theirs, tolerance=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_relu_in_single_precision(seed):
    """The typical tensor is held to account, not the worst.

    A ReLU has a kink: rounding that moves one of a million activations across 0 changes a gradient by a step.
    Plain backprop in float32 differs from float64's in the same way.
    """
    network = make_net("revnet-iso", depth=50, width=8, dtype=torch.float32, seed=seed)
    data = [microbatches(1, size=8, side=8, seed=seed, dtype=torch.float32)]
    for ours, theirs in gradients_of_both(network, data, stages=2, cuts=[26]):
        assert statistics.median(relative_errors(ours, theirs).values()) <= 1e-5


def test_training_stays_on_backprops_path():
    """With a learning rate, too: the locked methods have no delay, so the errors stay at rounding."""
    options = {"stages": 3, "k": 2, "schedule": "sequential", "method": "reversible"}
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
    ours, theirs = next(gradients_of_both(make_net(), epochs(3), stages=3))
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(ours, theirs, tolerance=1e-10)


def test_a_slightly_wrong_reconstruction_is_detected(monkeypatch):
    """An error of 1e-7 of the rebuilt input, float32's rounding, is far above the tolerance."""
    right = Coupling.reconstruct

    def wrong(self, *outputs):
        rebuilt = right(self, *outputs)
        return Reconstruction(tuple(x * (1 + 1e-7) for x in rebuilt.inputs), rebuilt.vjp)

    monkeypatch.setattr(Coupling, "reconstruct", wrong)
    ours, theirs = next(gradients_of_both(make_net(), epochs(3), stages=3))
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(ours, theirs, tolerance=1e-10)
