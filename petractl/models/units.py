"""Units: the pieces that a partition moves, and the reversible ones among them.

What flows between units is a tuple of tensors, the *streams*: one for a plain net, two for a reversible one.
Any `nn.Module` is a unit: it is called with the streams and returns a tensor or a tuple of tensors.

A reversible unit also rebuilds its input from its output. `reconstruct` does that with one evaluation of the
inner function *with* a graph, and the same graph then gives the vector-Jacobian product: one forward and one
backward of the inner function, where "invert, then run forward again, then differentiate" needs two forwards
and one backward.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

Streams = tuple[Tensor, ...]
"""Activations between two units, or gradients with respect to them."""

VectorJacobian = Callable[[Streams, Sequence[Tensor]], tuple[Streams, list[Tensor | None]]]
"""(output gradients, parameters) -> (input gradients, one gradient or None per parameter)."""


_begin_part: ContextVar[Callable[[int], None] | None] = ContextVar("begin_part", default=None)


@contextmanager
def parts_begin_with(prepare: Callable[[int], None]) -> Iterator[None]:
    """Have a composed unit call `prepare(n)` before it evaluates its part n.

    Going down, the parts are evaluated in another order than going up: each must find the random numbers
    that it drew before, whatever the others draw.
    """
    token = _begin_part.set(prepare)
    try:
        yield
    finally:
        _begin_part.reset(token)


def _begin(part: int) -> None:
    prepare = _begin_part.get()
    if prepare is not None:
        prepare(part)


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """The inputs rebuilt from a unit's outputs, and the product with the Jacobian at them.

    `vjp(output_gradients, parameters)` may be called once: it frees the graph.
    """

    inputs: Streams
    vjp: VectorJacobian


@runtime_checkable
class Reversible(Protocol):
    """A unit whose input can be computed from its output."""

    def inverse(self, *outputs: Tensor) -> Streams:
        """Return the inputs that gave these outputs."""
        ...

    def reconstruct(self, *outputs: Tensor) -> Reconstruction:
        """Return the inputs and the vector-Jacobian product, from one evaluation with a graph."""
        ...


def as_streams(value: object) -> Streams:
    """Return a unit's result as a tuple of tensors.

    Raises:
        TypeError: the value is neither a tensor nor a non-empty tuple or list of tensors.
    """
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, (tuple, list)) and value and all(isinstance(item, Tensor) for item in value):
        return tuple(cast(Iterable[Tensor], value))
    raise TypeError(f"a unit must return a tensor or a tuple of tensors, not {type(value).__name__}")


def is_reversible(unit: nn.Module) -> bool:
    """Tell whether the unit can rebuild its input."""
    return isinstance(unit, Reversible)


class Coupling(nn.Module):
    """One-function reversible coupling (x, x~) -> (x~ + f(x), x) around any module f.

    f maps a stream to a tensor of the same shape. The sum is taken in the dtype of the streams, so with
    float32 streams a lower-precision f costs no reversibility (REFERENCE: Rivaud et al., ICLR 2025, section
    3).
    """

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor, xt: Tensor) -> Streams:
        """Map two streams of equal shape to two of the same shape."""
        return xt + self.f(x), x

    def inverse(self, *outputs: Tensor) -> Streams:
        """Return (x, x~) = (y~, y - f(y~))."""
        y, yt = outputs
        return yt, y - self.f(yt)

    def reconstruct(self, *outputs: Tensor) -> Reconstruction:
        """Rebuild (x, x~) and keep the graph of f(x) for the product with the Jacobian.

        With (g, g~) the gradients of the outputs: grad_x = g~ + VJP_f(g), grad_x~ = g.
        """
        y, yt = outputs
        x = yt.detach().requires_grad_()
        with torch.enable_grad():
            fx = self.f(x)

        def vjp(gradients: Streams, parameters: Sequence[Tensor]) -> tuple[Streams, list[Tensor | None]]:
            gy, gyt = gradients
            if not fx.requires_grad:
                return (gyt, gy), [None] * len(parameters)
            found: tuple[Tensor | None, ...] = torch.autograd.grad(
                fx, [x, *parameters], gy.to(fx.dtype), allow_unused=True
            )
            grad_x, *grads = found
            return (gyt if grad_x is None else gyt + grad_x, gy), grads

        return Reconstruction((yt, y - fx.detach()), vjp)


class TwoFunctionCoupling(nn.Module):
    """Two-function coupling y1 = x1 + f(x2), y2 = x2 + g(y1), a composition of two one-function couplings.

    (Gomez et al., "The Reversible Residual Network", NeurIPS 2017.) The parameters of f and g are named
    `first.f` and `second.f`.
    """

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.first = Coupling(f)
        self.second = Coupling(g)

    def forward(self, x1: Tensor, x2: Tensor) -> Streams:
        """Map two streams of equal shape to two of the same shape."""
        _begin(0)
        y1, x2 = self.first(x2, x1)
        _begin(1)
        y2, y1 = self.second(y1, x2)
        return y1, y2

    def inverse(self, *outputs: Tensor) -> Streams:
        """Return (x1, x2)."""
        y1, y2 = outputs
        _begin(1)
        y1, x2 = self.second.inverse(y2, y1)
        _begin(0)
        x2, x1 = self.first.inverse(y1, x2)
        return x1, x2

    def reconstruct(self, *outputs: Tensor) -> Reconstruction:
        """Rebuild (x1, x2), one evaluation of g and one of f, both with a graph."""
        y1, y2 = outputs
        _begin(1)
        second = self.second.reconstruct(y2, y1)
        _begin(0)
        first = self.first.reconstruct(*second.inputs)
        x2, x1 = first.inputs

        def vjp(gradients: Streams, parameters: Sequence[Tensor]) -> tuple[Streams, list[Tensor | None]]:
            g1, g2 = gradients
            grads_in, grads_g = second.vjp((g2, g1), parameters)
            (grad_x2, grad_x1), grads_f = first.vjp(grads_in, parameters)
            return (grad_x1, grad_x2), [_add(a, b) for a, b in zip(grads_f, grads_g, strict=True)]

        return Reconstruction((x1, x2), vjp)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


class Network(nn.Module):
    """The units in a row, as a plain module: what is exported, evaluated and compared with.

    Parameters and buffers are named by unit (`units.3.f.conv1.weight`), whatever the partition.
    """

    def __init__(self, units: Iterable[nn.Module]) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Map images (n, c, h, w) to the last unit's output, for a classifier logits (n, classes)."""
        streams: Any = inputs
        for unit in self.units:
            streams = as_streams(unit(*streams))
        return cast(Tensor, streams[0])
