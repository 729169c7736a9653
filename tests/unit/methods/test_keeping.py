"""Three ways to keep a unit's forward, one result: the values and derivatives that autograd gives."""

import copy

import pytest
import torch
from torch import Tensor, nn

from petractl.methods.evaluation import Evaluator
from petractl.methods.family import Keep
from petractl.methods.keeping import GraphKeeper, InputKeeper, Keeper, Reconstructor, build_keeper
from petractl.models.units import Coupling, Streams

CPU = torch.device("cpu")
ALL = [Keep.GRAPH, Keep.INPUT, Keep.NOTHING]


def coupling(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 4))
    return Coupling(f).double()


def streams(seed: int) -> Streams:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, generator=g, dtype=torch.float64), torch.randn(
        6, 4, generator=g, dtype=torch.float64
    )


def keeper_of(
    unit: nn.Module, keep: Keep, *, in_forward: bool = False, input_gradient: bool = True
) -> Keeper:
    evaluator = Evaluator(unit, index=1, name="block", seed=0, device=CPU)
    return build_keeper(evaluator, keep=keep, statistics_in_forward=in_forward, input_gradient=input_gradient)


def run(keeper: Keeper, *, microbatch: int = 0, parameters=None) -> tuple[Streams, list[Tensor | None]]:
    """Return the outputs, and what the backward gives: inputs, their gradients, the parameters' gradients."""
    options = {"microbatch": microbatch, "parameters": parameters}
    y, kept = keeper.forward(streams(1), **options)
    down = keeper.backward(kept, y if keeper.needs_outputs else None, streams(2), **options)
    return y, [*down.inputs, *down.gradients, *down.parameter_gradients]


def test_build_keeper():
    kinds = {Keep.GRAPH: GraphKeeper, Keep.INPUT: InputKeeper, Keep.NOTHING: Reconstructor}
    for keep, kind in kinds.items():
        keeper = keeper_of(coupling(), keep)
        assert type(keeper) is kind
        assert keeper.needs_outputs == (keep is Keep.NOTHING)


@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("keep", ALL)
def test_values_and_derivatives_are_autograds(keep, in_forward):
    unit = coupling()
    leaves = [x.requires_grad_() for x in streams(1)]
    y = unit(*leaves)
    gradients = torch.autograd.grad(y, [*leaves, *unit.parameters()], streams(2))
    ours_y, ours = run(keeper_of(coupling(), keep, in_forward=in_forward))
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(ours_y, y, strict=True))
    for a, b in zip(ours, [*leaves, *gradients], strict=True):
        assert not a.requires_grad
        if keep is Keep.NOTHING:
            torch.testing.assert_close(a, b.detach(), rtol=1e-10, atol=1e-12)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("keep", ALL)
def test_statistics_follow_one_of_the_two_evaluations(keep, in_forward):
    unit, expected = coupling(), coupling()
    expected(*streams(1))
    start = copy.deepcopy(list(unit.buffers()))
    keeper = keeper_of(unit, keep, in_forward=in_forward)
    y, kept = keeper.forward(streams(1), microbatch=0, parameters=None)
    moved = [not torch.equal(a, b) for a, b in zip(unit.buffers(), start, strict=True)]
    assert moved == [in_forward or keep is Keep.GRAPH] * 3
    keeper.backward(kept, y, streams(2), microbatch=0, parameters=None)
    for a, b in zip(unit.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("keep", ALL)
def test_dropout_replays(keep):
    """The recomputation sees the forward's numbers, whatever was drawn in between."""
    _, expected = run(keeper_of(coupling(dropout=0.5), Keep.GRAPH), microbatch=4)
    keeper = keeper_of(coupling(dropout=0.5), keep)
    y, kept = keeper.forward(streams(1), microbatch=4, parameters=None)
    keeper.forward(streams(3), microbatch=5, parameters=None)
    torch.rand(100)
    down = keeper.backward(
        kept, y if keeper.needs_outputs else None, streams(2), microbatch=4, parameters=None
    )
    ours = [*down.inputs, *down.gradients, *down.parameter_gradients]
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    _, other = run(keeper_of(coupling(dropout=0.5), keep), microbatch=5)
    assert not torch.allclose(other[-2], expected[-2])


@pytest.mark.parametrize("keep", ALL)
def test_the_forwards_parameters_are_used_where_given(keep):
    unit = coupling()
    stash = [p.detach().clone().requires_grad_() for p in unit.parameters()]
    _, expected = run(keeper_of(coupling(), keep))
    with torch.no_grad():
        for p in unit.parameters():
            p.add_(1.0)
    _, ours = run(keeper_of(unit, keep), parameters=stash)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("keep", [Keep.INPUT, Keep.NOTHING])
def test_current_parameters_differentiate_where_none_are_kept(keep):
    """The forward ran with other parameters than the backward: PETRA, and delayed with inputs."""
    unit, later = coupling(), coupling()
    keeper = keeper_of(unit, keep)
    y, kept = keeper.forward(streams(1), microbatch=0, parameters=None)
    with torch.no_grad():
        for p, q in zip(unit.parameters(), later.parameters(), strict=True):
            p.mul_(1.1)
            q.copy_(p)
    down = keeper.backward(kept, y, streams(2), microbatch=0, parameters=None)
    with torch.no_grad():
        x = later.inverse(*y) if keep is Keep.NOTHING else streams(1)
    leaves = [s.detach().requires_grad_() for s in x]
    expected = torch.autograd.grad(later(*leaves), [*leaves, *later.parameters()], streams(2))
    ours = [*down.inputs, *down.gradients, *down.parameter_gradients]
    torch.testing.assert_close(ours, [s.detach() for s in (*leaves, *expected)], rtol=1e-10, atol=1e-12)


def test_what_is_kept():
    x = streams(1)
    for keep, kind in {Keep.GRAPH: object, Keep.INPUT: tuple, Keep.NOTHING: type(None)}.items():
        _, kept = keeper_of(coupling(), keep).forward(x, microbatch=0, parameters=None)
        assert isinstance(kept, kind)
        if keep is Keep.INPUT:
            assert kept is x


@pytest.mark.parametrize("keep", [Keep.GRAPH, Keep.INPUT])
def test_the_first_unit_makes_no_gradient_of_the_images(keep):
    keeper = keeper_of(nn.Linear(4, 4).double(), keep, input_gradient=False)
    (x, g) = streams(1)
    _, kept = keeper.forward((x,), microbatch=0, parameters=None)
    down = keeper.backward(kept, None, (g,), microbatch=0, parameters=None)
    assert down.gradients == ()
    assert all(p is not None for p in down.parameter_gradients)


@pytest.mark.parametrize("keep", [Keep.GRAPH, Keep.INPUT])
def test_a_unit_without_parameters(keep):
    keeper = keeper_of(nn.Tanh(), keep)
    (x, g) = streams(1)
    _, kept = keeper.forward((x,), microbatch=0, parameters=None)
    down = keeper.backward(kept, None, (g,), microbatch=0, parameters=None)
    assert down.parameter_gradients == []
    torch.testing.assert_close(down.gradients, (g * (1 - x.tanh() ** 2),))


def test_a_first_unit_without_parameters_has_nothing_to_differentiate():
    keeper = keeper_of(nn.Flatten(), Keep.INPUT, input_gradient=False)
    (x, g) = streams(1)
    _, kept = keeper.forward((x,), microbatch=0, parameters=None)
    down = keeper.backward(kept, None, (g,), microbatch=0, parameters=None)
    assert (down.gradients, down.parameter_gradients) == ((), [])


def test_a_reconstructor_without_outputs_is_our_bug():
    keeper = keeper_of(coupling(), Keep.NOTHING)
    with pytest.raises(AssertionError, match="needs its outputs"):
        keeper.backward(None, None, streams(2), microbatch=0, parameters=None)
