"""Oracle 8: what forward mode estimates is the projection that a backward pass computes, everywhere allowed.

Each estimate runs through the engine: stages, messages, updates. The net is small enough that every allowed
choice of target, guess, space, projection and coefficients is tried, with and without batch norm.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from forward_gradient_net import (
    LOSS,
    assert_same,
    data,
    gradients_of,
    make_auxiliaries,
    make_two_streams,
    make_units,
    true_gradients,
)
from torch.nn import functional

from petractl.engine.assembly import assemble_stages
from petractl.engine.block_assembly import assemble_blocks
from petractl.engine.pipeline import InProcessPipeline
from petractl.engine.update import Updater
from petractl.estimator import GUESSES, LOCAL, PROJECTIONS, TARGETS, Estimator, is_allowed
from petractl.methods.family import method_spec
from petractl.models.units import Network

SPACES = (("activation", "batch"), ("activation", "sample"), ("batch-weight", "batch"), ("weight", "batch"))


def allowed_choices():
    for target, guess, (space, coefficients), projection in product(TARGETS, GUESSES, SPACES, PROJECTIONS):
        choice = Estimator(target, guess, space, projection, coefficients=coefficients)
        # One statistics for both: forward mode chooses what it can do, reverse mode can do either.
        forward = replace(choice, derivative="forward")
        if is_allowed(forward):
            yield replace(forward, statistics=forward.resolved_statistics)


ALLOWED = list(allowed_choices())


def test_the_whole_grid_is_tried():
    """4 targets x (8 guesses x 14 of 4 spaces and 4 projections, less random signs of 2 random guesses).

    14: a span of one guess in two of the spaces is none.
    """
    assert len(ALLOWED) == 4 * (8 * (4 * 4 - 2) - 2 * 4)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("guess", GUESSES)
def test_forward_mode_is_the_projection_by_a_backward_pass(guess, space, normed):
    torch.set_num_threads(1)
    choices = [c for c in ALLOWED if c.guess == guess and (c.space, c.coefficients) == space]
    assert len(choices) >= 4 * 2
    for choice in choices:
        forward = gradients_of(choice, normed=normed)
        reverse = gradients_of(replace(choice, derivative="reverse"), normed=normed)
        try:
            assert_same(forward, reverse)
        except AssertionError as error:
            error.add_note(str(choice))
            raise


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("space", SPACES)
def test_target_and_guess_global_is_backpropagation(space, normed):
    choice = Estimator("global", "global", space[0], coefficients=space[1])
    assert_same(gradients_of(choice, normed=normed), true_gradients(normed=normed))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(
    ("target", "guess"), [("global", "local"), ("above", "random-gaussian"), ("sum", "ntk")]
)
def test_blocks_of_two_streams(target, guess, space):
    choice = Estimator(target, guess, space[0], coefficients=space[1], derivative="forward")
    choice = replace(choice, statistics=choice.resolved_statistics)
    forward = gradients_of(choice, units=make_two_streams())
    assert_same(forward, gradients_of(replace(choice, derivative="reverse"), units=make_two_streams()))


@pytest.mark.parametrize("space", SPACES)
def test_target_and_guess_local_is_local_learning(space):
    choice = Estimator("local", "local", space[0], coefficients=space[1])
    assert_same(gradients_of(choice), gradients_of(LOCAL))


def test_local_learning_is_the_gradient_of_each_block_s_own_loss():
    units = make_units(normed=True)
    auxiliaries = make_auxiliaries(LOCAL, units)
    ((images, labels),) = data()
    expected, x = {}, images
    for j, (unit, nets) in enumerate(zip(units, auxiliaries, strict=True)):
        y = unit(x)
        logits = y if nets.learning is None else nets.learning(y)
        functional.cross_entropy(logits, labels).backward()
        expected |= {f"units.{j}.{name}": p.grad for name, p in unit.named_parameters()}
        if nets.learning is not None:
            expected |= {f"auxiliary.{j}.{name}": p.grad for name, p in nets.learning.named_parameters()}
        x = y.detach()
    assert_same(gradients_of(LOCAL), expected)


def blocks_by_hand(units, auxiliaries, images, labels):
    """Yield a block, its input, the gradients of the net's and of its own loss at its output, that output."""
    x = images
    for j, unit in enumerate(units[:-1]):
        x = x.detach()
        y = unit(x)
        at = y.detach().requires_grad_()
        (target,) = torch.autograd.grad(functional.cross_entropy(Network(units[j + 1 :])(at), labels), at)
        (guess,) = torch.autograd.grad(functional.cross_entropy(auxiliaries[j].learning(at), labels), at)
        yield j, unit, y, target, guess
        x = y


@pytest.mark.parametrize("projection", ["exact", "sign"])
def test_global_along_local_activations_by_hand(projection):
    """<t, g> / ||g||^2 g at the output, pulled back through the block: written out, batch norm live."""
    choice = Estimator("global", "local", "activation", projection)
    units = make_units(normed=True)
    auxiliaries = make_auxiliaries(choice, units)
    actual = gradients_of(choice)
    ((images, labels),) = data()
    for j, unit, y, t, g in blocks_by_hand(units, auxiliaries, images, labels):
        inner = (t * g).sum()
        estimate = inner / g.square().sum() * g if projection == "exact" else inner.sign() * g
        grads = torch.autograd.grad(y, list(unit.parameters()), estimate)
        for (name, _), expected in zip(unit.named_parameters(), grads, strict=True):
            torch.testing.assert_close(actual[f"units.{j}.{name}"], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_global_along_local_parameters_by_hand(granularity):
    choice = Estimator("global", "local", "batch-weight", granularity=granularity)
    units = make_units(normed=True)
    auxiliaries = make_auxiliaries(choice, units)
    actual = gradients_of(choice)
    ((images, labels),) = data()
    for j, unit, y, t, g in blocks_by_hand(units, auxiliaries, images, labels):
        parameters = list(unit.parameters())
        targets = torch.autograd.grad(y, parameters, t, retain_graph=True)
        guesses = torch.autograd.grad(y, parameters, g)
        inner = torch.stack([(a * b).sum() for a, b in zip(targets, guesses, strict=True)])
        norms = torch.stack([b.square().sum() for b in guesses])
        if granularity == "block":
            inner, norms = inner.sum().expand_as(inner), norms.sum().expand_as(norms)
        for k, (name, _) in enumerate(unit.named_parameters()):
            expected = inner[k] / norms[k] * guesses[k]
            torch.testing.assert_close(actual[f"units.{j}.{name}"], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "choice",
    [
        Estimator(granularity="block", space="batch-weight"),
        Estimator(granularity="block", space="weight"),
        Estimator(guess="random-gaussian", directions=3, coefficients="sample"),
        Estimator(guess="random-rademacher", directions=3, projection="span"),
        Estimator(guess="random-gaussian", directions=2, space="batch-weight", projection="span"),
        Estimator(guess="random-gaussian", directions=2, normalise_random=True, projection="sign"),
        Estimator(target="sum", guess="ntk", statistics="held"),
    ],
    ids=str,
)
def test_the_other_keys_too(choice):
    """Granularity, several directions, normalised ones and held statistics: forward equals reverse."""
    forward = replace(choice, derivative="forward")
    forward = replace(forward, statistics=forward.resolved_statistics)
    assert is_allowed(forward)
    assert_same(gradients_of(forward), gradients_of(replace(forward, derivative="reverse")))


@pytest.mark.parametrize("target", ["global", "above", "sum"])
@pytest.mark.parametrize("space", SPACES)
def test_one_tangent_at_a_time_gives_what_all_at_once_give(target, space):
    for guess in ("random-gaussian", "local", "fixed-ntk"):
        choice = Estimator(target, guess, space[0], coefficients=space[1], derivative="forward")
        assert choice.resolved_tangents == "all"
        assert_same(gradients_of(choice), gradients_of(replace(choice, tangents="one")))


@pytest.mark.parametrize("choice", [Estimator(), Estimator(space="batch-weight"), LOCAL], ids=str)
def test_a_group_of_microbatches_is_averaged(choice):
    """Two microbatches in one group: the mean of what each gives alone."""
    together = gradients_of(choice, microbatches=2, k=2)
    alone = [gradients_of(choice, only=i) for i in range(2)]
    assert_same(together, {name: (g + alone[1][name]) / 2 for name, g in alone[0].items()})


def test_the_original_forward_gradient_by_hand():
    """One direction v of all parameters: (dL/dv) v, the last block too (Baydin et al., 2022)."""
    choice = Estimator("global", "random-gaussian", "batch-weight", granularity="net")
    actual = gradients_of(choice)
    true = true_gradients()
    # v is parallel to the estimate, and c = <t, v>: so <t, estimate> = c^2 and estimate = c v.
    c_squared = sum((true[name] * actual[name]).sum() for name in true)
    assert c_squared > 0
    scale = sum(g.square().sum() for g in actual.values()) / sum(g.numel() for g in actual.values())
    assert (
        0.7 < (scale / c_squared) < 1.4
    )  # v is a standard gaussian of 400 parameters: ||estimate||^2 = c^2 d
    assert actual.keys() == true.keys()


@pytest.mark.parametrize(
    "choice",
    [
        LOCAL,
        Estimator(),
        Estimator(coefficients="sample", tangents="one"),
        Estimator(guess="random-gaussian", space="batch-weight"),
        Estimator(guess="random-gaussian", space="batch-weight", projection="random-sign"),
        Estimator(guess="random-gaussian", space="batch-weight", granularity="net", directions=3),
        Estimator(target="sum", guess="above", derivative="reverse", statistics="held"),
        Estimator(guess="ntk", space="weight", derivative="forward"),
    ],
    ids=str,
)
def test_running_statistics_follow_each_microbatch_once(choice):
    """Whatever is evaluated besides: the statistics are those of a plain forward of every microbatch."""
    units, plain = make_units(normed=True), Network(make_units(normed=True))
    gradients_of(choice, units=units, microbatches=2)
    for images, _ in data(2):
        plain(images)
    actual = Network(units).state_dict()
    for name, expected in plain.state_dict().items():
        torch.testing.assert_close(actual[name], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("lookahead", [[3, 2, 1, 0], [6, 4, 2, 0]])
def test_delayed_blocks_learn_at_the_parameters_of_their_forward(lookahead):
    """Target and guess global, forwards running ahead: these are delayed gradients with their graph kept."""

    def updater(named):
        return Updater(torch.optim.SGD([p for _, p in named], lr=0.2), learning_rate=lambda _: 0.2)

    common = {
        "names": list("0123"),
        "cuts": [1, 2, 3],
        "make_updater": updater,
        "seed": 7,
        "device": torch.device("cpu"),
    }
    choice = Estimator("global", "global")
    blocks, delayed = make_units(normed=True), make_units(normed=True)
    for stages in (
        assemble_blocks(
            blocks,
            choice=choice,
            auxiliaries=make_auxiliaries(choice, blocks),
            num_streams=[1] * 4,
            loss=LOSS,
            **common,
        ),
        assemble_stages(delayed, method=method_spec("delayed", keep="graph"), loss=LOSS.mean, **common),
    ):
        InProcessPipeline(stages, lookahead=lookahead, accumulation=1).train(data(9), num_microbatches=9)
    start = dict(Network(make_units(normed=True)).named_parameters())
    expected = dict(Network(delayed).named_parameters())
    for name, p in Network(blocks).named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-9, atol=1e-12)
        assert (p - start[name]).norm() > 1e-4
