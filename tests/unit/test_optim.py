"""Optimisers against torch's or written-out ones, their state on disk, learning rates in closed form."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from petractl.errors import UserError
from petractl.optim import (
    Lars,
    LearningRate,
    build_optimizer,
    clip_norm_,
    load_optimizer_state,
    optimizer_state,
    parameter_groups,
)

Named = list[tuple[str, nn.Parameter]]


def parameters(*, seed: int = 0, layout: torch.memory_format = torch.channels_last) -> Named:
    generator = torch.Generator().manual_seed(seed)
    conv = torch.randn(6, 5, 3, 3, generator=generator).to(memory_format=layout)
    return [
        ("units.0.conv.weight", nn.Parameter(conv)),
        ("units.0.bn.weight", nn.Parameter(torch.ones(6))),
        ("units.1.point.weight", nn.Parameter(torch.randn(4, 6, 1, 1, generator=generator))),
        ("units.1.fc.weight", nn.Parameter(torch.randn(4, 6, generator=generator))),
        ("units.1.fc.bias", nn.Parameter(torch.zeros(4))),
    ]


def step(
    optimizer: torch.optim.Optimizer, named: Named, update: int, *, layout: torch.memory_format | None = None
) -> None:
    generator = torch.Generator().manual_seed(update)
    for _, parameter in named:
        gradient = torch.randn(parameter.shape, generator=generator)
        if layout is None:
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        else:
            parameter.grad = gradient.to(memory_format=layout) if gradient.ndim == 4 else gradient
    optimizer.step()


def values(named: Named) -> list[Tensor]:
    return [parameter.detach() for _, parameter in named]


def assert_same_bits(left: Named, right: Named) -> None:
    assert all(torch.equal(a, b) for a, b in zip(values(left), values(right), strict=True))


# --- groups -------------------------------------------------------------------------------------------------


def test_norms_and_biases_have_no_decay() -> None:
    named = parameters()
    decayed, others = parameter_groups(named, weight_decay=0.1)
    assert [p.ndim for p in decayed["params"]] == [4, 4, 2]
    assert [p.ndim for p in others["params"]] == [1, 1]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    (everything,) = parameter_groups(named, weight_decay=0.1, decay_norm_and_bias=True)
    assert len(everything["params"]) == 5


def test_groups_are_never_empty_but_for_a_stage_without_parameters() -> None:
    (others,) = parameter_groups(parameters()[1:2], weight_decay=0.1)
    assert others["weight_decay"] == 0.0
    (decayed,) = parameter_groups(parameters()[:1], weight_decay=0.1)
    assert decayed["weight_decay"] == 0.1
    for name in ("sgd", "adamw", "lars"):
        optimizer = build_optimizer(name, [], lr=0.1)
        optimizer.step()
        assert optimizer_state(optimizer, []) == ({}, {})


# --- optimisers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        ("sgd", torch.optim.SGD, {"momentum": 0.5, "nesterov": False}),
        ("adamw", torch.optim.AdamW, {"betas": (0.8, 0.9)}),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_sgd_and_adamw_are_torch_s(
    name: str, kind: type[torch.optim.Optimizer], options: dict[str, object], fused: bool
) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = build_optimizer(name, ours, lr=0.1, weight_decay=0.01, **options)
    reference = kind(
        parameter_groups(theirs, weight_decay=0.01), lr=0.1, fused=fused, foreach=False, **options
    )
    for update in range(4):
        step(optimizer, ours, update)
        step(reference, theirs, update)
    if fused:
        assert_same_bits(ours, theirs)
    for a, b in zip(values(ours), values(theirs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_bits_do_not_depend_on_the_number_of_threads(name: str) -> None:
    threads = torch.get_num_threads()
    results: list[Named] = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            generator = torch.Generator().manual_seed(0)
            named = [("w", nn.Parameter(torch.randn(300, 401, generator=generator)))]
            optimizer = build_optimizer(name, named, lr=0.1, weight_decay=0.01)
            for update in range(2):
                step(optimizer, named, update)
            results.append(named)
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_is_the_written_out_equation(nesterov: bool) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = build_optimizer(
        "lars",
        ours,
        lr=0.5,
        momentum=0.9,
        nesterov=nesterov,
        weight_decay=0.01,
        arguments={"trust_coefficient": 0.02},
    )
    velocities = [torch.zeros_like(p) for _, p in theirs]
    for update in range(3):
        rate = 0.5 / (update + 1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        step(optimizer, ours, update)
        generator = torch.Generator().manual_seed(update)
        for (_, w), v in zip(theirs, velocities, strict=True):
            g = torch.randn(w.shape, generator=generator)
            decay, local = 0.0, torch.tensor(1.0)
            if w.ndim > 1:
                decay = 0.01
                local = 0.02 * w.norm() / (g.norm() + decay * w.norm())
            change = rate * local * (g + decay * w.detach())
            v.mul_(0.9).add_(change)
            w.data -= change + 0.9 * v if nesterov else v
    for a, b in zip(values(ours), values(theirs), strict=True):
        torch.testing.assert_close(a, b)


def test_lars_with_zero_weights_or_gradients_is_plain_sgd() -> None:
    zero_weight, zero_gradient = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    zero_weight.grad, zero_gradient.grad = torch.ones(2, 2), torch.zeros(2, 2)
    no_gradient = nn.Parameter(torch.ones(2, 2))
    Lars([zero_weight, zero_gradient, no_gradient], lr=0.5, momentum=0.0).step()
    assert torch.equal(zero_weight, torch.full((2, 2), -0.5))
    assert torch.equal(zero_gradient, torch.ones(2, 2))
    assert torch.equal(no_gradient, torch.ones(2, 2))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_layout_of_gradients_does_not_matter(name: str) -> None:
    reference = parameters()
    optimizer = build_optimizer(name, reference, lr=0.1, weight_decay=0.01)
    for update in range(3):
        step(optimizer, reference, update)
    for layout in (torch.contiguous_format, torch.channels_last):
        named = parameters()
        optimizer = build_optimizer(name, named, lr=0.1, weight_decay=0.01)
        for update in range(3):
            step(optimizer, named, update, layout=layout)
        for a, b in zip(values(named), values(reference), strict=True):
            torch.testing.assert_close(a, b)


def test_momentum_zero_is_plain_sgd_with_or_without_nesterov() -> None:
    named = parameters()
    expected = [p - 0.5 * torch.ones_like(p) for p in values(named)]
    optimizer = build_optimizer("sgd", named, lr=0.5, momentum=0.0, nesterov=True)
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(values(named), expected, strict=True))
    assert optimizer_state(optimizer, named) == ({}, {})


def test_parameter_that_gets_its_first_gradient_late() -> None:
    ours, theirs = parameters(), parameters()
    optimizer = build_optimizer("sgd", ours, lr=0.1)
    reference = torch.optim.SGD(
        values_as_parameters(theirs), lr=0.1, momentum=0.9, nesterov=True, foreach=False
    )
    for update in range(3):
        for named, chosen in ((ours, optimizer), (theirs, reference)):
            for index, (_, parameter) in enumerate(named):
                late = index == 0 and update == 0
                parameter.grad = None if late else torch.full_like(parameter, update + 1.0)
            chosen.step()
    assert_same_bits(ours, theirs)


def values_as_parameters(named: Named) -> list[nn.Parameter]:
    return [parameter for _, parameter in named]


def test_meta_parameters_are_accepted() -> None:
    named = [("w", nn.Parameter(torch.empty(3, 3, device="meta")))]
    for name in ("sgd", "adamw", "lars", "torch.optim:RMSprop"):
        build_optimizer(name, named, lr=0.1)


# --- the user's optimisers ----------------------------------------------------------------------------------

OWN = """
import torch

class Good(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum=0.5, weight_decay=0.0, gain=1.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, gain=gain))
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["count"] = self.state[p].get("count", 0) + 1
                p.data.sub_(p.grad, alpha=group["lr"])

class NoDecay(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))
    def step(self):
        pass

class NoRate(torch.optim.Optimizer):
    def __init__(self, params, weight_decay):
        super().__init__(params, dict(weight_decay=weight_decay))

class Lists(NoDecay):
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["history"] = [1, 2]

class Shared(NoDecay):
    def step(self):
        self.state["all"]["count"] = 1

class InGroup(NoDecay):
    def __init__(self, params, lr, k=0):
        torch.optim.Optimizer.__init__(self, params, dict(lr=lr, k=k))
    def step(self):
        for group in self.param_groups:
            group["k"] += 1

class Fails(NoDecay):
    def step(self):
        raise RuntimeError("no luck")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_optim.py").write_text(OWN)
    yield
    sys.modules.pop("own_optim", None)


@pytest.mark.usefixtures("own")
def test_user_s_optimiser_gets_what_it_names() -> None:
    optimizer = build_optimizer(
        "own_optim:Good", parameters(), lr=0.1, momentum=0.7, weight_decay=0.2, arguments={"gain": 3.0}
    )
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.2, 0.0]
    assert {(g["lr"], g["momentum"], g["gain"]) for g in optimizer.param_groups} == {(0.1, 0.7, 3.0)}
    assert not optimizer.state


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "options", "where", "text"),
    [
        ("adam", {}, "optimizer.name", "there are sgd, adamw, lars"),
        ("sgd", {"arguments": {"gain": 1}}, "optimizer.arguments", "gain"),
        ("sgd", {"arguments": {"lr": 1.0}}, "optimizer.arguments.lr", "optimizer.lr"),
        ("adamw", {"arguments": {"weight_decay": 1.0}}, "optimizer.arguments.weight_decay", "optimizer."),
        ("own_optim:Absent", {}, "optimizer.name", 'no "Absent"'),
        ("own_optim:torch", {}, "optimizer.name", "not a class of optimisers"),
        ("own_optim:Good", {"arguments": {"x": 1}}, "optimizer.arguments", "x"),
        ("own_optim:NoDecay", {"weight_decay": 0.1}, "optimizer.weight_decay", "takes no weight decay"),
        ("own_optim:NoRate", {}, "optimizer.name", "no learning rate"),
        ("own_optim:Lists", {}, "optimizer.name", "'history' is a list"),
        ("own_optim:Shared", {}, "optimizer.name", "belongs to no parameter"),
        ("own_optim:InGroup", {}, "optimizer.name", "'k' of a parameter group has changed"),
        ("own_optim:Fails", {}, "optimizer.name", "RuntimeError: no luck"),
        ("torch.optim:LBFGS", {}, "optimizer.name", "LBFGS"),
    ],
)
def test_mistakes_are_told(name: str, options: dict[str, object], where: str, text: str) -> None:
    with pytest.raises(UserError) as caught:
        build_optimizer(name, parameters()[:1], lr=0.1, **options)
    assert caught.value.where == where if name != "torch.optim:LBFGS" else True
    assert text in str(caught.value)


# --- state --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("sgd", {"momentum_buffer"}),
        ("adamw", {"step", "exp_avg", "exp_avg_sq"}),
        ("lars", {"momentum_buffer"}),
        ("torch.optim:NAdam", {"step", "exp_avg", "exp_avg_sq", "mu_product"}),
        ("torch.optim:Adafactor", {"step", "row_var", "col_var", "variance"}),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_resumed_optimiser_gives_the_same_bits(
    name: str, keys: set[str], layout: torch.memory_format
) -> None:
    def build(named: Named) -> torch.optim.Optimizer:
        return build_optimizer(name, named, lr=0.01, weight_decay=0.01)

    through = parameters(layout=layout)
    optimizer = build(through)
    for update in range(3):
        step(optimizer, through, update)
    tensors, numbers = optimizer_state(optimizer, through)
    assert {key.rpartition("/")[2] for key in tensors} | {key.rpartition("/")[2] for key in numbers} == keys
    # What a file gives back: contiguous copies, of more parameters than this optimiser has.
    saved = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    saved["units.7.other/momentum_buffer"] = torch.zeros(3)

    resumed = [(key, nn.Parameter(parameter.detach().clone())) for key, parameter in through]
    other = build(resumed)
    load_optimizer_state(other, resumed, saved, numbers)
    for _, parameter in resumed:
        for tensor in other.state[parameter].values():
            if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                assert tensor.stride() == parameter.stride()
    for update in range(3, 6):
        step(optimizer, through, update)
        step(other, resumed, update)
    assert_same_bits(through, resumed)
    assert len(saved) == len(tensors) + 1


def test_state_of_two_optimisers_fills_one() -> None:
    split, whole = parameters(), parameters()
    first, second = build_optimizer("adamw", split[:2], lr=0.1), build_optimizer("adamw", split[2:], lr=0.1)
    one = build_optimizer("adamw", whole, lr=0.1)
    for update in range(2):
        step(one, whole, update)
        generator = torch.Generator().manual_seed(update)
        for _, parameter in split:
            parameter.grad = torch.empty_like(parameter).copy_(
                torch.randn(parameter.shape, generator=generator)
            )
        first.step()
        second.step()
    tensors = {**optimizer_state(first, split[:2])[0], **optimizer_state(second, split[2:])[0]}
    expected = optimizer_state(one, whole)[0]
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    target = build_optimizer("adamw", split, lr=0.1)
    load_optimizer_state(target, split, tensors, {})
    step(target, split, 2)
    step(one, whole, 2)
    assert_same_bits(split, whole)


def test_numbers_are_saved_as_numbers(own: None) -> None:
    named = parameters()
    optimizer = build_optimizer("own_optim:Good", named, lr=0.1)
    step(optimizer, named, 0)
    tensors, numbers = optimizer_state(optimizer, named)
    assert tensors == {}
    assert numbers == {f"{name}/count": 1 for name, _ in named}
    other = build_optimizer("own_optim:Good", named, lr=0.1)
    load_optimizer_state(other, named, tensors, numbers)
    step(other, named, 1)
    assert set(optimizer_state(other, named)[1].values()) == {2}


# --- clipping -----------------------------------------------------------------------------------------------


def test_clipping_is_torch_s() -> None:
    named = parameters()
    step(build_optimizer("sgd", named, lr=0.0), named, 0)
    gradients = [parameter.grad.clone() for _, parameter in named]
    expected = torch.nn.utils.clip_grad_norm_([parameter for _, parameter in named], 0.5)
    assert torch.equal(clip_norm_(gradients, 0.5), expected)
    assert all(torch.equal(p.grad, g) for (_, p), g in zip(named, gradients, strict=True))
    assert torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients])).item() == pytest.approx(0.5)


@pytest.mark.parametrize("max_norm", [0.0, math.inf, 100.0])
def test_small_gradients_are_only_measured(max_norm: float) -> None:
    gradients = [torch.full((2, 2), 3.0), torch.zeros(3)]
    assert clip_norm_(gradients, max_norm).item() == pytest.approx(6.0)
    assert torch.equal(gradients[0], torch.full((2, 2), 3.0))


def test_no_gradients_have_norm_zero() -> None:
    assert clip_norm_([], 1.0).item() == 0.0


# --- learning rates -----------------------------------------------------------------------------------------

RATES: dict[str, Callable[[int], float]] = {
    "constant": lambda n: 0.8,
    "multi-step": lambda n: 0.8 * (0.1 if n >= 40 else 1.0) * (0.1 if n >= 70 else 1.0),
    "cosine": lambda n: 0.4 * (1 + math.cos(math.pi * (n - 20) / 80)),
    "polynomial": lambda n: 0.8 * (1 - (n - 20) / 80) ** 3,
}


@pytest.mark.parametrize("decay", RATES)
def test_rates_in_closed_form(decay: str) -> None:
    rate = LearningRate(
        base_lr=0.8,
        updates_per_epoch=10,
        epochs=10,
        warmup_epochs=2,
        decay=decay,
        milestones=(4, 7),
        factor=0.1,
        power=3.0,
    )
    for n in range(20):
        assert rate(n) == pytest.approx(0.8 * (n + 1) / 20, rel=1e-15)
    assert rate(19) == 0.8
    for n in range(20, 100):
        assert rate(n) == pytest.approx(RATES[decay](n), rel=1e-12)
    assert all(rate(n) > 0 for n in range(100))
    if decay in ("cosine", "polynomial"):
        assert rate(20) == 0.8
        assert rate(100) == rate(1000) == pytest.approx(0.0, abs=1e-15)


def test_warm_up_of_part_of_an_epoch_and_of_the_whole_training() -> None:
    half = LearningRate(base_lr=1.0, updates_per_epoch=5, epochs=2, warmup_epochs=0.5, decay="constant")
    assert [half(n) for n in range(4)] == [0.5, 1.0, 1.0, 1.0]
    for decay in RATES:
        rate = LearningRate(base_lr=1.0, updates_per_epoch=5, epochs=2, warmup_epochs=3, decay=decay)
        assert [rate(n) for n in range(15)] == pytest.approx([(n + 1) / 15 for n in range(15)])
        assert math.isfinite(rate(15))


def test_no_warm_up_starts_at_the_full_rate() -> None:
    assert LearningRate(base_lr=1.0, updates_per_epoch=5, epochs=2, decay="cosine")(0) == 1.0


def test_unknown_decay() -> None:
    with pytest.raises(UserError, match="multi-step, cosine"):
        LearningRate(base_lr=1.0, updates_per_epoch=5, epochs=2, decay="step")
