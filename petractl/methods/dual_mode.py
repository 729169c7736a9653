"""Dual tensors of several directions: what every operation meets while a function runs in forward mode.

PyTorch's forward mode carries one tangent per tensor and knows a rule for nearly every operation, but its
rules for the common ones are slow: batch norm's is spelled out in a dozen operations, a convolution's
computes with a weight tangent of zeros. Here a `TorchFunctionMode` watches the operations go by. The first
direction is PyTorch's own dual tensor, so whatever is not known here stays exact. The others ride beside it,
as an attribute of the same tensor object. A common operation has a rule (`dual_rules`) that computes its
value once and then every tangent. Any other runs once per direction under PyTorch's rule, with the same
random numbers.

A tensor that has the first tangent but not the others came by a way that the mode could not see, and one
whose value has changed since its tangents were written was changed through another name. Both raise
`NotCarriedError`; the caller then takes the directions one by one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from petractl.estimator import Statistics

Directions = list[Tensor | None]
"""One tangent per direction; None is zero."""

Rule = Callable[..., Any]
"""(mode, operation, its arguments) -> its result with tangents, or NotImplemented."""

_BESIDE = "_petractl_tangents"


class NotCarriedError(Exception):
    """An operation by which several directions cannot be carried at once."""


@dataclass(frozen=True, slots=True)
class _Beside:
    """The tangents of every direction, and the value's count of in-place changes when they were written."""

    version: int
    tangents: Directions


def make(value: Tensor, tangent: Tensor) -> Tensor:
    """Return PyTorch's dual tensor of one direction."""
    dual: Tensor = forward_ad.make_dual(value, tangent)  # type: ignore[no-untyped-call]
    return dual


def unpack(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the value and the tangent of PyTorch's dual tensor; no tangent if it is none."""
    value, tangent = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
    return value, tangent


class ForwardMode(TorchFunctionMode):
    """Carries `count` directions through every operation, `rules` first."""

    def __init__(self, rules: Mapping[Any, Rule], *, count: int, statistics: Statistics) -> None:
        super().__init__()
        self.count = count
        self.statistics = statistics
        self._rules = rules

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation; inside, operations are PyTorch's own again."""
        options = kwargs or {}
        rule = self._rules.get(func)
        if rule is not None:
            result = rule(self, func, *args, **options)
            if result is not NotImplemented:
                return result
        if self.count == 1:
            return self._in_the_values_dtype(func(*args, **options))
        return self._direction_by_direction(func, args, options)

    def split(self, x: Any) -> tuple[Any, Directions | None]:
        """Return a tensor's value and tangents; None where it depends on no direction."""
        if not isinstance(x, Tensor):
            return x, None
        value, tangent = unpack(x)
        if tangent is None:
            return x, None
        if self.count == 1:
            return value, [tangent]
        beside: _Beside | None = getattr(x, _BESIDE, None)
        if beside is None or beside.version != x._version:
            raise NotCarriedError
        return value, beside.tangents

    def join(self, value: Tensor, tangents: Directions) -> Tensor:
        """Return a dual tensor; all None gives the value alone."""
        if all(t is None for t in tangents):
            return value
        first = tangents[0]
        dual = make(value, torch.zeros_like(value) if first is None else first)
        self.note(dual, tangents)
        return dual

    def note(self, dual: Tensor, tangents: Directions) -> None:
        """Write down the tangents of a tensor that is dual already, as they are after a change in place."""
        if self.count > 1:
            if tangents[0] is not None:
                tangents = [unpack(dual)[1], *tangents[1:]]
            setattr(dual, _BESIDE, _Beside(dual._version, tangents))

    def _in_the_values_dtype(self, result: Any) -> Any:
        """Mend what some of PyTorch's rules give in float32 for a value in lower precision."""
        if isinstance(result, Tensor):
            value, tangent = unpack(result)
            if tangent is not None and tangent.dtype != value.dtype:
                return make(value, tangent.to(value.dtype))
        return result

    def _direction_by_direction(self, func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        tensors = list(_tensors((args, options)))
        pairs = ((id(x), *self.split(x)) for x in tensors)
        found: dict[int, tuple[Tensor, Directions]] = {i: (x, t) for i, x, t in pairs if t is not None}
        if not found:
            return func(*args, **options)
        versions = [x._version for x in tensors]
        before = random_states(tensors)
        result = self._in_the_values_dtype(func(*args, **options))
        if versions != [x._version for x in tensors]:
            raise NotCarriedError
        outputs = list(_tensors(result))
        after = random_states(tensors)
        moves = any(t[0] is not None for _, t in found.values())
        columns: list[Directions | None] = [_tangents(outputs) if moves else None]
        for k in range(1, self.count):
            set_random_states(before)
            columns.append(self._in_direction(k, func, args, options, found))
        set_random_states(after)
        for n, y in enumerate(outputs):
            if id(y) not in found and unpack(y)[1] is not None:
                self.note(y, [None if column is None else column[n] for column in columns])
        return result

    def _in_direction(
        self,
        k: int,
        func: Any,
        args: tuple[Any, ...],
        options: dict[str, Any],
        found: Mapping[int, tuple[Tensor, Directions]],
    ) -> Directions | None:
        """Run an operation again with tangents k in place of the first; return its results' tangents."""
        if all(t[k] is None for _, t in found.values()):
            return None
        taken = {i: value if (one := t[k]) is None else make(value, one) for i, (value, t) in found.items()}
        result = func(*_replaced(args, taken), **_replaced(options, taken))
        return _tangents([self._in_the_values_dtype(y) for y in _tensors(result)])


def _tangents(outputs: Sequence[Tensor]) -> Directions:
    return [unpack(y)[1] for y in outputs]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _replaced(value: Any, taken: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return taken.get(id(value), value)
    if type(value) in (tuple, list):
        return type(value)(_replaced(item, taken) for item in value)
    if type(value) is dict:
        return {key: _replaced(item, taken) for key, item in value.items()}
    return value


def random_states(tensors: Sequence[Tensor]) -> dict[torch.device, Tensor]:
    """Return the state of every generator that an operation on these tensors may draw from."""
    devices = {x.device for x in tensors if x.device.type == "cuda"}
    states = {device: torch.cuda.get_rng_state(device) for device in devices}
    return {torch.device("cpu"): torch.get_rng_state(), **states}


def set_random_states(states: Mapping[torch.device, Tensor]) -> None:
    """Have the generators draw again what they drew from these states."""
    for device, state in states.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
