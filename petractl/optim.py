"""Optimisers, learning rates and clipping, for stages that update by themselves.

Each stage has its own optimiser over its own parameters and its own count of updates, from which alone the
learning rate follows; so a result does not depend on when a stage gets to run. Optimiser state is saved under
the names of the parameters, never by position or stage, so that another partition can load it.

SGD and AdamW are torch's fused ones: the fastest on CPU and GPU, and elementwise, so their bits do not depend
on threads or alignment. They take memory as it lies, and give wrong numbers, silently, for a gradient whose
strides are not its parameter's; a hook before each step sees to that.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from petractl.errors import UserError
from petractl.models.user import describe_exception, import_named

OPTIMIZERS = ("sgd", "adamw", "lars")
DECAYS = ("multi-step", "cosine", "polynomial", "constant")

NamedParameters = Sequence[tuple[str, nn.Parameter]]
ParameterGroup = dict[str, Any]
Number = bool | int | float


@dataclass(frozen=True, slots=True)
class LearningRate:
    """Learning rate as a function of the number of updates made so far.

    With w = round(warmup_epochs * updates_per_epoch), update n (from 0) has the rate base_lr * (n + 1) / w
    while n < w: it rises from 0, no update is lost to a rate of 0, and the last one of the warm-up has the
    full rate. After it, with t = (n - w) / (epochs * updates_per_epoch - w):

    - "multi-step": base_lr * factor ** (number of milestones, in epochs, that n has reached);
    - "cosine": base_lr * (1 + cos(pi t)) / 2, which is 0 at the end of the last epoch;
    - "polynomial": base_lr * (1 - t) ** power, 0 there too;
    - "constant": base_lr.
    """

    base_lr: float
    updates_per_epoch: int
    epochs: int
    warmup_epochs: float = 0.0
    decay: str = "constant"
    milestones: tuple[float, ...] = ()
    factor: float = 0.1
    power: float = 2.0

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise UserError(
                f'there is no decay "{self.decay}"',
                where="training.lr_decay",
                hint=f"there are {', '.join(DECAYS)}",
            )

    def __call__(self, update: int) -> float:
        """Return the rate of the update after `update` others."""
        warmup = round(self.warmup_epochs * self.updates_per_epoch)
        if update < warmup:
            return self.base_lr * (update + 1) / warmup
        if self.decay == "constant":
            return self.base_lr
        if self.decay == "multi-step":
            passed = sum(update >= round(milestone * self.updates_per_epoch) for milestone in self.milestones)
            return self.base_lr * math.pow(self.factor, passed)
        remaining = self.epochs * self.updates_per_epoch - warmup
        t = min(1.0, (update - warmup) / remaining) if remaining > 0 else 1.0
        if self.decay == "cosine":
            return self.base_lr * 0.5 * (1.0 + math.cos(math.pi * t))
        return self.base_lr * math.pow(1.0 - t, self.power)


def parameter_groups(
    named_parameters: NamedParameters, *, weight_decay: float, decay_norm_and_bias: bool = False
) -> list[ParameterGroup]:
    """Split parameters into those with weight decay and those without, in their order.

    Norm parameters and biases are told by their shape: at most one dimension. There is always a group, if an
    empty one.
    """
    parameters = [parameter for _, parameter in named_parameters]
    if decay_norm_and_bias:
        return [{"params": parameters, "weight_decay": weight_decay}]
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups: list[ParameterGroup] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]] or groups[:1]


def build_optimizer(
    name: str,
    named_parameters: NamedParameters,
    *,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    decay_norm_and_bias: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    arguments: Mapping[str, Any] | None = None,
) -> Optimizer:
    """Build the optimiser of one stage.

    `sgd` and `lars` take momentum and nesterov (no difference at momentum 0), `adamw` takes betas, a class of
    the user's ("package.module:Class") those of them all that its constructor names. `arguments` are further
    keywords of the constructor, and win. A stage without parameters gets an optimiser that does nothing.

    Raises:
        UserError: no such optimiser, arguments that it does not take, or one whose state could not be saved.
    """
    arguments = dict(arguments or {})
    for key in ("lr", "weight_decay"):
        if key in arguments:
            raise UserError(
                f"{key} is set for each stage and group from optimizer.{key}",
                where=f"optimizer.arguments.{key}",
                hint=f"set optimizer.{key}",
            )
    groups = parameter_groups(
        named_parameters, weight_decay=weight_decay, decay_norm_and_bias=decay_norm_and_bias
    )
    offered = {
        "lr": lr,
        "momentum": momentum,
        "nesterov": nesterov and momentum > 0.0,
        "weight_decay": weight_decay,
        "betas": tuple(betas),
    }
    if ":" in name:
        return _build_user_optimizer(name, groups, offered=offered, arguments=arguments)
    if name not in OPTIMIZERS:
        raise UserError(
            f'there is no optimiser "{name}"',
            where="optimizer.name",
            hint=f'there are {", ".join(OPTIMIZERS)}, and "package.module:Class" for one of your own',
        )
    kind: type[Optimizer] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "lars": Lars}[name]
    taken = ("lr", "betas") if name == "adamw" else ("lr", "momentum", "nesterov")
    keywords: dict[str, Any] = {key: offered[key] for key in taken}
    if name != "lars" and not arguments.keys() & {"foreach", "fused", "differentiable"}:
        keywords["fused"] = _can_fuse(named_parameters)
    optimizer = _construct(name, kind, groups, {**keywords, **arguments})
    if optimizer.param_groups[0].get("fused"):
        optimizer.register_step_pre_hook(_prepare_fused_step)
    return optimizer


def _construct(
    name: str, kind: Callable[..., Optimizer], groups: list[ParameterGroup], keywords: Mapping[str, Any]
) -> Optimizer:
    try:
        return kind(groups, **keywords)
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in keywords.items())
        raise UserError(
            f"{name} cannot be built: {describe_exception(error)}",
            where="optimizer.arguments",
            hint=f"it was given {given}",
        ) from error


def _can_fuse(named_parameters: NamedParameters) -> bool:
    return bool(named_parameters) and all(
        parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()
        for _, parameter in named_parameters
    )


def _prepare_fused_step(optimizer: Optimizer, *_: object) -> None:
    """Give gradients their parameters' strides, and late-comers their momentum.

    The fused kernels read parameter, gradient and state in the order of memory. SGD's takes momentum buffers
    for all of a group or for none, but a parameter may get its first gradient, or its buffer from a
    checkpoint, alone.
    """
    for group in optimizer.param_groups:
        active = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in active:
            if not _same_layout(parameter, parameter.grad):
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
        if group.get("momentum"):
            late = [p for p in active if optimizer.state[p].get("momentum_buffer") is None]
            if len(late) < len(active):
                for parameter in late:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _same_layout(a: Tensor, b: Tensor) -> bool:
    # A dimension of size 1 may have any stride.
    if a.stride() == b.stride():
        return True
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(size == 1 or left == right for size, left, right in strides)


def _build_user_optimizer(
    name: str, groups: list[ParameterGroup], *, offered: Mapping[str, Any], arguments: Mapping[str, Any]
) -> Optimizer:
    kind = import_named(name, where="optimizer.name")
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise UserError(
            f"{name} is not a class of optimisers",
            where="optimizer.name",
            hint="name a subclass of torch.optim.Optimizer",
        )
    known = inspect.signature(kind).parameters
    if "weight_decay" not in known and offered["weight_decay"]:
        raise UserError(
            f"{name} takes no weight decay, but it is {offered['weight_decay']}",
            where="optimizer.weight_decay",
            hint="set it to 0",
        )
    keywords = {**{key: value for key, value in offered.items() if key in known}, **arguments}
    optimizer = _construct(name, kind, groups, keywords)
    if "lr" not in optimizer.param_groups[0]:
        raise UserError(f"{name} has no learning rate that can be set", where="optimizer.name")
    _try_out(name, lambda trial: _construct(name, kind, trial, keywords), groups)
    return optimizer


def _try_out(
    name: str, build: Callable[[list[ParameterGroup]], Optimizer], groups: list[ParameterGroup]
) -> None:
    """Take one step on zeros and read the state: what cannot work fails before a run, not after an epoch."""
    trial: list[ParameterGroup] = []
    for group in groups:
        if group["params"]:
            smallest = min(group["params"], key=lambda parameter: int(parameter.numel()))
            parameter = nn.Parameter(torch.zeros(smallest.shape, dtype=smallest.dtype, device="cpu"))
            parameter.grad = torch.ones_like(parameter)
            trial.append({**group, "params": [parameter]})
    if not trial:
        return
    with torch.random.fork_rng([]):
        optimizer = build(trial)
        try:
            optimizer.step()
        except Exception as error:
            raise UserError(
                f"{name} cannot make a step: {describe_exception(error)}",
                where="optimizer.name",
                hint="it is called as step(), without a closure, with gradients in place",
            ) from error
    optimizer_state(optimizer, [(str(index), group["params"][0]) for index, group in enumerate(trial)])


class Lars(Optimizer):
    """SGD with momentum whose rate is adapted to each tensor, for large batches.

    You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks" (2017): with a tensor's weights w,
    gradient g, weight decay b and trust coefficient h,

        local = h * |w| / (|g| + b * |w|);  v <- momentum * v + lr * local * (g + b * w);  w <- w - v

    and w <- w - (lr * local * (g + b * w) + momentum * v) with Nesterov's momentum. Tensors of at most one
    dimension (norms, biases) and tensors with |w| or |g| zero have local = 1. Nothing waits for the device.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            gradients = [parameter.grad for parameter in parameters]
            if parameters:
                self._step_group(parameters, gradients, group)

    def _step_group(self, parameters: list[Tensor], gradients: list[Tensor], group: ParameterGroup) -> None:
        updates = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
        adapted = [index for index, parameter in enumerate(parameters) if parameter.ndim > 1]
        if adapted:
            ratios = _trust_ratios(
                [parameters[index] for index in adapted],
                [gradients[index] for index in adapted],
                coefficient=group["trust_coefficient"],
                weight_decay=group["weight_decay"],
            )
            torch._foreach_mul_([updates[index] for index in adapted], ratios)
        torch._foreach_mul_(updates, group["lr"])
        if group["momentum"]:
            updates = self._with_momentum(parameters, updates, group)
        torch._foreach_sub_(parameters, updates)

    def _with_momentum(
        self, parameters: list[Tensor], updates: list[Tensor], group: ParameterGroup
    ) -> list[Tensor]:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        velocities: list[Tensor] = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, updates)
        if group["nesterov"]:
            return list(torch._foreach_add(updates, velocities, alpha=group["momentum"]))
        return velocities


def _trust_ratios(
    weights: list[Tensor], gradients: list[Tensor], *, coefficient: float, weight_decay: float
) -> list[Tensor]:
    weight_norms = torch.stack(list(torch._foreach_norm(weights)))
    gradient_norms = torch.stack(list(torch._foreach_norm(gradients)))
    ratios = coefficient * weight_norms / (gradient_norms + weight_decay * weight_norms)
    usable = (weight_norms > 0.0) & (gradient_norms > 0.0)
    return list(torch.where(usable, ratios, 1.0).unbind())


def clip_norm_(gradients: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale gradients in place so that their joint 2-norm is at most `max_norm`; 0 means measure only.

    Returns the norm before scaling, a tensor of no dimensions on the gradients' device; nothing waits for the
    device. A norm that is not finite makes the gradients so too, as `torch.nn.utils.clip_grad_norm_` does.
    """
    if not gradients:
        return torch.zeros(())
    with torch.no_grad():
        norm = torch.nn.utils.get_total_norm(gradients)
        if max_norm > 0.0:
            torch._foreach_mul_(list(gradients), (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def optimizer_state(
    optimizer: Optimizer, names: NamedParameters
) -> tuple[dict[str, Tensor], dict[str, Number]]:
    """Return the state as tensors and numbers under "<parameter name>/<state key>".

    The tensors are the optimiser's own, not copies. Options of groups (rate, decay) are not state.

    Raises:
        UserError: state of another kind, which could not be saved.
    """
    name_of = {id(parameter): name for name, parameter in names}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Number] = {}
    _check_groups(optimizer)
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if id(parameter) not in name_of:
                raise _unsaveable(optimizer, f"{key!r} belongs to no parameter of the stage")
            name = f"{name_of[id(parameter)]}/{key}"
            if isinstance(value, Tensor):
                tensors[name] = value.detach()
            elif isinstance(value, (bool, int, float)):
                numbers[name] = value
            elif value is not None:
                raise _unsaveable(optimizer, f"{key!r} is a {type(value).__name__}")
    return tensors, numbers


def load_optimizer_state(
    optimizer: Optimizer, names: NamedParameters, tensors: Mapping[str, Tensor], numbers: Mapping[str, Number]
) -> None:
    """Replace the state by what `optimizer_state` returned, for the parameters in `names`.

    Keys of other parameters are left aside, so one checkpoint serves any partition. Tensors of a parameter's
    shape take its strides, whatever they were saved with: the next step then has the same bits as without the
    interruption.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    optimizer.state.clear()
    parameters = dict(names)
    entries: dict[str, Tensor | Number] = {**tensors, **numbers}
    for full_name, value in entries.items():
        name, _, key = full_name.rpartition("/")
        if name not in parameters:
            continue
        parameter = parameters[name]
        if isinstance(value, Tensor):
            value = _placed(value, key, parameter, groups[id(parameter)])
        optimizer.state[parameter][key] = value


def _placed(value: Tensor, key: str, parameter: Tensor, group: ParameterGroup) -> Tensor:
    if key == "step":
        # torch keeps the count of steps on the CPU unless the kernel reads it (Optimizer.load_state_dict).
        on_device = group.get("fused") or group.get("capturable")
        return value.to(parameter.device if on_device else "cpu", copy=True)
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    return value.to(parameter.device, copy=True)


def _check_groups(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for key, value in group.items():
            # These differ between groups or change with the updates; any other change is state.
            if key in ("params", "param_names", "lr", "weight_decay") or key not in optimizer.defaults:
                continue
            default = optimizer.defaults[key]
            same = torch.equal(value, default) if isinstance(value, Tensor) else value == default
            if not same:
                raise _unsaveable(optimizer, f"{key!r} of a parameter group has changed")


def _unsaveable(optimizer: Optimizer, why: str) -> UserError:
    return UserError(
        f"the state of {type(optimizer).__name__} cannot be saved: {why}",
        where="optimizer.name",
        hint="use an optimiser whose state is tensors and numbers of each parameter",
    )
