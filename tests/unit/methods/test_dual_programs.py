"""Forward mode on random programs: operations with and without rules, views, copies and changes in place."""

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from petractl.methods.dual import push, push_many


def changed(x: Tensor, change: Callable[[Tensor], object]) -> Tensor:
    change(x)
    return x


def written(into: Tensor, source: Tensor) -> Tensor:
    into[:, :2] = source[:, 1:3]
    return into


def half_relu(x: Tensor) -> Tensor:
    first = x.chunk(2, dim=1)[0]
    F.relu(first, inplace=True)
    return torch.cat([first, first], dim=1)


OPERATIONS: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
    lambda a, b, w: F.conv2d(a, w, None, 1, 1),
    lambda a, b, w: F.batch_norm(a, None, None, w[:, 0, 0, 0], w[:, 1, 1, 1], True),
    lambda a, b, w: F.relu(a),
    lambda a, b, w: F.relu(a, inplace=True),
    lambda a, b, w: a.relu_(),
    lambda a, b, w: F.relu(a.reshape(a.shape[0], -1), inplace=True).view(a.shape),
    lambda a, b, w: half_relu(a),
    lambda a, b, w: F.max_pool2d(a, 3, 1, 1),
    lambda a, b, w: F.gelu(a),
    lambda a, b, w: a + b,
    lambda a, b, w: a + w[0, 0, 0, 0],
    lambda a, b, w: a + b.mean((2, 3), keepdim=True),
    lambda a, b, w: a * b,
    lambda a, b, w: a * 0,
    lambda a, b, w: changed(a, lambda x: x.add_(b)),
    lambda a, b, w: changed(a, lambda x: x.mul_(0.5)),
    lambda a, b, w: torch.cat([a.chunk(2, 1)[0], b[:, :2]], 1),
    lambda a, b, w: a.view(a.shape),
    lambda a, b, w: a.permute(0, 1, 3, 2),
    lambda a, b, w: a.permute(0, 1, 3, 2).contiguous(),
    lambda a, b, w: a.contiguous(),
    lambda a, b, w: a.contiguous(memory_format=torch.channels_last),
    lambda a, b, w: a.mean((2, 3), keepdim=True).expand_as(a) * 1.0,
    lambda a, b, w: a.detach() + 1,
    lambda a, b, w: a.clone(),
    lambda a, b, w: a.to(torch.float64),
    lambda a, b, w: torch.where(a > 0, a, b),
    lambda a, b, w: written(torch.zeros_like(a), b),
    lambda a, b, w: written(a, b),
]


def program(seed: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return a function of an image that applies some operations, each to two earlier results."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    weights = [torch.randn(4, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(11)]
    lines = [
        (draw.choice(OPERATIONS), draw.random(), draw.random(), w) for w in weights[: draw.randint(3, 11)]
    ]

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        results = [x * 1.5]
        for operation, first, second, weight in lines:
            a, b = (results[int(place * len(results))] for place in (first, second))
            results.append(operation(a, b, weight))
        return torch.stack([(n + 1) * y.sum() for n, y in enumerate(results)]), results[-1]

    return function


@pytest.mark.parametrize("seed", range(0, 240, 20))
def test_tangents_are_those_of_the_graph_of_the_graph(seed):
    for one in range(seed, seed + 20):
        generator = torch.Generator().manual_seed(1000 + one)
        x, *rows = (torch.randn(3, 4, 5, 5, generator=generator, dtype=torch.float64) for _ in range(4))
        function = program(one)
        try:
            wanted = [torch.autograd.functional.jvp(function, x, t)[1] for t in rows]
        except RuntimeError:
            continue  # a change in place that the graph cannot have
        value = function(x)
        single = push(function, (x,), (rows[0],))
        values, pushed = push_many(function, (x,), [(t,) for t in rows])
        for outputs in (single[0], values):
            assert all(torch.equal(a, b) for a, b in zip(outputs, value, strict=True)), one
        for found, expected in zip([single[1], *pushed], [wanted[0], *wanted], strict=True):
            assert all(
                torch.allclose(a, b, rtol=1e-7, atol=1e-7) for a, b in zip(found, expected, strict=True)
            ), one
