"""Forward and backward of one unit, one class for each thing that may be kept in between.

All three have the same two calls, so that a stage is a loop over its units and a method is a choice of
classes: `forward(inputs) -> outputs, kept` and `backward(kept, outputs, gradients) -> inputs, gradients of
them, gradients of the parameters`. Going down, a unit hands its inputs to the unit below, for which they are
the outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from petractl.methods.evaluation import Evaluator, Linearization, Parameters
from petractl.methods.family import Keep
from petractl.models.units import Streams


@dataclass(frozen=True, slots=True)
class UnitBackward:
    """What a unit's backward gives: its inputs, their gradients, and the parameters' gradients."""

    inputs: Streams
    gradients: Streams
    parameter_gradients: list[Tensor | None]


class Keeper(Protocol):
    """One unit's forward and backward."""

    evaluator: Evaluator
    needs_outputs: bool

    def forward(self, inputs: Streams, *, microbatch: int, parameters: Parameters) -> tuple[Streams, Any]:
        """Return the outputs, without a graph, and what is kept."""
        ...

    def backward(
        self,
        kept: Any,
        outputs: Streams | None,
        gradients: Streams,
        *,
        microbatch: int,
        parameters: Parameters,
    ) -> UnitBackward:
        """Return the vector-Jacobian product at the inputs."""
        ...

    def suspended(self, kept: Any) -> Streams | None:
        """Return the tensors from which what is kept can be made again."""
        ...

    def resumed(self, tensors: Sequence[Tensor] | None, *, microbatch: int, parameters: Parameters) -> Any:
        """Make what is kept again, with the same bits; running statistics stay as they are."""
        ...


class GraphKeeper:
    """Keeps the graph of the forward: no recomputation, the most memory."""

    needs_outputs = False

    def __init__(self, evaluator: Evaluator, *, input_gradient: bool = True) -> None:
        self.evaluator = evaluator
        self._input_gradient = input_gradient

    def forward(
        self, inputs: Streams, *, microbatch: int, parameters: Parameters
    ) -> tuple[Streams, Linearization]:
        """Evaluate with a graph and keep it."""
        kept = self.evaluator.linearize(
            inputs,
            microbatch=microbatch,
            live=True,
            parameters=parameters,
            input_gradient=self._input_gradient,
        )
        return tuple(y.detach() for y in kept.outputs), kept

    def backward(
        self,
        kept: Linearization,
        outputs: Streams | None,
        gradients: Streams,
        *,
        microbatch: int,
        parameters: Parameters,
    ) -> UnitBackward:
        """Differentiate the kept graph."""
        grads_in, grads = kept.vjp(gradients)
        return UnitBackward(tuple(x.detach() for x in kept.inputs), grads_in, grads)

    def suspended(self, kept: Linearization) -> Streams:
        """Return the inputs: a graph cannot be saved."""
        return kept.inputs

    def resumed(
        self, tensors: Sequence[Tensor] | None, *, microbatch: int, parameters: Parameters
    ) -> Linearization:
        """Evaluate with a graph again."""
        assert tensors is not None, "a graph is made from its inputs"
        return self.evaluator.linearize(
            tuple(tensors),
            microbatch=microbatch,
            live=False,
            parameters=parameters,
            input_gradient=self._input_gradient,
        )


class InputKeeper:
    """Keeps the input and evaluates again, with a graph, in the backward."""

    needs_outputs = False

    def __init__(
        self, evaluator: Evaluator, *, statistics_in_forward: bool, input_gradient: bool = True
    ) -> None:
        self.evaluator = evaluator
        self._statistics_in_forward = statistics_in_forward
        self._input_gradient = input_gradient

    def forward(self, inputs: Streams, *, microbatch: int, parameters: Parameters) -> tuple[Streams, Streams]:
        """Evaluate without a graph and keep the input."""
        outputs = self.evaluator.plain(
            inputs, microbatch=microbatch, live=self._statistics_in_forward, parameters=parameters
        )
        return outputs, inputs

    def backward(
        self,
        kept: Streams,
        outputs: Streams | None,
        gradients: Streams,
        *,
        microbatch: int,
        parameters: Parameters,
    ) -> UnitBackward:
        """Evaluate the kept input with a graph, then differentiate."""
        again = self.evaluator.linearize(
            kept,
            microbatch=microbatch,
            live=not self._statistics_in_forward,
            parameters=parameters,
            input_gradient=self._input_gradient,
        )
        grads_in, grads = again.vjp(gradients)
        return UnitBackward(kept, grads_in, grads)

    def suspended(self, kept: Streams) -> Streams:
        """Return the inputs."""
        return kept

    def resumed(
        self, tensors: Sequence[Tensor] | None, *, microbatch: int, parameters: Parameters
    ) -> Streams:
        """Return the inputs."""
        assert tensors is not None, "inputs are kept"
        return tuple(tensors)


class Reconstructor:
    """Keeps nothing: rebuilds a reversible unit's input from its output, fused with the differentiation."""

    needs_outputs = True

    def __init__(self, evaluator: Evaluator, *, statistics_in_forward: bool) -> None:
        self.evaluator = evaluator
        self._statistics_in_forward = statistics_in_forward

    def forward(self, inputs: Streams, *, microbatch: int, parameters: Parameters) -> tuple[Streams, None]:
        """Evaluate without a graph; nothing is kept."""
        outputs = self.evaluator.plain(
            inputs, microbatch=microbatch, live=self._statistics_in_forward, parameters=parameters
        )
        return outputs, None

    def backward(
        self,
        kept: None,
        outputs: Streams | None,
        gradients: Streams,
        *,
        microbatch: int,
        parameters: Parameters,
    ) -> UnitBackward:
        """Rebuild the inputs and differentiate, with one evaluation of the inner function."""
        assert outputs is not None, "a reversible unit's backward needs its outputs"
        rebuilt = self.evaluator.reconstruct(
            outputs, microbatch=microbatch, live=not self._statistics_in_forward, parameters=parameters
        )
        used = self.evaluator.parameters if parameters is None else parameters
        grads_in, grads = rebuilt.vjp(gradients, used)
        return UnitBackward(rebuilt.inputs, grads_in, grads)

    def suspended(self, kept: None) -> None:
        """Return nothing."""
        return None

    def resumed(self, tensors: Sequence[Tensor] | None, *, microbatch: int, parameters: Parameters) -> None:
        """Return nothing."""
        return None


def build_keeper(
    evaluator: Evaluator, *, keep: Keep, statistics_in_forward: bool, input_gradient: bool
) -> Keeper:
    """Return the class for what is kept; `input_gradient` is false for the net's first unit (images)."""
    if keep is Keep.GRAPH:
        return GraphKeeper(evaluator, input_gradient=input_gradient)
    if keep is Keep.INPUT:
        return InputKeeper(
            evaluator, statistics_in_forward=statistics_in_forward, input_gradient=input_gradient
        )
    return Reconstructor(evaluator, statistics_in_forward=statistics_in_forward)
