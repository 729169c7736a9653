"""Oracle 8: what forward mode estimates is the projection that a backward pass computes, everywhere allowed.

Each estimate runs through the engine: stages, messages, updates. The net is small enough that every allowed
choice of target, guess, space, projection and coefficients is tried, with and without batch norm.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional

from petractl.engine.block_assembly import Auxiliaries, assemble_blocks
from petractl.engine.pipeline import InProcessPipeline
from petractl.estimator import GUESSES, LOCAL, PROJECTIONS, TARGETS, Estimator, is_allowed
from petractl.methods.block import Loss
from petractl.models.auxiliary import build_auxiliaries
from petractl.models.units import Network

SAMPLES, CLASSES, SIDE = 4, 3, 5
LOSS = Loss(
    functional.cross_entropy,
    lambda logits, labels: functional.cross_entropy(logits, labels, reduction="none"),
)
SPACES = (("activation", "batch"), ("activation", "sample"), ("batch-weight", "batch"), ("weight", "batch"))


class Recorded:
    """An updater that keeps the gradients and changes nothing."""

    rate = 0.0

    def __init__(self, named, into):
        self._named = named
        self._into = into

    def step(self, *, delay, position):
        for name, p in self._named:
            self._into[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
            p.grad = None


def make_units(normed):
    """Four blocks: three convolutions, and a classifier."""
    torch.manual_seed(0)

    def block(channels, out, **options):
        norm = [nn.BatchNorm2d(out)] if normed else []
        return nn.Sequential(
            nn.Conv2d(channels, out, 3, padding=1, bias=not normed, **options), *norm, nn.ReLU()
        )

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    units = [block(2, 3), block(3, 4, stride=2), block(4, 4), head]
    for unit in units:
        for p in unit.parameters():
            nn.init.normal_(p, std=0.5)
    return [unit.double() for unit in units]


SHAPES = [[(3, SIDE, SIDE)], [(4, 3, 3)], [(4, 3, 3)], [(CLASSES,)]]


def make_auxiliaries(choice, units, *, name="linear"):
    def build(seed):
        torch.manual_seed(seed)
        nets = build_auxiliaries(name, units=units, shapes=SHAPES, cuts=[1, 2, 3], classes=CLASSES)
        return [net.double() for net in nets]

    learning, guessing = build(1), build(2)
    count = len(units)
    return [
        Auxiliaries(
            learning[j] if choice.wants_auxiliary(j, num_blocks=count) else None,
            guessing[j] if choice.guessing_auxiliary and j < count - 1 else None,
        )
        for j in range(count)
    ]


def data(microbatches=1):
    generator = torch.Generator().manual_seed(3)
    for _ in range(microbatches):
        yield (
            torch.randn(SAMPLES, 2, SIDE, SIDE, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (SAMPLES,), generator=generator),
        )


def gradients_of(choice, *, normed=True, microbatches=1, k=1, only=None):
    """Run the engine over microbatches that update nothing; return the last update's gradients by name.

    `only` takes that microbatch alone.
    """
    units = make_units(normed)
    found = {}
    stages = assemble_blocks(
        units,
        names=[str(n) for n in range(len(units))],
        cuts=[1, 2, 3],
        choice=choice,
        auxiliaries=make_auxiliaries(choice, units),
        num_streams=[1] * len(units),
        make_updater=lambda named: Recorded(named, found),
        loss=LOSS,
        seed=7,
        device=torch.device("cpu"),
    )
    pipeline = InProcessPipeline(stages, lookahead=[0] * len(units), accumulation=k)
    source = data(microbatches) if only is None else iter([list(data(only + 1))[only]])
    pipeline.train(source, num_microbatches=microbatches, offset=only or 0)
    return found


def true_gradients(*, normed=True):
    net = Network(make_units(normed))
    ((images, labels),) = data()
    functional.cross_entropy(net(images), labels).backward()
    return {name: p.grad for name, p in net.named_parameters()}


def assert_same(actual, expected, tolerance=1e-9):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name] - value).norm() / value.norm().clamp(min=1e-12)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def allowed_choices():
    for target, guess, (space, coefficients), projection in product(TARGETS, GUESSES, SPACES, PROJECTIONS):
        choice = Estimator(target, guess, space, projection, coefficients=coefficients)
        # One statistics for both: forward mode chooses what it can do, reverse mode can do either.
        forward = replace(choice, derivative="forward")
        if is_allowed(forward):
            yield replace(forward, statistics=forward.resolved_statistics)


ALLOWED = list(allowed_choices())


def test_the_whole_grid_is_tried():
    """4 targets x 8 guesses x (4 spaces x 4 projections, less a span of one guess in two of them)."""
    assert len(ALLOWED) == 4 * 8 * (4 * 4 - 2)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("guess", GUESSES)
def test_forward_mode_is_the_projection_by_a_backward_pass(guess, space, normed):
    torch.set_num_threads(1)
    choices = [c for c in ALLOWED if c.guess == guess and (c.space, c.coefficients) == space]
    assert len(choices) >= 4 * 3
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
