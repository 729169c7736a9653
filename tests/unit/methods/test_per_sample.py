"""Gradients and tangents of parameters that every sample has a copy of, against copies spelled out."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from per_sample_reference import directional, loss_gradients, with_copies
from torch import Tensor, nn

from petractl.errors import UserError
from petractl.methods.evaluation import Evaluator
from petractl.methods.held_statistics import held_statistics
from petractl.methods.per_sample import Taps
from petractl.methods.per_sample_tangents import push_per_sample
from petractl.models.registry import build_model
from petractl.models.units import Coupling, Streams, as_streams

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

N = 4
CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomised(*units: nn.Module) -> list[nn.Module]:
    """Return the units in float64, no parameter or statistic at a special value."""
    for n, unit in enumerate(units):
        unit.double()
        for k, p in enumerate([*unit.parameters(), *unit.buffers()]):
            if p.is_floating_point():
                p.data += 0.3 * normal(*p.shape, seed=100 * n + k).abs()
    return list(units)


class Attention(nn.Module):
    """A transformer's block: tokens (n, t, d) to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.MultiheadAttention(width, 2, batch_first=True)
        self.net = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.mix(h, h, h, need_weights=False)[0]
        return x + self.net(self.norm2(x))


class Spelled(nn.Module):
    """Attention from linear layers: the same, seen layer by layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return x + self.out(F.softmax(q @ k.transpose(1, 2), dim=-1) @ v)


class Scaled(nn.Module):
    """Owns a parameter and has a layer with others inside."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(3, 1, 1)), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.inner(x)


class Twice(nn.Module):
    """One layer called twice, and another that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))


def mlp() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Linear(6, 3))]


def conv(*layers: nn.Module) -> list[nn.Module]:
    return [nn.Sequential(*layers)]


IMAGES = (N, 3, 7, 6)
NETS: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp(), (N, 5)),
    "two units": ([*mlp(), nn.Linear(3, 2)], (N, 5)),
    "conv, bias, stride": (conv(nn.Conv2d(3, 4, 3, stride=2, padding=(1, 0)), nn.Tanh()), IMAGES),
    "few positions": (conv(nn.Conv2d(3, 9, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(1, 2))), IMAGES),
    "groups, dilation": (conv(nn.Conv2d(3, 6, (3, 2), groups=3, dilation=2), nn.BatchNorm2d(6)), IMAGES),
    "same padding": (conv(nn.Conv2d(3, 4, 2, padding="same"), nn.GroupNorm(2, 4)), IMAGES),
    "circular padding": (conv(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")), IMAGES),
    "conv1d": (conv(nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.Tanh()), (N, 3, 7)),
    "transposed conv": (conv(nn.ConvTranspose2d(3, 2, 3), nn.PReLU()), IMAGES),
    "layer norm": (conv(nn.LayerNorm((7, 6)), nn.InstanceNorm2d(3, affine=True), nn.Tanh()), IMAGES),
    "no bias": (conv(nn.Conv2d(3, 4, 1, bias=False), nn.GroupNorm(4, 4)), IMAGES),
    "attention": ([Attention(4)], (N, 3, 4)),
    "attention, spelled": ([Spelled(4)], (N, 3, 4)),
    "scaled": ([Scaled()], IMAGES),
    "shared": ([Twice()], (N, 3)),
    "coupling": ([Coupling(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))], IMAGES),
}
MODELS = ("resnet18-8b", "revnet18")


def cases() -> list[tuple[list[nn.Module], Streams]]:
    """Return blocks and inputs: the nets above, and the units of two models."""
    found: list[tuple[list[nn.Module], Streams]] = []
    for units, shape in NETS.values():
        streams = 2 if isinstance(units[0], Coupling) else 1
        found.append((randomised(*units), tuple(normal(*shape, seed=n) for n in range(streams))))
    for name in MODELS:
        torch.manual_seed(0)
        model = build_model(name, width=4, classes=3, in_channels=3, stem="cifar", depth=2)
        streams = (normal(N, 3, 16, 16),)
        for unit in model.units:
            randomised(unit)
            found.append(([unit], streams))
            with torch.no_grad():
                streams = as_streams(unit(*streams))
    return found


CASES = cases()
NAMES = [*NETS, *(f"{name}-{n}" for name, k in zip(MODELS, (8, 10), strict=True) for n in range(k))]
block_cases = pytest.mark.parametrize(("units", "inputs"), CASES, ids=NAMES)


def run(units: Sequence[nn.Module], streams: Streams) -> Streams:
    for unit in units:
        streams = as_streams(unit(*streams))
    return streams


def leaves(inputs: Streams) -> Streams:
    return tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs)


def tapped(units: Sequence[nn.Module], inputs: Streams) -> list[Tensor]:
    taps = Taps(units)
    with taps.record() as record:
        outputs = run(units, leaves(inputs))
    return list(record.gradients(outputs, loss_gradients(outputs), inputs=inputs)[1])


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def evaluators(units: Sequence[nn.Module]) -> list[Evaluator]:
    return [Evaluator(unit, index=k, name="unit", seed=3, device=CPU) for k, unit in enumerate(units)]


class TestGradients:
    @block_cases
    @pytest.mark.parametrize("held", [False, True])
    def test_they_are_those_of_copies(self, units, inputs, held):
        block, copies = with_copies(units, n=N, held=held)
        outputs = block(*leaves(inputs))
        expected = torch.autograd.grad(outputs, copies, loss_gradients(outputs), allow_unused=True)
        with held_statistics(held):
            found = tapped(units, inputs)
        assert len(found) == len(expected) > 0
        for a, b in zip(found, expected, strict=True):
            close(a, b)

    @block_cases
    def test_their_sum_and_the_inputs_gradients_are_the_batchs(self, units, inputs):
        ours, theirs = leaves(inputs), leaves(inputs)
        taps = Taps(units)
        with taps.record() as record:
            outputs = run(units, ours)
        grads_in, grads = record.gradients(outputs, loss_gradients(outputs), inputs=ours)
        outputs = run(units, theirs)
        wanted = [*theirs, *(p for unit in units for p in unit.parameters())]
        expected = torch.autograd.grad(outputs, wanted, loss_gradients(outputs))
        for a, b in zip([*grads_in, *(g.sum(0) for g in grads)], expected, strict=True):
            close(a, b)

    def test_evaluation_mode_normalises_by_running_statistics(self):
        units, inputs = randomised(*mlp()), (normal(N, 5),)
        units[0].eval()
        block, copies = with_copies(units, n=N)
        outputs = block(*inputs)
        expected = torch.autograd.grad(outputs, copies, loss_gradients(outputs))
        for a, b in zip(tapped(units, inputs), expected, strict=True):
            close(a, b)

    @pytest.mark.parametrize("padding", [None, 2])
    def test_an_embedding_is_like_a_linear_layer_of_one_hot_words(self, padding):
        units = randomised(nn.Sequential(nn.Embedding(5, 3, padding_idx=padding), nn.Linear(3, 2)))
        words = torch.randint(0, 5, (N, 6), generator=torch.Generator().manual_seed(1))
        found, *_ = tapped(units, (words,))
        table = units[0][0].weight.detach().expand(N, 5, 3).clone().requires_grad_()
        outputs = as_streams(units[0][1](F.one_hot(words, 5).double() @ table))
        (expected,) = torch.autograd.grad(outputs, table, loss_gradients(outputs))
        if padding is not None:
            expected[:, padding] = 0
        close(found, expected)

    def test_dropout_after_a_layer_is_the_one_that_was_drawn(self):
        units = randomised(nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5, inplace=True), nn.Linear(8, 2)))
        unit, x = evaluators(units)[0], normal(N, 5)
        taps = Taps(units)
        with taps.record() as record:
            line = unit.linearize((x,), microbatch=2, live=False, parameters=None)
        g = loss_gradients(line.outputs)
        grads = record.gradients(line.outputs, g, inputs=line.inputs)[1]
        _, expected = unit.linearize((x,), microbatch=2, live=False, parameters=None).vjp(g)
        for a, b in zip(grads, expected, strict=True):
            close(a.sum(0), b)

    def test_other_parameters_in_their_places(self):
        units, x = randomised(Scaled()), normal(*IMAGES)
        unit, taps = evaluators(units)[0], Taps(units)
        others = [(p.detach() + 1).requires_grad_() for p in unit.parameters]
        with taps.record() as record:
            line = unit.linearize((x,), microbatch=0, live=False, parameters=others)
        g = loss_gradients(line.outputs)
        grads = record.gradients(line.outputs, g, inputs=line.inputs, parameters=line.parameters)[1]
        _, expected = unit.linearize((x,), microbatch=0, live=False, parameters=others).vjp(g)
        for a, b in zip(grads, expected, strict=True):
            close(a.sum(0), b)

    def test_in_bfloat16_they_are_in_the_parameters_dtype_and_add_up(self):
        torch.manual_seed(0)
        unit = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(True), nn.Flatten(), nn.Linear(160, 2)
        )
        evaluator = Evaluator(unit, index=0, name="u", seed=0, device=CPU, autocast_dtype=torch.bfloat16)
        x, taps = normal(*IMAGES, dtype=torch.float32), Taps([unit])
        with taps.record() as record:
            line = evaluator.linearize((x,), microbatch=0, live=False, parameters=None)
        g = loss_gradients(line.outputs)
        grads = list(record.gradients(line.outputs, g, inputs=line.inputs, retain_graph=True)[1])
        _, expected = line.vjp(g)
        for a, b in zip(grads, expected, strict=True):
            assert a.dtype is torch.float32
            assert (a.sum(0) - b).norm() <= 0.02 * a.abs().sum(0).norm()

    def test_frozen_parameters_have_none_and_unused_ones_are_none(self):
        unit = randomised(nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)}))[0]
        unit["used"].weight.requires_grad_(False)
        taps = Taps([unit])
        with taps.record() as record:
            outputs = (unit["used"](normal(N, 3)),)
        grads_in, grads = record.gradients(outputs, loss_gradients(outputs), inputs=(normal(N, 3),))
        assert taps.names == ["0.used.bias", "0.idle.weight", "0.idle.bias"]
        assert [g is None for g in grads] == [False, True, True]
        assert grads_in == ()

    def test_two_evaluations_at_a_time_are_kept_apart(self):
        units = randomised(*mlp())
        taps, inputs = Taps(units), [normal(N, 5, seed=k) for k in (1, 2)]
        done = []
        for x in inputs:
            with taps.record() as record:
                done.append((record, run(units, (x,))))
        for (record, outputs), x in zip(done, inputs, strict=True):
            found = record.gradients(outputs, loss_gradients(outputs), inputs=())[1]
            for a, b in zip(found, tapped(units, (x,)), strict=True):
                close(a, b)


class Borrowing(nn.Module):
    """Uses a parameter outside the layer that owns it: alone, or beside the layer."""

    def __init__(self, *, beside: bool) -> None:
        super().__init__()
        self.first, self.beside = nn.Linear(3, 3), beside

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.first.weight)
        return y + self.first(x) if self.beside else y


class Reshaping(nn.Module):
    """Has the samples' tokens in the batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(0, 1)).view(x.shape)


class MixingScale(Scaled):
    """Mixes the samples in a way that only its `forward` knows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (x * self.scale).mean(0)


class WithBatchNorm(Scaled):
    """Owns a parameter and has a batch norm inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.BatchNorm2d(3)


REFUSED = {
    "borrowed": (Borrowing(beside=False), (N, 3), "outside the layer"),
    "borrowed beside": (Borrowing(beside=True), (N, 3), "outside the layer"),
    "other batch": (Reshaping(), (N, 2, 3), "first dimension"),
    "mixed": (MixingScale(), IMAGES, "mixes samples"),
    "batch norm in an owner": (WithBatchNorm(), IMAGES, "one sample at a time"),
}


class TestRefused:
    @pytest.mark.parametrize(("unit", "shape", "why"), REFUSED.values(), ids=REFUSED)
    def test_what_has_no_copies_is_found(self, unit, shape, why):
        with pytest.raises(UserError, match=why) as error:
            tapped(randomised(unit), (normal(*shape),))
        assert error.value.where == "method.space"
        assert '"activation"' in error.value.hint

    def test_a_layer_that_was_right_is_not_compared_again(self):
        units = randomised(*mlp())
        taps = Taps(units)
        with taps.record() as record:
            outputs = run(units, (normal(N, 5),))
        assert len(taps.to_check([])) == 6
        record.gradients(outputs, loss_gradients(outputs), inputs=())
        assert taps.to_check(record._calls) == []

    @pytest.mark.parametrize("name", ["borrowed", "other batch", "batch norm in an owner"])
    def test_a_tangent_finds_it_too(self, name):
        unit, shape, why = REFUSED[name]
        units = randomised(unit)
        p = next(unit.parameters())
        with pytest.raises(UserError, match=why):
            push_per_sample(
                evaluators(units), (normal(*shape),), normal(N, *p.shape), position=0, microbatch=0
            )


class TestTangents:
    @block_cases
    @pytest.mark.parametrize("statistics", ["live", "held"])
    def test_they_are_those_of_copies(self, units, inputs, statistics):
        block, copies = with_copies(units, n=N, held=statistics == "held")
        for position, copied in enumerate(copies):
            direction = normal(*copied.shape, seed=position)
            expected = directional(block, inputs, copied, direction)
            outputs, found = push_per_sample(
                evaluators(units),
                inputs,
                direction,
                position=position,
                microbatch=0,
                statistics=statistics,
            )
            for y, z in zip(outputs, block(*inputs), strict=True):
                close(y, z.detach())
            for a, b in zip(found, expected, strict=True):
                close(a, b)

    @block_cases
    def test_the_products_with_the_gradients_add_up_to_the_derivative(self, units, inputs):
        for position, grad in enumerate(tapped(units, inputs)):
            direction = normal(*grad.shape, seed=position)
            outputs, moved = push_per_sample(
                evaluators(units), inputs, direction, position=position, microbatch=0
            )
            pairs = zip(moved, loss_gradients(outputs), strict=True)
            derivative = sum((t * g).sum() for t, g in pairs)
            close((grad * direction).sum(), derivative)

    @block_cases
    def test_with_held_statistics_a_sample_moves_itself_alone(self, units, inputs):
        count = sum(len(list(unit.parameters())) for unit in units)
        shapes = [p.shape for unit in units for p in unit.parameters()]
        for position in (0, count - 1):
            direction = torch.zeros(N, *shapes[position], dtype=torch.float64)
            direction[1] = normal(*shapes[position])
            _, moved = push_per_sample(
                evaluators(units), inputs, direction, position=position, microbatch=0, statistics="held"
            )
            others = [0, *range(2, N)]
            assert all(not t[others].any() for t in moved)
            assert any(t[1].any() for t in moved)

    def test_with_held_statistics_each_samples_product_is_its_own_derivative(self):
        units, inputs = randomised(*NETS["groups, dilation"][0]), (normal(*IMAGES),)
        block, copies = with_copies(units, n=N, held=True)
        outputs = block(*inputs)
        seeds = loss_gradients(outputs)
        for position, grad in enumerate(torch.autograd.grad(outputs, copies, seeds)):
            direction = normal(*grad.shape, seed=position)
            _, (moved,) = push_per_sample(
                evaluators(units), inputs, direction, position=position, microbatch=0, statistics="held"
            )
            close((moved * seeds[0]).flatten(1).sum(1), (grad * direction).flatten(1).sum(1))

    def test_an_embedding(self):
        units = randomised(nn.Sequential(nn.Embedding(5, 3, padding_idx=2), nn.Linear(3, 2)))
        words = torch.randint(0, 5, (N, 6), generator=torch.Generator().manual_seed(1))
        grad, *_ = tapped(units, (words,))
        direction = normal(*grad.shape)
        outputs, (moved,) = push_per_sample(evaluators(units), (words,), direction, position=0, microbatch=0)
        products = (grad * direction).flatten(1).sum(1)
        close((moved * loss_gradients(outputs)[0]).flatten(1).sum(1), products)

    def test_in_bfloat16(self):
        torch.manual_seed(0)
        unit = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(True), nn.Conv2d(8, 2, 1))
        low, full = (
            Evaluator(unit, index=0, name="u", seed=0, device=CPU, autocast_dtype=dtype)
            for dtype in (torch.bfloat16, None)
        )
        x, direction = normal(*IMAGES, dtype=torch.float32), normal(N, 8, 3, 3, 3, dtype=torch.float32)
        (_, (a,)), (_, (b,)) = (
            push_per_sample([one], (x,), direction, position=0, microbatch=0) for one in (low, full)
        )
        assert a.dtype is torch.float32
        assert (a - b).norm() <= 0.05 * b.norm()

    def test_nothing_of_the_net_is_changed(self):
        units, inputs = randomised(*mlp()), (normal(N, 5),)
        before = {key: value.clone() for key, value in units[0].state_dict().items()}
        push_per_sample(evaluators(units), inputs, normal(N, 6, 5), position=0, microbatch=0)
        assert all(torch.equal(value, before[key]) for key, value in units[0].state_dict().items())
        assert not any(unit._forward_hooks for unit in units[0].modules())
