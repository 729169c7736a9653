"""Forward-mode rules of the common operations: the value once, then each tangent at about a forward's cost.

Batch norm is the reason for them. With training statistics its Jacobian is, per channel,

    dy = w / sigma * (t - mean(t) - xhat * mean(t * xhat)),

a symmetric map of t but for the factor w / sigma, which is the same for all of a channel: so the kernel that
pulls a gradient back is also the one that pushes a tangent forward. With the statistics held, dy is
w / sigma * t. Convolution and linear layers are linear in their input, ReLU has a mask. The other rules are
for operations that only move or add numbers: the operation itself, applied to each tangent.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from petractl.methods.dual_mode import Directions, ForwardMode, Rule

RULES: dict[Any, Rule] = {}


def rule_of(*operations: Any) -> Callable[[Rule], Rule]:
    """Register the rule of operations."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(operations, rule))
        return rule

    return register


@rule_of(F.batch_norm)
def batch_norm(
    mode: ForwardMode,
    func: Any,
    /,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Normalise by PyTorch's own kernel, and push by the kernel of its backward."""
    (x, t_x), (w, t_w), (b, t_b) = (mode.split(part) for part in (input, weight, bias))
    one_value = training and x.numel() == x.shape[1]  # of which PyTorch says that it is wrong
    if one_value or (t_x is None and t_w is None and t_b is None):
        return func(input, running_mean, running_var, weight, bias, training, momentum, eps)
    backend = torch.backends.cudnn.enabled
    y, mean, scale, reserve, kernel = torch._batch_norm_impl_index(
        x, w, b, running_mean, running_var, training, momentum, eps, backend
    )
    if w is not None:
        w = w.contiguous()  # of another stride the CPU's kernel reads the wrong numbers, in channels-last
    running = (None, None) if training else (running_mean, running_var)
    pushed: Directions = []
    for k in range(mode.count):
        of_x, of_w, of_b = (None if t is None else t[k] for t in (t_x, t_w, t_b))
        if of_x is None:
            moved = None
        elif not training:
            moved = _scaled(of_x, w, running_var, eps)
        elif mode.statistics == "held":
            moved = _scaled(of_x, w, scale.pow(-2), 0.0)
        else:
            moved = torch.ops.aten._batch_norm_impl_index_backward(
                kernel, x, of_x, w, *running, mean, scale, True, eps, [True, False, False], reserve
            )[0]
        if of_w is not None or of_b is not None:
            of_w = torch.zeros_like(w) if of_w is None else of_w
            moved = _sum(moved, torch.batch_norm(x, of_w, of_b, *running, training, 0.0, eps, backend))
        pushed.append(moved)
    return mode.join(y, pushed)


def _scaled(t: Tensor, weight: Any, variance: Any, eps: float) -> Tensor:
    """Return t * w / sigma per channel, as a batch norm of mean zero: one pass, in the dtype of `t`."""
    return torch.batch_norm(t, weight, None, torch.zeros_like(variance), variance, False, 0.0, eps, False)


@rule_of(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear)
def affine(
    mode: ForwardMode,
    func: Any,
    /,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> Any:
    """Push through y = A(x, w) + b: dy = A(t_x, w) + A(x, t_w) + t_b."""
    (x, t_x), (w, t_w), (b, t_b) = (mode.split(part) for part in (input, weight, bias))
    pushed: Directions = []
    for k in range(mode.count):
        of_x, of_w, of_b = (None if t is None else t[k] for t in (t_x, t_w, t_b))
        tangent = None if of_x is None else func(of_x, w, None, *rest, **options)
        if of_w is not None:
            tangent = _sum(tangent, func(x, of_w, of_b, *rest, **options))
        elif of_b is not None:
            return NotImplemented
        pushed.append(tangent)
    return mode.join(func(x, w, b, *rest, **options), pushed)


@rule_of(F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
def relu(mode: ForwardMode, func: Any, /, input: Tensor, inplace: bool = False) -> Any:
    """Let a tangent through where the value is positive."""
    x, tangents = mode.split(input)
    inplace = inplace or func in (torch.relu_, Tensor.relu_)
    if tangents is None:
        return torch.relu_(x) if inplace else torch.relu(x)
    if not inplace:
        y = torch.relu(x)
        return mode.join(
            y, [None if t is None else torch.ops.aten.threshold_backward(t, y, 0) for t in tangents]
        )
    torch.relu_(x)
    for t in tangents:
        if t is not None:
            torch.ops.aten.threshold_backward.grad_input(t, x, 0, grad_input=t)
    mode.note(input, tangents)
    return input


@rule_of(
    F.adaptive_avg_pool2d, F.avg_pool2d, torch.flatten, torch.reshape, torch.chunk, torch.split,
    torch.permute, torch.transpose, torch.mean, torch.sum, Tensor.flatten, Tensor.view, Tensor.reshape,
    Tensor.chunk, Tensor.split, Tensor.permute, Tensor.transpose, Tensor.mean, Tensor.sum, Tensor.to,
    Tensor.float, Tensor.contiguous, Tensor.unsqueeze, Tensor.squeeze, Tensor.neg, Tensor.__neg__,
)  # fmt: skip
def linear(mode: ForwardMode, func: Any, /, input: Any, *rest: Any, **options: Any) -> Any:
    """Apply an operation that is linear in its first argument to each tangent."""
    if mode.count == 1:
        return NotImplemented
    x, tangents = mode.split(input)
    if tangents is None:
        return NotImplemented
    value = func(x, *rest, **options)
    if value is x:
        return input
    if isinstance(value, Tensor) and not value.is_floating_point():
        return value
    results = [None if t is None else _own(func(t, *rest, **options), t, value, x) for t in tangents]
    if isinstance(value, Tensor):
        return mode.join(value, results)
    return type(value)(
        mode.join(part, [None if r is None else r[n] for r in results]) for n, part in enumerate(value)
    )


def _own(result: Any, t: Tensor, value: Any, x: Tensor) -> Any:
    """Copy a tangent that is a view of its input's where the value is not, for changes in place."""
    if not isinstance(result, Tensor) or not isinstance(value, Tensor):
        return result
    shares = result.untyped_storage().data_ptr() == t.untyped_storage().data_ptr()
    value_shares = value.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    return result.clone() if shares and not value_shares else result


@rule_of(torch.add, Tensor.add, Tensor.__add__)
def add(mode: ForwardMode, func: Any, /, input: Any, other: Any, **options: Any) -> Any:
    """Add tangents."""
    (x, t_x), (z, t_z) = mode.split(input), mode.split(other)
    if t_x is None or t_z is None or options or x.shape != z.shape or x.dtype != z.dtype:
        return NotImplemented
    return mode.join(x + z, [_sum(a, b, copy=True) for a, b in zip(t_x, t_z, strict=True)])


@rule_of(Tensor.add_, Tensor.__iadd__)
def add_in_place(mode: ForwardMode, func: Any, /, input: Any, other: Any, **options: Any) -> Any:
    """Add to the value and to the tangents in their place, where all that is added to is there."""
    if mode.count == 1 or options:
        return NotImplemented
    (x, t_x), (z, t_z) = mode.split(input), mode.split(other)
    if t_x is None or any(a is None and b is not None for a, b in zip(t_x, t_z or [], strict=False)):
        return NotImplemented
    x.add_(z)
    for a, b in zip(t_x, t_z or [], strict=False):
        if a is not None and b is not None:
            a.add_(b)
    mode.note(input, t_x)
    return input


@rule_of(torch.cat, torch.concat)
def cat(mode: ForwardMode, func: Any, /, tensors: Any, *rest: Any, **options: Any) -> Any:
    """Concatenate tangents."""
    if mode.count == 1:
        return NotImplemented
    pairs = [mode.split(x) for x in tensors]
    results: Directions = []
    for k in range(mode.count):
        parts = [None if t is None else t[k] for _, t in pairs]
        if all(part is None for part in parts):
            results.append(None)
            continue
        filled = [torch.zeros_like(x) if p is None else p for (x, _), p in zip(pairs, parts, strict=True)]
        results.append(func(filled, *rest, **options))
    return mode.join(func([x for x, _ in pairs], *rest, **options), results)


def _sum(a: Tensor | None, b: Tensor | None, *, copy: bool = False) -> Tensor | None:
    """Add two tangents of which one may be zero; with `copy`, into memory of its own in any case."""
    if a is None or b is None:
        one = b if a is None else a
        return one.clone() if copy and one is not None else one
    return a + b
