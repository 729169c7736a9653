"""An update: clip, set the rate, step, empty the gradients."""

import pytest
import torch
from torch import nn

from petractl.engine.update import Updater


def parameter(value: float, grad: float | None = None) -> nn.Parameter:
    p = nn.Parameter(torch.tensor([value]))
    if grad is not None:
        p.grad = torch.tensor([grad])
    return p


def test_the_rate_is_that_of_the_stages_own_count():
    p = parameter(0.0)
    updater = Updater(torch.optim.SGD([p], lr=99.0), learning_rate=lambda n: 10.0**-n)
    for position in range(3):
        p.grad = torch.ones(1)
        updater.step(delay=0, position=position)
    assert p.item() == pytest.approx(-1.11)


def test_every_group_gets_the_rate():
    a, b = parameter(0.0, 1.0), parameter(0.0, 1.0)
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 7.0}], lr=99.0)
    Updater(optimizer, learning_rate=lambda _: 0.5).step(delay=0, position=0)
    assert (a.item(), b.item()) == (-0.5, -0.5)


def test_gradients_are_emptied():
    p = parameter(0.0, 1.0)
    Updater(torch.optim.SGD([p], lr=1.0), learning_rate=lambda _: 1.0).step(delay=3, position=0)
    assert p.grad is None


def test_clipping_sees_the_gradients_that_there_are_before_the_step():
    a, b, c = parameter(0.0, 3.0), parameter(0.0), parameter(0.0, 4.0)
    seen = []

    def clip(gradients):
        seen.append([g.item() for g in gradients])
        for g in gradients:
            g.mul_(0.5)
        return torch.zeros(())

    Updater(torch.optim.SGD([a, b, c], lr=1.0), learning_rate=lambda _: 1.0, clip=clip).step(
        delay=0, position=0
    )
    assert seen == [[3.0, 4.0]]
    assert (a.item(), b.item(), c.item()) == (-1.5, 0.0, -2.0)


def test_nothing_to_clip():
    def clip(_):
        raise AssertionError

    empty = torch.optim.SGD([{"params": []}], lr=1.0)
    Updater(empty, learning_rate=lambda _: 1.0, clip=clip).step(delay=0, position=0)


def test_a_negative_delay_is_our_bug():
    updater = Updater(torch.optim.SGD([parameter(0.0)], lr=1.0), learning_rate=lambda _: 1.0)
    with pytest.raises(AssertionError):
        updater.step(delay=-1, position=0)
