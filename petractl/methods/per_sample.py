"""Gradients in weight space: one for each sample and parameter, as if every sample had a copy of its own.

Sample i of a batch of n sees the copy p^(i) of each parameter p, all copies equal; dL/dp^(i) for all i is one
tensor (n, *p.shape), whose sum over i is the batch's gradient. Training-mode batch norm, which mixes the
samples, does not blur this: its scale and shift have copies too.

`Taps` watches the layers that own parameters. One backward gives the gradients of the layers' outputs, and
each layer's own rule (`per_sample_rules`) the rest, one parameter at a time when it is asked for, for all
together would be n copies of the block. A layer called twice adds, and so do layers that share a parameter.
A parameter used behind the back of the layer that owns it cannot be seen: it is found because the sum over
the samples then differs from the batch's gradient, which is looked at once for every parameter.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from petractl.methods.per_sample_generic import Call, alone, tensors_of, tolerance
from petractl.methods.per_sample_layers import (
    Owner,
    call_of,
    check_rows,
    find_owners,
    impossible,
    refused,
    rule_for,
    tensors_in,
    trained_parameters,
)
from petractl.models.units import Streams


@dataclass(frozen=True, slots=True)
class _Tap:
    """What is known of one call of a layer.

    `versions` count the changes in place of what it was called with; `shapes` are those of its first input
    and its outputs; `edges` are where the graph meets its outputs, whatever is done to them afterwards.
    """

    owner: Owner
    call: Call
    versions: list[int]
    shapes: list[torch.Size]
    edges: list[GradientEdge | None]


@dataclass(frozen=True, slots=True)
class _Found:
    """A tap and the gradients of its outputs."""

    tap: _Tap
    gradients: list[Tensor | None]

    def of(self, key: str) -> Tensor:
        """Return dL/dp^(i) of one parameter of the layer, as far as this call goes."""
        owner, call = self.tap.owner, self.tap.call
        if self.tap.versions != [x._version for x in tensors_in(call)]:
            raise impossible(f"the input of {owner} is changed in place after it was used")
        parameter = call.parameters[key]
        with torch.no_grad(), torch.autocast(parameter.device.type, enabled=False):
            try:
                return rule_for(owner, call).gradient(call, key, self.gradients).to(parameter.dtype)
            except (RuntimeError, ValueError) as error:
                raise refused(owner, error) from error


class ParameterGradients(Sequence["Tensor | None"]):
    """The gradients (n, *shape) of a block's parameters, None where one has no part in the outputs.

    Each is computed when it is taken, every time: together they need n times the block's memory.
    """

    def __init__(self, uses: Sequence[Sequence[tuple[_Found, str]]]) -> None:
        self._uses = uses

    def __len__(self) -> int:
        return len(self._uses)

    def tolerance(self, k: int) -> float:
        """Return how far rounding may take the sum over samples from the batch's gradient, relatively."""
        given = (g.dtype for found, _ in self._uses[k] for g in found.gradients if g is not None)
        return max((tolerance(dtype) for dtype in given), default=0.0)

    @overload
    def __getitem__(self, k: int) -> Tensor | None: ...
    @overload
    def __getitem__(self, k: slice) -> "ParameterGradients": ...
    def __getitem__(self, k: int | slice) -> "Tensor | ParameterGradients | None":
        """Return the gradient of parameter k."""
        if isinstance(k, slice):
            return ParameterGradients(self._uses[k])
        total: Tensor | None = None
        for found, key in self._uses[k]:
            one = found.of(key)
            total = one if total is None else total + one
        return total


@dataclass(slots=True)
class Recording:
    """One evaluation of the block."""

    _taps: "Taps"
    _calls: list[_Tap] = field(default_factory=list)

    def gradients(
        self,
        outputs: Streams,
        output_gradients: Streams,
        *,
        inputs: Streams,
        parameters: Sequence[Tensor] | None = None,
        retain_graph: bool = False,
    ) -> tuple[Streams, ParameterGradients]:
        """Return the gradients of the leaf inputs, and of the parameters one per sample.

        `inputs` that cannot have a gradient beside others that can get zeros; where none can, there are none.
        `parameters` are those that the evaluation used, None for the current ones.

        Raises:
            UserError: a parameter cannot have a copy for every sample.
        """
        pairs = [(y, g) for y, g in zip(outputs, output_gradients, strict=True) if y.requires_grad]
        for tap in self._calls:
            check_rows(tap.owner, tap.shapes, size=len(outputs[0]))
        used = self._taps.parameters if parameters is None else parameters
        asked = self._taps.to_check(self._calls)
        wanted = [x for x in inputs if x.requires_grad]
        edges = [edge for tap in self._calls for edge in tap.edges if edge is not None]
        targets: list[Any] = [*wanted, *edges, *(used[k] for k in asked)]
        found: Sequence[Tensor | None] = [None] * len(targets)
        if pairs and targets:
            ends, seeds = zip(*pairs, strict=True)
            found = torch.autograd.grad(ends, targets, seeds, allow_unused=True, retain_graph=retain_graph)
        rest = iter(found)
        of_inputs = {id(x): next(rest) for x in wanted}
        result = self._collect(rest)
        self._taps.check(result, dict(zip(asked, rest, strict=True)))
        pairs_in = [(x, of_inputs.get(id(x))) for x in inputs] if wanted else []
        return tuple(torch.zeros_like(x) if g is None else g for x, g in pairs_in), result

    def _collect(self, gradients: Iterator[Tensor | None]) -> ParameterGradients:
        uses: list[list[tuple[_Found, str]]] = [[] for _ in self._taps.parameters]
        for tap in self._calls:
            found = _Found(tap, [None if edge is None else next(gradients) for edge in tap.edges])
            if any(g is not None for g in found.gradients):
                for key, position in tap.owner.positions.items():
                    uses[position].append((found, key))
        return ParameterGradients(uses)

    def note(self, owner: Owner, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        """Record one call of a layer."""
        outputs = tensors_of(result)
        if alone.get() or not any(y.requires_grad for y in outputs):
            return
        call = call_of(owner, tuple(map(_detached, args)), {k: _detached(x) for k, x in options.items()})
        inputs = tensors_in(call)
        edges = [get_gradient_edge(y) if y.requires_grad else None for y in outputs]
        shapes = [x.shape for x in (*inputs[:1], *outputs)]
        self._calls.append(_Tap(owner, call, [x._version for x in inputs], shapes, edges))


class Taps:
    """Watches the layers of a block, which is one module or several in a row; made once per block."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        named = trained_parameters(modules)
        self.names = list(named)
        self.parameters = list(named.values())
        self._owners = find_owners(modules)
        self._unchecked = set(range(len(named)))

    @contextmanager
    def record(self) -> Iterator[Recording]:
        """Record what is evaluated inside: the block, once, with a graph."""
        recording = Recording(self)
        with ExitStack() as stack:
            for owner in self._owners:
                handle = owner.module.register_forward_hook(
                    _noting(recording, owner), prepend=True, with_kwargs=True
                )
                stack.callback(handle.remove)
            yield recording

    def to_check(self, calls: Sequence[_Tap]) -> list[int]:
        """Return the parameters whose batch gradient has to be seen: not checked yet, or not recorded."""
        recorded = {k for tap in calls for k in tap.owner.positions.values()}
        return [k for k in range(len(self.parameters)) if k in self._unchecked or k not in recorded]

    def check(self, gradients: ParameterGradients, of_batch: Mapping[int, Tensor | None]) -> None:
        """Compare sums over samples with the batch's gradients.

        Raises:
            UserError: they differ.
        """
        for k, expected in of_batch.items():
            if _agree(gradients[k], expected, name=self.names[k], within=gradients.tolerance(k)):
                self._unchecked.discard(k)


@torch.no_grad()
def _agree(found: Tensor | None, expected: Tensor | None, *, name: str, within: float) -> bool:
    """Tell whether they are seen to agree; gradients of zero, or not finite, show nothing."""
    if found is None and expected is None:
        return False
    batch = found.new_zeros(found.shape[1:]) if expected is None and found is not None else expected
    assert batch is not None
    copies = batch.unsqueeze(0) * 0 if found is None else found
    error = float((copies.sum(0) - batch).norm())
    scale = float(copies.abs().sum(0).norm() + batch.norm())
    if not math.isfinite(error) or not math.isfinite(scale):
        return False
    if error <= within * scale:
        return scale > 0
    raise impossible(
        f"the gradients of parameter {name} per sample do not add up to the batch's gradient: it is used"
        " outside the layer that owns it, or the layer mixes samples or draws random numbers"
    )


def _noting(recording: Recording, owner: Owner) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        recording.note(owner, args, options, result)

    return hook


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x
