"""Couplings: what they rebuild and differentiate equals what autograd gives, for any f."""

import pytest
import torch
from torch import Tensor, nn

from petractl.models.units import (
    Coupling,
    Network,
    Reversible,
    TwoFunctionCoupling,
    as_streams,
    is_reversible,
)

C = 6


class Squeeze(nn.Module):
    """An f with several branches, a parameter used twice and one not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.gate = nn.Linear(C, C)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(self.conv(x)))
        return h * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None] + 0.1 * x


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C), nn.Tanh())


def in_place_inside() -> nn.Module:
    return nn.Sequential(nn.Conv2d(C, C, 1), nn.ReLU(inplace=True), nn.Conv2d(C, C, 1))


FUNCTIONS = [batch_norm, Squeeze, in_place_inside, nn.Identity, nn.Tanh, lambda: nn.GroupNorm(2, C)]
COUPLINGS = [
    *[lambda f=f: Coupling(f()) for f in FUNCTIONS],
    *[lambda f=f, g=g: TwoFunctionCoupling(f(), g()) for f in FUNCTIONS[:3] for g in FUNCTIONS[1:4]],
]


def build(make) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def streams(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, xt = (torch.randn(3, C, 5, 5, generator=g, dtype=torch.float64) for _ in range(2))
    return x, xt


@pytest.mark.parametrize("make", COUPLINGS)
class TestEveryCoupling:
    def test_inverse(self, make):
        unit, x = build(make), streams(1)
        with torch.no_grad():
            for ours, given in zip(unit.inverse(*unit(*x)), x, strict=True):
                torch.testing.assert_close(ours, given, rtol=0, atol=1e-12)

    def test_reconstruct_rebuilds_and_differentiates(self, make):
        unit, x, g = build(make), streams(1), streams(2)
        leaves = [s.clone().requires_grad_() for s in x]
        parameters = list(unit.parameters())
        y = unit(*leaves)
        expected = torch.autograd.grad(y, [*leaves, *parameters], g, allow_unused=True)
        with torch.no_grad():
            rebuilt = unit.reconstruct(*[s.detach() for s in y])
        for ours, given in zip(rebuilt.inputs, x, strict=True):
            torch.testing.assert_close(ours, given, rtol=0, atol=1e-12)
            assert not ours.requires_grad
        gradients, of_parameters = rebuilt.vjp(g, parameters)
        for ours, theirs in zip([*gradients, *of_parameters], expected, strict=True):
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)

    def test_reconstruct_leaves_what_it_is_given(self, make):
        unit, y, g = build(make), streams(1), streams(2)
        before = [s.clone() for s in (*y, *g)]
        unit.reconstruct(*y).vjp(g, list(unit.parameters()))
        assert all(torch.equal(a, b) for a, b in zip((*y, *g), before, strict=True))

    def test_is_reversible(self, make):
        unit = build(make)
        assert is_reversible(unit)
        assert isinstance(unit, Reversible)


class Counted(nn.Module):
    """An f that counts its evaluations."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.linear(x))


def test_reconstruct_evaluates_each_function_once():
    f, g = Counted(), Counted()
    y = torch.randn(2, 4), torch.randn(2, 4)
    for unit in (Coupling(f), TwoFunctionCoupling(f, g)):
        f.calls = g.calls = 0
        unit.reconstruct(*y).vjp(y, list(unit.parameters()))
        assert f.calls == 1
        assert g.calls == (1 if isinstance(unit, TwoFunctionCoupling) else 0)


def test_two_functions_by_their_equations():
    f, g = build(batch_norm), build(Squeeze)
    x1, x2 = streams(3)
    with torch.no_grad():
        y1, y2 = TwoFunctionCoupling(f, g)(x1, x2)
        assert torch.equal(y1, x1 + f(x2))
        assert torch.equal(y2, x2 + g(y1))


def test_one_function_by_its_equation():
    f = build(batch_norm)
    x, xt = streams(3)
    with torch.no_grad():
        y, yt = Coupling(f)(x, xt)
        assert torch.equal(y, xt + f(x))
        assert yt is x


def test_functions_may_share_parameters():
    f = build(Squeeze)
    unit, y, g = TwoFunctionCoupling(f, f), streams(1), streams(2)
    parameters = list(unit.parameters())
    assert len(parameters) == len(list(f.parameters()))
    leaves = [s.detach().requires_grad_() for s in unit.inverse(*y)]
    expected = torch.autograd.grad(unit(*leaves), parameters, g, allow_unused=True)
    _, ours = unit.reconstruct(*y).vjp(g, parameters)
    for a, b in zip(ours, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_frozen_parameters():
    unit, y, g = build(lambda: Coupling(batch_norm())), streams(1), streams(2)
    unit.requires_grad_(False)
    leaves = [s.detach().requires_grad_() for s in unit.inverse(*y)]
    expected = torch.autograd.grad(unit(*leaves), leaves, g)
    gradients, of_parameters = unit.reconstruct(*y).vjp(g, [])
    assert of_parameters == []
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class Dropped(nn.Module):
    """A layer that is left out, as layer dropping does at times."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_an_f_that_ignores_its_input():
    unit = Coupling(Dropped())
    y = g = (torch.randn(2, 4), torch.randn(2, 4))
    gradients, of_parameters = unit.reconstruct(*y).vjp(g, list(unit.parameters()))
    assert torch.equal(gradients[0], g[1])
    assert torch.equal(gradients[1], g[0])
    assert of_parameters == [None, None]


def test_the_sum_is_in_the_streams_precision():
    unit = Coupling(nn.Linear(4, 4))
    x = torch.randn(2, 4), torch.randn(2, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = unit(*x)
        rebuilt = unit.reconstruct(*y)
    assert {s.dtype for s in (*y, *rebuilt.inputs)} == {torch.float32}
    torch.testing.assert_close(rebuilt.inputs, x, rtol=0, atol=1e-6)
    gradients, of_parameters = rebuilt.vjp(x, list(unit.parameters()))
    assert {g.dtype for g in (*gradients, *of_parameters)} == {torch.float32}


@pytest.mark.parametrize("unit", [nn.Linear(3, 3), nn.Sequential(nn.ReLU()), Squeeze()])
def test_other_modules_are_not_reversible(unit):
    assert not is_reversible(unit)


def test_as_streams():
    a, b = torch.zeros(1), torch.ones(1)
    assert as_streams(a) == (a,)
    assert as_streams((a, b)) == (a, b)
    assert as_streams([a, b]) == (a, b)


@pytest.mark.parametrize("value", [None, (), {"x": torch.zeros(1)}, (torch.zeros(1), 2), "text"])
def test_as_streams_refuses(value):
    with pytest.raises(TypeError, match=f"a tensor or a tuple of tensors, not {type(value).__name__}"):
        as_streams(value)


def test_a_network_is_its_units_in_a_row():
    class Split(nn.Module):
        def forward(self, x):
            return x.chunk(2, dim=1)

    class Join(nn.Linear):
        def forward(self, x, xt):
            return super().forward(torch.cat([x, xt], dim=1))

    coupling, head = Coupling(nn.Linear(3, 3)), Join(6, 2)
    network = Network([Split(), coupling, head])
    x = torch.randn(4, 6)
    assert torch.equal(network(x), head(*coupling(*x.chunk(2, dim=1))))
    assert [name for name, _ in network.named_parameters()] == [
        "units.1.f.weight",
        "units.1.f.bias",
        "units.2.weight",
        "units.2.bias",
    ]
