"""Forward mode: values and tangents of any module against `torch.func.jvp`, in float64."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from petractl.bench.memory import watched_memory
from petractl.errors import UserError
from petractl.methods.dual import carry, loss_tangents, push, push_many, push_parameters
from petractl.methods.dual_mode import NotCarriedError
from petractl.methods.evaluation import Evaluator
from petractl.models.registry import build_model
from petractl.models.units import Coupling, as_streams

IMAGES = (4, 6, 8, 8)
TOKENS = (3, 5, 8)


class Calls(nn.Module):
    """A module that is a function of its inputs and, maybe, of some layers."""

    def __init__(self, function: Callable, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.function = function

    def forward(self, *inputs: Tensor):
        return self.function(*self.layers, *inputs)


def changed_through_a_view(x: Tensor) -> Tensor:
    y = x * 2
    y[:, :2].mul_(3)
    return y * x


def written_into_zeros(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:3] = x[:, 1:3].sin()
    return y + x


def residual_in_place(conv: nn.Module, x: Tensor) -> Tensor:
    y = conv(x)
    y += x
    return F.relu(y, inplace=True)


def relu_of_a_view(x: Tensor) -> Tensor:
    y = x.sin()
    first, _ = y.chunk(2, dim=1)
    F.relu(first, inplace=True)
    return y * 2


def copied_then_changed(x: Tensor) -> Tensor:
    y = x.permute(0, 2, 3, 1).contiguous()
    return F.relu(y, inplace=True).permute(0, 3, 1, 2) + x


def attention(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x, need_weights=False)[0]


def conv(**options) -> nn.Module:
    return nn.Conv2d(6, 6, 3, padding=1, **options)


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv, batch norm, relu": (
        lambda: nn.Sequential(conv(bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), conv()), IMAGES),
    "strided, grouped, reflected": (
        lambda: nn.Sequential(conv(stride=2, groups=2), conv(padding_mode="reflect")), IMAGES),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(6, 4, 3, stride=2), nn.Tanh()), IMAGES),
    "plain batch norm": (lambda: nn.BatchNorm2d(6, affine=False), IMAGES),
    "batch norm in evaluation": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(6)).eval(), IMAGES),
    "batch norm without statistics": (lambda: nn.BatchNorm2d(6, track_running_stats=False).eval(), IMAGES),
    "pools": (lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)), IMAGES),
    "head": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(384, 7), nn.BatchNorm1d(7), nn.Softmax(1)), IMAGES),
    "gelu, group norm": (lambda: nn.Sequential(conv(), nn.GroupNorm(3, 6), nn.GELU()), IMAGES),
    "instance norm, silu in place": (
        lambda: nn.Sequential(nn.InstanceNorm2d(6), nn.SiLU(inplace=True)), IMAGES),
    "residual in place": (lambda: Calls(residual_in_place, conv()), IMAGES),
    "changed through a view": (lambda: Calls(changed_through_a_view), IMAGES),
    "written into zeros": (lambda: Calls(written_into_zeros), IMAGES),
    "relu of a view": (lambda: Calls(relu_of_a_view), IMAGES),
    "copied, then changed": (lambda: Calls(copied_then_changed), IMAGES),
    "moved about": (lambda: Calls(lambda x: torch.cat([x.chunk(2, 1)[1], x * x, x[:, ::2]], dim=1)), IMAGES),
    "with a constant": (
        lambda: Calls(lambda x: torch.cat([x + 1, torch.ones_like(x)], 1) - x.mean()), IMAGES),
    "dropout": (lambda: nn.Sequential(conv(), nn.Dropout(0.4), nn.Dropout2d(0.3), conv()), IMAGES),
    "dropout in place": (lambda: nn.Sequential(conv(), nn.Dropout(0.4, inplace=True), nn.Tanh()), IMAGES),
    "attention": (lambda: Calls(attention, nn.MultiheadAttention(8, 2, batch_first=True)), TOKENS),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True, norm_first=True), TOKENS),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4), nn.LogSoftmax(-1)), TOKENS),
    "recurrent": (lambda: Calls(lambda cell, x: cell(x[:, 0], cell(x[:, 1])), nn.GRUCell(8, 8)), TOKENS),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = MODULES[name]
    module = build().double()
    for norm in module.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            norm.num_batches_tracked = None  # `torch.func.jvp` refuses to count
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 1.5)
    return module, torch.randn(shape, dtype=torch.float64)


def frozen(module: nn.Module) -> Callable:
    """The module with statistics that do not follow, evaluated with the same random numbers each time."""
    buffers = {name: b.clone() for name, b in module.named_buffers()}

    def function(*inputs: Tensor):
        torch.manual_seed(5)
        return torch.func.functional_call(module, {n: b.clone() for n, b in buffers.items()}, inputs)

    return function


def reference(function: Callable, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]):
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.func.jvp(function, primals, tangents)


def by_two_backwards(function: Callable, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]):
    """The same from the graph of a graph: it draws the random numbers of a plain evaluation."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.jvp(function, primals, tangents)


def expected(name: str) -> Callable:
    # Under `torch.func.jvp` attention draws another dropout mask.
    return by_two_backwards if name == "transformer" else reference


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * (1 + b.norm()))


def directions(x: Tensor, count: int) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(9)
    return [(torch.randn(x.shape, generator=generator, dtype=x.dtype),) for _ in range(count)]


class Counted(TorchDispatchMode):
    """Counts the convolutions that are computed."""

    convolutions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.convolutions += "convolution" in str(func)
        return func(*args, **(kwargs or {}))


class TestAgainstTorch:
    @pytest.mark.parametrize("name", MODULES)
    def test_one_direction(self, name):
        module, x = made(name)
        (t,) = directions(x, 1)
        y, dy = expected(name)(frozen(module), (x,), t)
        (value,), (pushed,) = push(frozen(module), (x,), t)
        assert close(value, y)
        assert close(pushed, dy)
        assert not value.requires_grad
        assert not pushed.requires_grad

    @pytest.mark.parametrize("name", MODULES)
    def test_several_directions(self, name):
        module, x = made(name)
        rows = directions(x, 3)
        (value,), pushed = push_many(frozen(module), (x,), rows)
        for t, (found,) in zip(rows, pushed, strict=True):
            y, dy = expected(name)(frozen(module), (x,), t)
            assert close(value, y)
            assert close(found, dy)

    @pytest.mark.parametrize("model", ["revnet18", "resnet18", "revnet50"])
    def test_the_zoo_and_its_values_to_the_bit(self, model):
        torch.manual_seed(0)
        units = [unit.double() for unit in build_model(model, width=4, classes=5).units]

        def net(*streams: Tensor) -> Tensor:
            for unit in units:
                streams = as_streams(frozen(unit)(*streams))
            return streams[0]

        x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
        for m in (m for unit in units for m in unit.modules() if isinstance(m, nn.BatchNorm2d)):
            m.num_batches_tracked = None
        rows = directions(x, 2)
        (value,), pushed = carry(net, (x,), rows, statistics="live")
        with torch.no_grad():
            assert torch.equal(value, net(x))
        assert all(close(dy, reference(net, (x,), t)[1]) for t, (dy,) in zip(rows, pushed, strict=True))

    def test_streams_that_do_not_depend_give_zeros(self):
        x, index = torch.randn(3, 2, dtype=torch.float64), torch.tensor([0, 2, 1])
        t = (torch.randn_like(x), torch.zeros_like(index))
        outputs, pushed = push(lambda x, i: (x[i] * 2, i, torch.ones(3)), (x, index), t)
        assert torch.equal(outputs[1], index)
        assert torch.equal(pushed[0], t[0][index] * 2)
        assert torch.equal(pushed[1], torch.zeros_like(index))
        assert torch.equal(pushed[2], torch.zeros(3))

    def test_no_direction_is_a_plain_evaluation(self):
        module, x = made("conv, batch norm, relu")
        outputs, pushed = push_many(frozen(module), (x,), [])
        assert torch.equal(outputs[0], frozen(module)(x))
        assert pushed == []

    def test_a_tangent_in_another_memory_format(self):
        module, x = made("conv, batch norm, relu")
        ((t,),) = directions(x, 1)
        _, (one,) = push(frozen(module), (x,), (t,))
        _, (other,) = push(frozen(module), (x,), (t.to(memory_format=torch.channels_last),))
        assert close(other, one)


class TestSeveralAtOnce:
    def test_the_value_is_computed_once(self):
        module, x = made("conv, batch norm, relu")
        with Counted() as counted:
            push_many(frozen(module), (x,), directions(x, 3))
        assert counted.convolutions == 2 * (1 + 3)

    @pytest.mark.parametrize("name", ["changed through a view", "written into zeros", "dropout in place"])
    def test_what_changes_in_place_is_not_carried(self, name):
        module, x = made(name)
        with pytest.raises(NotCarriedError):
            carry(frozen(module), (x,), directions(x, 2), statistics="live")

    @pytest.mark.parametrize(
        "name", ["residual in place", "head", "pools", "dropout", "transformer", "gelu, group norm"]
    )
    def test_others_are_carried(self, name):
        module, x = made(name)
        carry(frozen(module), (x,), directions(x, 2), statistics="live")

    def test_an_autograd_function_is_differentiated_by_its_own_rule(self):
        class StraightThrough(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return torch.relu(x).round()

            @staticmethod
            def jvp(ctx, t):
                return t * 3

        x = torch.randn(3, 4, dtype=torch.float64)
        rows = directions(x, 3)
        _, pushed = push_many(lambda x: StraightThrough.apply(x * 1.5) * 2, (x,), rows)
        assert all(close(dy, 9 * t) for (t,), (dy,) in zip(rows, pushed, strict=True))

    def test_inputs_and_tangents_stay_as_they_are(self):
        module, x = made("residual in place")
        rows = directions(x, 2)
        kept = [x.clone(), *(t.clone() for (t,) in rows)]
        push_many(frozen(module), (x,), rows)
        assert all(torch.equal(a, b) for a, b in zip(kept, [x, *(t for (t,) in rows)], strict=True))


class TestMemory:
    @staticmethod
    def peak(depth: int, *, backprop: bool = False) -> int:
        layers = [
            m for _ in range(depth) for m in (conv(bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        ]
        net, x = nn.Sequential(*layers), torch.randn(8, 6, 16, 16)
        t = torch.randn_like(x)
        push(net, (x,), (t,))
        with watched_memory(torch.device("cpu")) as peak:
            if backprop:
                net(x).sum().backward()
            else:
                push(net, (x,), (t,))
        return peak.bytes

    def test_it_does_not_grow_with_the_depth(self):
        one_activation = 8 * 6 * 16 * 16 * 4
        assert self.peak(16) <= 1.1 * self.peak(4)
        assert self.peak(16, backprop=True) > 2.5 * self.peak(4, backprop=True)
        assert self.peak(4) <= 8 * one_activation


class TestParameters:
    @pytest.mark.parametrize(
        "name", ["conv, batch norm, relu", "head", "layer norm", "strided, grouped, reflected"]
    )
    @pytest.mark.parametrize("whole", [True, False], ids=["block", "tensor"])
    def test_against_torch(self, name, whole):
        module, x = made(name)
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
        named = dict(module.named_parameters())
        moves = {n: torch.randn_like(p) for n, p in named.items()}
        rows = [moves] if whole else [{n: t} for n, t in moves.items()]
        (value,), pushed = push_parameters(module, (x,), rows)
        for row, (dy,) in zip(rows, pushed, strict=True):
            taken = tuple(p.detach() for n, p in named.items() if n in row)
            names = [n for n in named if n in row]

            def function(*values: Tensor, names=names) -> Tensor:
                return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

            y, moved = reference(function, taken, tuple(row[n] for n in names))
            assert close(value, y)
            assert close(dy, moved)

    def test_beside_directions_of_the_inputs(self):
        module, x = made("conv, batch norm, relu")
        function = partial(push_parameters, module.eval(), (x,))
        (t,), move = directions(x, 1), {"0.weight": torch.randn_like(module[0].weight)}
        both = function([move], tangents=[t])[1]
        assert close(both[0][0], push(module, (x,), t)[1][0])
        assert close(both[1][0], function([move])[1][0][0])


class TestStatistics:
    def test_held_is_the_derivative_with_the_batchs_statistics_as_constants(self):
        module, x = made("conv, batch norm, relu")
        ((t,),) = directions(x, 1)
        held = push(frozen(module), (x,), (t,), statistics="held")[1][0]
        with torch.no_grad():
            h = module[0](x)
            module[1].running_mean.copy_(h.mean((0, 2, 3)))
            module[1].running_var.copy_(h.var((0, 2, 3), unbiased=False))
        assert close(held, reference(module.eval(), (x,), (t,))[1])

    def test_held_does_not_couple_samples(self):
        module, x = made("conv, batch norm, relu")
        ((t,),) = directions(x, 1)
        alone = torch.zeros_like(t)
        alone[1] = t[1]
        for statistics, apart in (("held", True), ("live", False)):
            whole, one = (
                push(frozen(module), (x,), (d,), statistics=statistics)[1][0][1] for d in (t, alone)
            )
            assert close(whole, one) is apart


def evaluator(unit: nn.Module, **options) -> Evaluator:
    return Evaluator(unit, index=2, name="block", seed=7, device=torch.device("cpu"), **options)


def with_dropout() -> nn.Module:
    torch.manual_seed(0)
    f = nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.5))
    return Coupling(f).double()


def in_place() -> nn.Module:
    torch.manual_seed(0)
    return Coupling(nn.Sequential(conv(), nn.BatchNorm2d(6), nn.SiLU(inplace=True))).double()


def streams(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, xt = (torch.randn(IMAGES, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, xt


class TestEvaluator:
    @pytest.mark.parametrize("live", [True, False])
    @pytest.mark.parametrize("count", [0, 1, 3])
    @pytest.mark.parametrize("build", [with_dropout, in_place])
    def test_values_randomness_and_statistics_are_those_of_a_plain_evaluation(self, build, count, live):
        plain, dual = evaluator(build()), evaluator(build())
        wanted = plain.plain(streams(), microbatch=4, live=live, parameters=None)
        rows = [streams(seed) for seed in range(count)]
        outputs, pushed = dual.push(streams(), rows, microbatch=4, live=live)
        assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))
        assert len(pushed) == count
        buffers = zip(dual.unit.buffers(), plain.unit.buffers(), strict=True)
        assert all(torch.equal(a, b) for a, b in buffers)

    @pytest.mark.parametrize("build", [with_dropout, in_place])
    def test_tangents_are_those_of_the_graph(self, build):
        # <g, J t> = <J^T g, t> with the same dropout mask.
        rows, g = [streams(2), streams(3)], streams(4)
        _, pushed = evaluator(build()).push(streams(), rows, microbatch=4, live=False)
        line = evaluator(build()).linearize(streams(), microbatch=4, live=False, parameters=None)
        back, _ = line.vjp(g)
        for t, dy in zip(rows, pushed, strict=True):
            assert close(_inner(g, dy), _inner(back, t))

    @pytest.mark.parametrize("stashed", [True, False])
    def test_directions_of_the_parameters(self, stashed):
        unit = evaluator(with_dropout())
        used = [p.detach() * 1.1 for p in unit.parameters] if stashed else None
        moves = [torch.randn_like(p) for p in unit.parameters]
        rows = [[m if n == k else None for n, m in enumerate(moves)] for k in range(len(moves))]
        options = {"microbatch": 4, "live": False}
        _, pushed = unit.push(streams(), [streams(2)], **options, parameters=used, directions=rows)
        version = None if used is None else [p.requires_grad_() for p in used]
        back, gradients = unit.linearize(streams(), **options, parameters=version).vjp(g := streams(4))
        assert len(pushed) == 1 + len(rows)
        assert close(_inner(g, pushed[0]), _inner(back, streams(2)))
        for move, gradient, dy in zip(moves, gradients, pushed[1:], strict=True):
            assert close(_inner(g, dy), (move * gradient).sum())

    @pytest.mark.parametrize("count", [1, 2])
    def test_an_operation_without_forward_mode_is_an_error_that_names_the_unit(self, count):
        class Twice(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return torch.from_numpy(2 * x.numpy())

        unit = evaluator(Calls(lambda x: Twice.apply(x.sin())))
        rows = [streams(n)[:1] for n in range(count)]
        with pytest.raises(UserError, match="forward mode") as found:
            unit.push(streams()[:1], rows, microbatch=0, live=False)
        assert "unit 2 (block)" in str(found.value)

    def test_a_direction_of_inputs_and_parameters_together(self):
        unit, options = evaluator(with_dropout()), {"microbatch": 4, "live": False}
        move, row = [torch.randn_like(p) for p in unit.parameters], streams(2)
        _, (together,) = unit.push(streams(), [(*row, *move)], **options)
        _, (one, other) = unit.push(streams(), [row], **options, directions=[move])
        assert all(close(t, a + b) for t, a, b in zip(together, one, other, strict=True))

    @pytest.mark.parametrize("count", [1, 2])
    @pytest.mark.parametrize("statistics", ["live", "held"])
    def test_lower_precision_and_memory_format_stay(self, count, statistics):
        seen = set()

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if "convolution" in str(func):
                    seen.add((args[0].dtype, args[0].is_contiguous(memory_format=torch.channels_last)))
                return func(*args, **(kwargs or {}))

        torch.manual_seed(0)
        f = nn.Sequential(
            conv(), nn.BatchNorm2d(6), nn.ReLU(inplace=True), conv(), nn.GroupNorm(2, 6), conv()
        )
        unit = evaluator(Coupling(f).to(memory_format=torch.channels_last), autocast_dtype=torch.bfloat16)
        last = [tuple(x.float().to(memory_format=torch.channels_last) for x in streams(n)) for n in range(3)]
        options = {"microbatch": 0, "live": False, "statistics": statistics}
        with Watch():
            outputs, pushed = unit.push(last[0], last[1 : 1 + count], **options)
        assert seen == {(torch.bfloat16, True)}
        precise = evaluator(Coupling(f)).push(last[0], last[1 : 1 + count], **options)[1]
        for rough, exact in zip(pushed, precise, strict=True):
            for y, t, e in zip(outputs, rough, exact, strict=True):
                assert t.dtype == y.dtype == torch.float32
                assert t.stride() == y.stride()
                assert close(t, e, 0.05)


def _inner(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
    return sum(((x * y).sum() for x, y in zip(a, b, strict=True)), start=torch.zeros((), dtype=torch.float64))


class TestLoss:
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_per_sample_and_mean(self, reduction):
        torch.manual_seed(0)
        logits, labels = torch.randn(6, 5, dtype=torch.float64), torch.randint(0, 5, (6,))
        loss = partial(F.cross_entropy, label_smoothing=0.1, reduction=reduction)
        rows = directions(logits, 3)
        losses, moved = loss_tangents(loss, logits, [t for (t,) in rows], labels)
        assert close(losses, loss(logits, labels))
        for t, found in zip(rows, moved, strict=True):
            assert close(found, reference(lambda z: loss(z, labels), (logits,), t)[1])

    def test_no_tangents(self):
        losses, moved = loss_tangents(
            partial(F.cross_entropy, reduction="none"),
            torch.randn(6, 5),
            [],
            torch.zeros(6, dtype=torch.long),
        )
        assert losses.shape == (6,)
        assert moved.shape == (0, 6)


def test_a_batch_norm_of_one_value_is_refused_as_ever() -> None:
    x = torch.randn(1, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        push(nn.BatchNorm1d(3).double(), (x,), (x,))
