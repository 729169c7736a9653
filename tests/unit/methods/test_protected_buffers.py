"""Buffers come back where an evaluation has left in them what is not finite."""

import math

import torch
from torch import nn

from petractl.methods.evaluation import Evaluator
from petractl.methods.protected_buffers import buffers_of, protected


def test_running_statistics_come_back_with_their_counter() -> None:
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(4, 3))
    before = [b.clone() for b in norm.buffers()]
    with protected(buffers_of(norm)):
        norm(torch.full((4, 3), math.nan))
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), before, strict=True))
    with protected(buffers_of(norm)):
        norm(torch.randn(4, 3))
    assert norm.num_batches_tracked == 2
    assert not torch.equal(norm.running_mean, before[0])


def test_statistics_that_overflow_behind_finite_outputs_come_back() -> None:
    norm = nn.BatchNorm1d(1)
    with protected(buffers_of(norm)):
        outputs = norm(torch.tensor([[1e25], [-1e25]]))
    assert torch.isfinite(outputs).all()
    assert torch.equal(norm.running_var, torch.ones(1))


def test_other_modules_keep_what_they_have_learned() -> None:
    unit = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    with protected(buffers_of(unit)):
        unit[1](torch.full((2, 2), math.inf))
        unit[0](torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert unit[0].num_batches_tracked == 1
    assert unit[1].num_batches_tracked == 0


def test_a_mask_of_infinities_holds_nothing_back() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            return x

    unit = Masked()
    with protected(buffers_of(unit)):
        unit(torch.ones(2))
    assert unit.seen == 1


def test_a_backward_through_protected_statistics_works() -> None:
    unit = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    evaluator = Evaluator(unit, index=0, name="unit", seed=0, device=torch.device("cpu"))
    evaluator.protect_buffers()
    bad = torch.tensor([[1.0, math.nan], [0.0, 1.0]])
    graph = evaluator.linearize((bad,), microbatch=0, live=True, parameters=None)
    assert torch.equal(unit[1].running_mean, torch.zeros(2))
    inputs, _ = graph.vjp((torch.ones(2, 2),))
    assert inputs[0].shape == (2, 2)
    evaluator.plain((torch.randn(3, 2),), microbatch=1, live=True, parameters=None)
    assert unit[1].num_batches_tracked == 1
