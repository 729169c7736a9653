"""Any layer whose parameters have a copy for every sample, evaluated one sample at a time.

Sample i sees the copy p^(i) of a layer's parameter p, all copies equal. `vmap` over single samples gives the
gradient of each copy, and how the outputs move when each copy moves. It is right where the layer does not mix
the samples and draws no random numbers, costs an evaluation for every parameter, and is for what has no
formulas in `per_sample_rules`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from petractl.models.units import as_streams

alone: ContextVar[bool] = ContextVar("alone", default=False)
"""A layer is being evaluated one sample at a time: hooks of whoever watches it have nothing to do."""

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2}
"""What rounding may change, relatively; float32 may be TF32 on a GPU."""
LOW_PRECISION = 0.1

_vjp: Any = torch.func.vjp


@dataclass(frozen=True, slots=True)
class Call:
    """One evaluation of a layer: what it was called with, and its parameters at that time."""

    module: nn.Module
    args: tuple[Any, ...]
    options: Mapping[str, Any]
    parameters: Mapping[str, Tensor]

    @property
    def input(self) -> Tensor:
        """The tensor it was called with, of a layer that takes one."""
        return cast(Tensor, self.args[0] if self.args else self.options["input"])


class Rule(Protocol):
    """How one kind of layer treats the copies of its parameters."""

    def gradient(self, call: Call, key: str, gradients: list[Tensor | None]) -> Tensor:
        """Return dL/dp^(i), (n, *shape), from the gradients of the outputs."""
        ...

    def tangent(self, call: Call, key: str, direction: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return how the outputs move when sample i's copy moves along direction[i].

        Raises:
            ValueError, RuntimeError: the layer cannot be evaluated one sample at a time.
        """
        ...


class GenericRule:
    """Any layer, evaluated for one sample at a time; tensors as long as the batch are split among them."""

    def gradient(self, call: Call, key: str, gradients: list[Tensor | None]) -> Tensor:
        """See `Rule`."""
        used = [n for n, g in enumerate(gradients) if g is not None]
        seeds = [g for g in gradients if g is not None]
        batch, evaluate = _one_sample(call, key, size=len(seeds[0]))

        def of_one(values: list[Tensor], seed: list[Tensor]) -> Tensor:
            outputs, vjp = _vjp(lambda p: _picked(evaluate(p, values), used), call.parameters[key])
            pairs = zip(seed, outputs, strict=True)
            return cast(Tensor, vjp(tuple(g.unsqueeze(0).to(y.dtype) for g, y in pairs))[0])

        with sdpa_kernel(SDPBackend.MATH):  # attention's other kernels have no batching rule
            return torch.func.vmap(of_one)(batch, seeds)

    def tangent(self, call: Call, key: str, direction: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        """See `Rule`; by two products with the transposed Jacobian, for forward mode does not nest."""
        batch, evaluate = _one_sample(call, key, size=len(direction))

        def of_one(values: list[Tensor], g: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            again, vjp = _vjp(lambda p: evaluate(p, values), call.parameters[key])
            zeros = tuple(torch.zeros_like(y) for y in again)
            _, push = _vjp(lambda seeds: vjp(seeds)[0], zeros)
            return tuple(y.squeeze(0) for y in again), tuple(t.squeeze(0) for t in push(g)[0])

        with sdpa_kernel(SDPBackend.MATH):
            again, moved = torch.func.vmap(of_one)(batch, direction)
        for y, expected in zip(again, outputs, strict=True):
            if not bool((y - expected).norm() <= tolerance(expected.dtype) * expected.norm()):
                raise ValueError("it gives other values then: it mixes samples or draws random numbers")
        return list(moved)


def _one_sample(
    call: Call, key: str, *, size: int
) -> tuple[list[Tensor], Callable[[Tensor, list[Tensor]], tuple[Tensor, ...]]]:
    """Return the tensors of the call that have a row for each sample, and the evaluation of one sample."""
    flat = [*call.args, *call.options.values()]
    rows = [n for n, x in enumerate(flat) if isinstance(x, Tensor) and x.dim() > 0 and len(x) == size]
    fixed = {name: p for name, p in call.parameters.items() if name != key}

    def evaluate(parameter: Tensor, values: list[Tensor]) -> tuple[Tensor, ...]:
        filled = list(flat)
        for n, value in zip(rows, values, strict=True):
            filled[n] = value.unsqueeze(0)
        args, rest = filled[: len(call.args)], filled[len(call.args) :]
        options = dict(zip(call.options, rest, strict=True))
        used = {**fixed, key: parameter}
        token = alone.set(True)
        try:
            return tensors_of(
                torch.func.functional_call(call.module, used, tuple(args), options, tie_weights=False)
            )
        finally:
            alone.reset(token)

    dtype = call.parameters[key].dtype
    return [cast_floating(flat[n], dtype) for n in rows], evaluate


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    """Return the tensors among a layer's results: attention's second may be None."""
    if isinstance(result, (tuple, list)):
        return tuple(y for y in result if isinstance(y, Tensor))
    return as_streams(result)


def _picked(outputs: tuple[Tensor, ...], wanted: list[int]) -> tuple[Tensor, ...]:
    return tuple(outputs[n] for n in wanted)


def cast_floating(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in the dtype, one of integers as it is."""
    return x.to(dtype) if x.is_floating_point() else x


def tolerance(dtype: torch.dtype) -> float:
    """Return by how much, relatively, two ways to compute the same may differ."""
    return TOLERANCES.get(dtype, LOW_PRECISION)
