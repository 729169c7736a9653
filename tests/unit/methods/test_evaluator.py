"""One unit under the conditions of a method: graph, statistics, stashed parameters, randomness, precision."""

import pytest
import torch
from torch import Tensor, nn

from petractl.errors import UserError
from petractl.methods.evaluation import Evaluator
from petractl.models.units import Coupling, Streams, TwoFunctionCoupling

CPU = torch.device("cpu")
CURRENT = {"microbatch": 0, "parameters": None}


def evaluator(unit: nn.Module, *, index: int = 3, **options) -> Evaluator:
    return Evaluator(unit, index=index, name="block", seed=11, device=CPU, **options)


def layers(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 2, 1)
    ).double()


def images(seed: int = 0) -> Tensor:
    return torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def buffers(unit: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in unit.named_buffers()}


def unchanged(unit: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(b, before[name]) for name, b in unit.named_buffers())


class TestGraph:
    def test_plain_gives_the_units_values_without_a_graph(self):
        (y,) = evaluator(layers()).plain((images(),), live=True, **CURRENT)
        assert torch.equal(y, layers()(images()))
        assert not y.requires_grad

    def test_linearize_gives_the_units_values_and_derivatives(self):
        unit, x = layers(), images().requires_grad_()
        y = unit(x)
        g = torch.randn_like(y)
        expected = torch.autograd.grad(y, [x, *unit.parameters()], g)
        line = evaluator(layers()).linearize((images(),), live=True, **CURRENT)
        assert torch.equal(line.outputs[0], y)
        (grad_x,), grads = line.vjp((g,))
        assert all(torch.equal(a, b) for a, b in zip([grad_x, *grads], expected, strict=True))

    def test_both_give_the_same_bits(self):
        for dtype in (torch.float32, torch.float64):
            unit, x = evaluator(layers().to(dtype)), images().to(dtype)
            y = unit.plain((x,), live=False, **CURRENT)[0]
            assert torch.equal(y, unit.linearize((x,), live=False, **CURRENT).outputs[0])

    @pytest.mark.parametrize("live", [True, False])
    def test_embedded_is_a_part_of_a_larger_graph(self, live):
        unit, x = layers(), images().requires_grad_()
        expected = torch.autograd.grad(unit(2 * x).sum(), [x, *unit.parameters()])
        embedded = evaluator(layers())
        before = buffers(embedded.unit)
        (y,) = embedded.embedded((2 * x,), microbatch=0, live=live)
        found = torch.autograd.grad(y.sum(), [x, *embedded.unit.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert unchanged(embedded.unit, before) is not live

    def test_images_get_no_gradient(self):
        unit = evaluator(layers())
        line = unit.linearize((images(),), live=True, input_gradient=False, **CURRENT)
        gradients, grads = line.vjp((torch.ones_like(line.outputs[0]),))
        assert gradients == ()
        assert all(g is not None for g in grads)

    def test_an_input_that_plays_no_part_gets_zeros_and_a_parameter_none(self):
        class First(nn.Linear):
            def forward(self, x, xt):
                return super().forward(x)

        unit = evaluator(First(4, 4))
        unit.unit.register_parameter("unused", nn.Parameter(torch.ones(2)))
        unit = evaluator(unit.unit)
        line = unit.linearize((torch.randn(2, 4), torch.randn(2, 4)), live=True, **CURRENT)
        (_, second), grads = line.vjp((torch.ones(2, 4),))
        assert torch.equal(second, torch.zeros(2, 4))
        assert [g is None for g in grads] == [False, False, True]

    def test_the_callers_gradient_mode_does_not_matter(self):
        unit = evaluator(layers())
        with torch.no_grad():
            assert unit.linearize((images(),), live=False, **CURRENT).outputs[0].requires_grad
        assert not unit.plain((images().requires_grad_(),), live=False, **CURRENT)[0].requires_grad


class TestStatistics:
    @pytest.mark.parametrize("kind", ["plain", "linearize"])
    def test_live_statistics_follow_once(self, kind):
        unit, expected = layers(), layers()
        getattr(evaluator(unit), kind)((images(),), live=True, **CURRENT)
        expected(images())
        assert unchanged(unit, buffers(expected))

    @pytest.mark.parametrize("kind", ["plain", "linearize"])
    def test_frozen_statistics_stay_and_values_are_those_of_the_batch(self, kind):
        unit = layers()
        before = buffers(unit)
        result = getattr(evaluator(unit), kind)((images(),), live=False, **CURRENT)
        y = result[0] if kind == "plain" else result.outputs[0]
        assert unchanged(unit, before)
        assert torch.equal(y, layers()(images()))
        assert unit[1].track_running_stats

    def test_statistics_are_live_again_after_an_error(self):
        unit = evaluator(layers())
        with pytest.raises(RuntimeError):
            unit.plain((torch.ones(1, dtype=torch.float64),), live=False, **CURRENT)
        assert unit.unit[1].track_running_stats

    @pytest.mark.parametrize("live", [True, False])
    def test_a_norm_in_evaluation_mode_uses_its_running_statistics(self, live):
        """Fine-tuning with frozen norms."""
        unit = layers()
        unit(images(1))
        unit[1].eval()
        before, expected = buffers(unit), unit(images())
        assert torch.equal(evaluator(unit).plain((images(),), live=live, **CURRENT)[0], expected)
        assert unchanged(unit, before)

    @pytest.mark.parametrize(
        "live",
        [
            True,
            False,
        ],
    )
    def test_an_instance_norm_in_evaluation_mode_too(self, live):
        unit = nn.InstanceNorm2d(2, track_running_stats=True).double()
        unit(images(1))
        unit.eval()
        before, expected = buffers(unit), unit(images())
        assert torch.equal(evaluator(unit).plain((images(),), live=live, **CURRENT)[0], expected)
        assert unchanged(unit, before)

    def test_a_norm_without_statistics(self):
        unit = nn.BatchNorm2d(2, track_running_stats=False).double()
        assert torch.equal(evaluator(unit).plain((images(),), live=False, **CURRENT)[0], unit(images()))
        assert not unit.track_running_stats

    def test_a_cumulative_average(self):
        unit = nn.BatchNorm2d(2, momentum=None).double()
        wrapped = evaluator(unit)
        for seed in range(3):
            wrapped.plain((images(seed),), live=False, **CURRENT)
            wrapped.plain((images(seed),), live=True, **CURRENT)
        assert int(unit.num_batches_tracked) == 3


class Counter(nn.Module):
    """Counts its evaluations in a buffer, changed in its place or replaced."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            self.count.add_(1)
        else:
            self.count = self.count + 1
        return 2 * x


class Masked(nn.Linear):
    """A constant buffer that takes part in the derivative."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 2.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.mask


class TestOtherBuffers:
    @pytest.mark.parametrize(
        "in_place",
        [
            True,
            False,
        ],
    )
    def test_only_live_evaluations_change_them(self, in_place):
        unit = Counter(in_place=in_place)
        wrapped = evaluator(unit)
        for live in (False, True, False, True, False):
            wrapped.plain((images(),), live=live, **CURRENT)
        assert unit.count == 2

    @pytest.mark.parametrize(
        "live",
        [
            True,
            False,
        ],
    )
    def test_a_constant_may_take_part_in_the_derivative(self, live):
        unit = Masked()
        line = evaluator(unit).linearize((torch.randn(2, 4),), live=live, **CURRENT)
        (grad,), _ = line.vjp((torch.ones(2, 4),))
        torch.testing.assert_close(grad, (unit.mask @ unit.weight).expand(2, 4))


class TestParameters:
    def test_stashed_ones_are_used_and_get_the_gradients(self):
        unit, other = layers(0), layers(1)
        stash = [p.detach().clone().requires_grad_() for p in other.parameters()]
        wrapped = evaluator(unit)
        own = list(unit.parameters())
        line = wrapped.linearize((images(),), microbatch=0, live=False, parameters=stash)
        assert torch.equal(line.outputs[0], other(images()))
        g = torch.ones_like(line.outputs[0])
        expected = torch.autograd.grad(other(images()), list(other.parameters()), g)
        _, grads = line.vjp((g,))
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
        assert all(a is b for a, b in zip(unit.parameters(), own, strict=True))
        plain = wrapped.plain((images(),), microbatch=0, live=False, parameters=stash)
        assert torch.equal(plain[0], line.outputs[0])

    def test_the_units_own_are_back_after_an_error(self):
        unit = layers()
        own = list(unit.parameters())
        stash = [p.detach() for p in own]
        with pytest.raises(RuntimeError):
            evaluator(unit).plain((torch.ones(1),), microbatch=0, live=True, parameters=stash)
        assert all(a is b for a, b in zip(unit.parameters(), own, strict=True))

    def test_a_shared_parameter_is_replaced_wherever_it_stands(self):
        unit = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
        unit[2].weight = unit[0].weight
        wrapped = evaluator(unit)
        assert len(wrapped.parameters) == 1
        stash = [torch.eye(4)]
        x = torch.randn(2, 4)
        (y,) = wrapped.plain((x,), microbatch=0, live=True, parameters=stash)
        torch.testing.assert_close(y, torch.tanh(x))

    def test_frozen_parameters_are_left_out(self):
        unit = nn.Linear(4, 4)
        unit.bias.requires_grad_(False)
        assert [p is unit.weight for p in evaluator(unit).parameters] == [True]

    def test_a_parametrized_weight(self):
        unit = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        wrapped = evaluator(unit)
        assert len(wrapped.parameters) == 3
        x = torch.randn(2, 4)
        stash = [2 * p.detach() for p in wrapped.parameters]
        (y,) = wrapped.plain((x,), microbatch=0, live=True, parameters=stash)
        torch.testing.assert_close(y, 2 * unit(x))


class TestRandomness:
    def draw(self, *, index: int = 3, microbatch: int = 0, kind: str = "plain") -> Tensor:
        unit = evaluator(nn.Dropout(0.5), index=index)
        result = getattr(unit, kind)((torch.ones(64),), microbatch=microbatch, live=False, parameters=None)
        return (result[0] if kind == "plain" else result.outputs[0]).detach()

    def test_an_evaluation_can_be_repeated(self):
        first = self.draw()
        torch.rand(10)
        assert torch.equal(first, self.draw())
        assert torch.equal(first, self.draw(kind="linearize"))

    def test_units_and_microbatches_draw_other_numbers(self):
        draws = [self.draw(), self.draw(index=4), self.draw(microbatch=1)]
        assert not torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])
        assert not torch.equal(draws[1], draws[2])

    def test_a_reconstruction_sees_the_numbers_of_the_forward(self):
        assert_rebuilt(Coupling(nn.Sequential(dropping(), dropping())))

    def test_a_reconstruction_of_two_functions_too(self):
        assert_rebuilt(TwoFunctionCoupling(dropping(), dropping()))


def dropping() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).double()


def assert_rebuilt(unit: nn.Module) -> None:
    wrapped = evaluator(unit)
    x: Streams = (torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64))
    y = wrapped.plain(x, microbatch=5, live=False, parameters=None)
    rebuilt = wrapped.reconstruct(y, microbatch=5, live=True, parameters=None)
    torch.testing.assert_close(rebuilt.inputs, x, rtol=0, atol=1e-12)


class TestInPlace:
    @pytest.mark.parametrize(
        "kind",
        [
            "plain",
            "linearize",
        ],
    )
    def test_a_unit_that_changes_its_input_is_refused(self, kind):
        unit = evaluator(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)))
        with pytest.raises(UserError) as caught:
            getattr(unit, kind)((torch.randn(2, 4),), live=True, **CURRENT)
        assert caught.value.where == "unit 3 (block)"
        assert "in place" in caught.value.what
        assert "ReLU(inplace=False)" in caught.value.hint

    def test_inside_a_unit_it_is_fine(self):
        unit = evaluator(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)))
        unit.plain((torch.randn(2, 4),), live=True, **CURRENT)


class TestPrecision:
    def test_streams_stay_float32_and_parameters_too(self):
        unit = layers().float()
        wrapped = evaluator(unit, autocast_dtype=torch.bfloat16)
        x = images().float()
        (y,) = wrapped.plain((x,), live=False, **CURRENT)
        assert y.dtype is torch.float32
        assert torch.equal(y, y.bfloat16().float()), "the last layer ran in the lower precision"
        line = wrapped.linearize((x,), live=True, **CURRENT)
        assert torch.equal(line.outputs[0], y)
        gradients, grads = line.vjp((torch.ones_like(y),))
        assert {g.dtype for g in (*gradients, *grads)} == {torch.float32}

    def test_without_it_nothing_is_cast(self):
        (y,) = evaluator(layers()).plain((images(),), live=False, **CURRENT)
        assert y.dtype is torch.float64

    def test_a_weight_cast_without_a_graph_is_not_reused_with_one(self):
        unit = nn.Linear(4, 4)
        wrapped = evaluator(unit, autocast_dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            wrapped.plain((torch.randn(2, 4),), live=True, **CURRENT)
            line = wrapped.linearize((torch.randn(2, 4),), live=True, **CURRENT)
        _, grads = line.vjp((torch.ones(2, 4),))
        assert all(g is not None for g in grads)

    def test_rebuilding_costs_float32s_rounding_only(self):
        torch.manual_seed(0)
        f = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())
        wrapped = evaluator(Coupling(f), autocast_dtype=torch.bfloat16)
        x = torch.randn(32, 16), torch.randn(32, 16)
        y = wrapped.plain(x, live=False, **CURRENT)
        rebuilt = wrapped.reconstruct(y, live=True, **CURRENT)
        assert {s.dtype for s in (*y, *rebuilt.inputs)} == {torch.float32}
        torch.testing.assert_close(rebuilt.inputs, x, rtol=0, atol=1e-6)
