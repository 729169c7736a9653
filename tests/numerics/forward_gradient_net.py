"""A small net in four blocks, and the engine's gradients of it by any estimator."""

import copy

import torch
from torch import nn
from torch.nn import functional

from petractl.engine.block_assembly import Auxiliaries, assemble_blocks
from petractl.engine.pipeline import InProcessPipeline
from petractl.methods.block import Loss
from petractl.models.auxiliary import build_auxiliaries
from petractl.models.revnet import BasicDown, BasicFunction, RevNetHead, RevNetStem
from petractl.models.units import Coupling, Network, as_streams

SAMPLES, CLASSES, SIDE = 4, 3, 5
LOSS = Loss(
    functional.cross_entropy,
    lambda logits, labels: functional.cross_entropy(logits, labels, reduction="none"),
)


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


def make_units(normed, *, blocks=4):
    """Three convolutions, or the first alone, and a classifier: a block each."""
    torch.manual_seed(0)

    def block(channels, out, **options):
        norm = [nn.BatchNorm2d(out)] if normed else []
        return nn.Sequential(
            nn.Conv2d(channels, out, 3, padding=1, bias=not normed, **options), *norm, nn.ReLU()
        )

    body = [block(2, 3), block(3, 4, stride=2), block(4, 4)][: blocks - 1]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(body[-1][0].out_channels, CLASSES))
    units = [*body, head]
    for unit in units:
        for p in unit.parameters():
            nn.init.normal_(p, std=0.5)
    return [unit.double() for unit in units]


def make_two_streams():
    """A RevNet in four blocks: stem, a reversible block, one that halves the sides, and a classifier."""
    torch.manual_seed(0)
    units = [
        RevNetStem(2, 2, "cifar"),
        Coupling(BasicFunction(2)),
        BasicDown(2, 4, stride=2),
        RevNetHead(4, CLASSES),
    ]
    return [unit.double() for unit in units]


def shapes_of(units):
    """Return the shapes of the streams, without the samples, that come out of each unit."""
    ((streams, _),) = data()
    streams, shapes = (streams,), []
    for unit in copy.deepcopy(units):
        streams = as_streams(unit(*streams))
        shapes.append([tuple(x.shape[1:]) for x in streams])
    return shapes


def make_auxiliaries(choice, units, *, name="linear"):
    def build(seed):
        torch.manual_seed(seed)
        cuts = range(1, len(units))
        nets = build_auxiliaries(name, units=units, shapes=shapes_of(units), cuts=cuts, classes=CLASSES)
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


def gradients_of(choice, *, normed=True, microbatches=1, k=1, only=None, seed=7, blocks=4, units=None):
    """Run the engine over microbatches that update nothing; return the last update's gradients by name.

    `only` takes that microbatch alone; `seed` is that of random guesses.
    """
    units = units or make_units(normed, blocks=blocks)
    found = {}
    stages = assemble_blocks(
        units,
        names=[str(n) for n in range(len(units))],
        cuts=range(1, len(units)),
        choice=choice,
        auxiliaries=make_auxiliaries(choice, units),
        num_streams=[1, *map(len, shapes_of(units))],
        make_updater=lambda named: Recorded(named, found),
        loss=LOSS,
        seed=seed,
        device=torch.device("cpu"),
    )
    pipeline = InProcessPipeline(stages, lookahead=[0] * len(units), accumulation=k)
    source = data(microbatches) if only is None else iter([list(data(only + 1))[only]])
    pipeline.train(source, num_microbatches=microbatches, offset=only or 0)
    return found


def true_gradients(*, normed=True, blocks=4):
    net = Network(make_units(normed, blocks=blocks))
    ((images, labels),) = data()
    functional.cross_entropy(net(images), labels).backward()
    return {name: p.grad for name, p in net.named_parameters()}


def assert_same(actual, expected, tolerance=1e-9):
    """Compare tensor by tensor; one that is zero but for rounding is held against the largest."""
    assert actual.keys() == expected.keys()
    zero = 1e-8 * max(value.norm() for value in expected.values())
    for name, value in expected.items():
        error = (actual[name] - value).norm() / value.norm().clamp(min=zero)
        assert error < tolerance, f"{name}: relative error {error:.1e}"
