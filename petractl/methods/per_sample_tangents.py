"""Tangents in weight space: how a block's output moves when every sample's copy of a parameter moves.

The direction (n, *p.shape) has a row for each sample's copy p^(i) of one parameter p. In a layer that owns p
the copies add `layer(x_i; g_i)` to the tangent of its output; from there on it is carried as any tangent is
(`dual`). With batch statistics held as constants, sample i's direction moves sample i's output alone; with
live ones the sum over the batch is what is exact.

It is one pass per parameter, so this is for small nets and for tests. Whether a net's parameters can have a
copy per sample at all is seen better by `per_sample.Taps`, which needs a gradient for it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from petractl.estimator import Statistics
from petractl.methods.dual import Tangents
from petractl.methods.dual_mode import make, unpack
from petractl.methods.evaluation import Evaluator
from petractl.methods.per_sample_generic import alone
from petractl.methods.per_sample_layers import (
    Owner,
    call_of,
    check_rows,
    find_owners,
    impossible,
    refused,
    rule_for,
    tensors_in,
)
from petractl.models.units import Streams


class Injection:
    """Directions for parameters, by their place among the block's; `calls` counts the layers reached."""

    def __init__(self, directions: Mapping[int, Tensor]) -> None:
        self.calls = 0
        self._directions = directions

    def add(self, owner: Owner, args: tuple[Any, ...], options: Mapping[str, Any], result: Any) -> Any:
        """Return a layer's result with the tangents that its parameters' copies add."""
        values = {key: _value(x) for key, x in options.items()}
        call = call_of(owner, tuple(map(_value, args)), values)
        several = isinstance(result, (tuple, list))
        outputs = list(result) if several else [result]
        places = [n for n, y in enumerate(outputs) if isinstance(y, Tensor)]
        reached = [unpack(outputs[n])[0] for n in places]
        shapes = [x.shape for x in (*tensors_in(call)[:1], *reached)]
        for key, position in owner.positions.items():
            if position not in self._directions:
                continue
            self.calls += 1
            direction = self._directions[position].to(call.parameters[key].dtype)
            check_rows(owner, shapes, size=len(direction))
            try:
                moved = rule_for(owner, call).tangent(call, key, direction, reached)
            except (RuntimeError, ValueError) as error:
                raise refused(owner, error) from error
            for n, tangent in zip(places, moved, strict=True):
                outputs[n] = _moved(outputs[n], tangent)
        return type(result)(outputs) if several else outputs[0]


@contextmanager
def injected(modules: Sequence[nn.Module], directions: Mapping[int, Tensor]) -> Iterator[Injection]:
    """Move the copies of parameters while the modules are evaluated in forward mode, one direction at once.

    `directions` maps a parameter's place among those of all the modules that require gradients to (n,
    *shape).
    """
    injection = Injection(directions)
    with ExitStack() as stack:
        for owner in find_owners(modules):
            if set(owner.positions.values()) & set(directions):
                stack.callback(_watch(owner, injection))
        yield injection


def _watch(owner: Owner, injection: Injection) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> Any:
        if alone.get():
            return result
        with torch._C.DisableTorchFunction():  # what is computed here are tangents, which have none
            return injection.add(owner, args, options, result)

    return owner.module.register_forward_hook(hook, prepend=True, with_kwargs=True).remove


def push_per_sample(
    evaluators: Sequence[Evaluator],
    inputs: Streams,
    direction: Tensor,
    *,
    position: int,
    microbatch: int,
    live: bool = False,
    parameters: Sequence[Sequence[Tensor] | None] | None = None,
    statistics: Statistics = "live",
) -> tuple[Streams, Tangents]:
    """Return a block's outputs and how they move when sample i's copy of one parameter does along row i.

    `evaluators` are of the block's units in a row, `position` is the parameter's place among theirs;
    `parameters`, `microbatch` and `live` are as in `Evaluator.push`, `parameters` for each unit.

    Raises:
        UserError: the parameter cannot have a copy for every sample.
    """
    used = parameters or [None] * len(evaluators)
    streams, tangents = inputs, None
    for evaluator, own in zip(evaluators, used, strict=True):
        if tangents is not None:
            streams, (tangents,) = evaluator.push(
                streams, [tangents], microbatch=microbatch, live=live, parameters=own, statistics=statistics
            )
        elif 0 <= position < len(evaluator.parameters):
            given = streams
            still = cast(Tangents, (None,) * len(given))
            with injected([evaluator.unit], {position: direction}) as injection:
                streams, (tangents,) = evaluator.push(
                    given, [still], microbatch=microbatch, live=live, parameters=own, statistics=statistics
                )
            if injection.calls == 0:
                _require_unused(evaluator, given, position, microbatch, own)
        else:
            streams = evaluator.plain(streams, microbatch=microbatch, live=live, parameters=own)
        position -= len(evaluator.parameters)
    assert tangents is not None, "no such parameter"
    return streams, tangents


def _require_unused(
    evaluator: Evaluator, inputs: Streams, position: int, microbatch: int, parameters: Sequence[Tensor] | None
) -> None:
    """Raise if a parameter moves the outputs although its layer was not called."""
    used = evaluator.parameters if parameters is None else parameters
    row = [torch.ones_like(p) if k == position else None for k, p in enumerate(used)]
    _, (moved,) = evaluator.push(
        inputs, [], microbatch=microbatch, live=False, parameters=parameters, directions=[row]
    )
    if any(bool(t.any()) for t in moved if t.is_floating_point()):
        raise impossible(
            f"parameter {position} of unit {evaluator.index} ({evaluator.name}) is used outside the layer"
            " that owns it"
        )


def _value(x: Any) -> Any:
    return unpack(x)[0].detach() if isinstance(x, Tensor) else x


def _moved(output: Tensor, added: Tensor) -> Tensor:
    """Return the dual tensor with a tangent added, in the output's layout and precision."""
    value, tangent = unpack(output)
    total = torch.empty_like(value).copy_(added)
    return make(value, total if tangent is None else total.add_(tangent))
