"""Directional derivatives in forward mode: a function's value and, beside it, how it moves with its input.

A block's guess of its gradient is worth as much as the target changes along it. Pushed as a tangent through
the rest of the net, the guess tells that in the forward pass, with nothing kept: the memory needed is that of
one operation, whatever the depth. `push` takes one direction, `push_many` several with the value computed
once, `push_parameters` directions of the parameters. A direction costs about one more forward (`dual_rules`
says how; benchmarks/forward_gradient has the figures).

Attention runs by the kernel that spells it out: the fused ones have no forward mode.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from petractl.estimator import Statistics
from petractl.methods.dual_mode import (
    Directions,
    ForwardMode,
    NotCarriedError,
    random_states,
    set_random_states,
)
from petractl.methods.dual_rules import RULES
from petractl.models.units import Streams, as_streams

Function = Callable[..., Any]
"""Takes tensors, returns a tensor or a tuple or list of tensors."""

Tangents = tuple[Tensor, ...]
"""One per stream, of its shape; for a stream of integers zeros that mean nothing."""


Row = Sequence[Tensor | None]
"""One direction: a tangent per input, None where it does not move."""


def push(
    function: Function, primals: Streams, tangents: Tangents, *, statistics: Statistics = "live"
) -> tuple[Streams, Tangents]:
    """Return the outputs of `function` and their derivative along `tangents`; nothing has a graph."""
    outputs, (pushed,) = carry(function, primals, [tangents], statistics=statistics)
    return outputs, pushed


def push_many(
    function: Function, primals: Streams, tangents: Sequence[Row], *, statistics: Statistics = "live"
) -> tuple[Streams, list[Tangents]]:
    """Return the outputs, computed once, and their derivative along each of several directions.

    Where an operation does not allow that (a change in place that has no rule), `function` is called again
    for each direction, with the same random numbers: it must be one that may be called again.
    """
    states = random_states(primals)
    try:
        return carry(function, primals, tangents, statistics=statistics)
    except NotCarriedError:
        pass

    def again(_: int) -> Function:
        set_random_states(states)
        return function

    return one_by_one(again, primals, tangents, statistics=statistics)


def push_parameters(
    module: nn.Module,
    primals: Streams,
    directions: Sequence[Mapping[str, Tensor]],
    *,
    tangents: Sequence[Tangents] = (),
    statistics: Statistics = "live",
) -> tuple[Streams, list[Tangents]]:
    """Return a module's outputs and their derivatives along directions of its parameters.

    A direction maps names of parameters to tangents; a name left out does not move. `tangents` are
    directions of the inputs, carried beside them: their results come first.
    """
    named = {name: p for name, p in module.named_parameters() if any(name in d for d in directions)}
    count = len(primals)

    def function(*values: Tensor) -> Any:
        return torch.func.functional_call(
            module, dict(zip(named, values[count:], strict=True)), values[:count]
        )

    rows: list[Row] = [[*row, *[None] * len(named)] for row in tangents]
    rows += [[*[None] * count, *[direction.get(name) for name in named]] for direction in directions]
    return push_many(function, (*primals, *named.values()), rows, statistics=statistics)


def loss_tangents(
    loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, tangents: Sequence[Tensor], labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the losses and their derivatives along K tangents of the logits, (K, *losses.shape).

    `loss(logits, labels)` may give one loss per sample, (n,), or their mean.
    """
    rows = [(t,) for t in tangents]
    (losses,), pushed = push_many(lambda z: loss(z, labels), (logits,), rows)
    none = losses.new_zeros((0, *losses.shape))
    return losses, torch.stack([t for (t,) in pushed]) if pushed else none


def carry(
    function: Function, primals: Streams, rows: Sequence[Row], *, statistics: Statistics
) -> tuple[Streams, list[Tangents]]:
    """Call `function` once, on duals of all directions.

    Raises:
        NotCarriedError: there are several, and an operation does not take them at once.
    """
    _load_rules_of_torch()
    mode = ForwardMode(RULES, count=len(rows), statistics=statistics)
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        duals = [_dual(mode, x, [row[n] for row in rows]) for n, x in enumerate(primals)]
        with mode:
            outputs = as_streams(function(*duals))
        pairs = [mode.split(y) for y in outputs]
    values = tuple(value for value, _ in pairs)
    found = [[None] * len(rows) if t is None else t for _, t in pairs]
    return values, [
        tuple(_filled(t[k], y) for t, y in zip(found, values, strict=True)) for k in range(len(rows))
    ]


def one_by_one(
    function: Callable[[int], Function], primals: Streams, rows: Sequence[Row], *, statistics: Statistics
) -> tuple[Streams, list[Tangents]]:
    """Call `function(k)` on duals of direction k, for each direction in turn."""
    results = [carry(function(k), primals, [row], statistics=statistics) for k, row in enumerate(rows)]
    return results[0][0], [pushed for _, (pushed,) in results]


def lacks_forward_mode(error: RuntimeError) -> bool:
    """Tell whether PyTorch says so of an operation, or of a user's autograd function."""
    return "forward AD" in str(error) or "forward mode AD" in str(error)


@cache
def _load_rules_of_torch() -> None:
    """Do what the first dual tensor does, without the warning that PyTorch gives of its own doings then."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        import_module("torch._decomp.decompositions_for_jvp")


def _dual(mode: ForwardMode, x: Tensor, tangents: Directions) -> Tensor:
    """Return a dual of the input, its tangents in the input's memory format and dtype."""
    if not x.is_floating_point():
        return x
    return mode.join(x.detach(), [None if t is None else _like(t, x) for t in tangents])


def _like(t: Tensor, x: Tensor) -> Tensor:
    same = t.stride() == x.stride() and t.dtype == x.dtype
    return t.detach() if same else torch.empty_like(x).copy_(t)


def _filled(t: Tensor | None, y: Tensor) -> Tensor:
    return torch.zeros_like(y) if t is None else t
