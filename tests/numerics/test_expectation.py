"""A random guess is unbiased: the mean of <t, v> v over 20,000 draws is the true gradient, to the noise."""

from dataclasses import replace

import pytest
import torch
from forward_gradient_net import gradients_of, true_gradients

from petractl.estimator import Estimator

DRAWS, DIRECTIONS = 20_000, 500
RUNS = DRAWS // DIRECTIONS


@pytest.mark.parametrize(
    "choice",
    [
        Estimator(guess="random-gaussian"),
        Estimator(guess="random-rademacher", space="batch-weight", granularity="block"),
        Estimator(guess="random-gaussian", space="batch-weight", granularity="net"),
    ],
    ids=str,
)
def test_the_mean_over_many_draws_is_the_gradient(choice):
    """Draws come in groups: the spread of the groups' means is the noise that the mean of all must be within.

    The mean of the squared errors, in units of their standard errors, is about 1 where the mean is unbiased
    (parameters of one block err together, so it is not sharply 1); half the gradient, a biased mean, is seen.
    """
    torch.set_num_threads(1)
    many = replace(choice, directions=DIRECTIONS)
    true = true_gradients(normed=False, blocks=2)
    groups = [gradients_of(many, normed=False, blocks=2, seed=run) for run in range(RUNS)]
    random = [name for name in true if choice.granularity == "net" or name.startswith("units.0")]
    means = torch.stack([torch.cat([group[name].flatten() for name in random]) for group in groups])
    expected = torch.cat([true[name].flatten() for name in random])
    mean, noise = means.mean(0), means.std(0) / RUNS**0.5
    seen = noise > 0
    assert torch.equal(mean[~seen], expected[~seen])

    def errors(of):
        return ((mean - of) / noise)[seen]

    assert errors(expected).abs().max() < 6
    assert errors(expected).square().mean() < 2.5
    assert errors(expected / 2).square().mean() > 5
    assert (mean - expected).norm() < 0.2 * expected.norm()
