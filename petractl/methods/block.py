"""A block: a row of units that learns from a loss of its own, or from guesses of a loss above it.

A block evaluates its units with a graph of this row alone, differentiates it (for the batch, or for every
sample's own copy of the parameters), and carries tangents from its input, and from its parameters, to its
output. What it is told to compute, and when, is the business of the stage that holds it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from petractl.estimator import Statistics
from petractl.methods.dual import loss_tangents
from petractl.methods.evaluation import Evaluator, Linearization, Parameters
from petractl.methods.held_statistics import held_statistics
from petractl.models.units import Streams

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits, labels) -> a loss."""

Direction = Sequence[Tensor | None]
"""A tangent, or None for zero, for each parameter of a block."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Under what a block is evaluated: the microbatch's place in training, each unit's parameters."""

    microbatch: int
    versions: Sequence[Parameters]


class Row:
    """Units in a row, evaluated as one."""

    def __init__(self, evaluators: Sequence[Evaluator], *, input_gradient: bool = True) -> None:
        self.evaluators = tuple(evaluators)
        self.parameters = [p for evaluator in evaluators for p in evaluator.parameters]
        self._input_gradient = input_gradient

    @property
    def modules(self) -> list[nn.Module]:
        """The units."""
        return [evaluator.unit for evaluator in self.evaluators]

    def plain(self, inputs: Streams, setting: Setting, *, live: bool) -> Streams:
        """Evaluate without a graph."""
        streams = inputs
        for evaluator, used in self._with(setting):
            streams = evaluator.plain(streams, microbatch=setting.microbatch, live=live, parameters=used)
        return streams

    def linearize(
        self, inputs: Streams, setting: Setting, *, live: bool, statistics: Statistics = "live"
    ) -> Linearization:
        """Evaluate with a graph whose leaves are the inputs and the parameters."""
        leaves = tuple(_leaf(x, requires_grad=self._input_gradient) for x in inputs)
        streams: Streams = leaves
        with held_statistics(statistics == "held"):
            for evaluator, used in self._with(setting):
                streams = evaluator.embedded(
                    streams, microbatch=setting.microbatch, live=live, parameters=used
                )
        return Linearization(leaves, streams, self.used(setting))

    def push(
        self,
        inputs: Streams,
        tangents: Sequence[Streams],
        setting: Setting,
        *,
        directions: Sequence[Direction] = (),
        statistics: Statistics = "live",
        live: bool = False,
    ) -> tuple[Streams, list[Streams]]:
        """Carry tangents of the inputs, then directions of the parameters, to the outputs; no graph."""
        streams, first = inputs, 0
        carried: dict[int, Streams] = dict(enumerate(tangents))
        for evaluator, used in self._with(setting):
            end = first + len(evaluator.parameters)
            rows = {len(tangents) + d: row[first:end] for d, row in enumerate(directions)}
            own = {k: row for k, row in rows.items() if any(t is not None for t in row)}
            streams, found = evaluator.push(
                streams,
                list(carried.values()),
                microbatch=setting.microbatch,
                live=live,
                parameters=used,
                directions=list(own.values()),
                statistics=statistics,
            )
            carried = _sums(zip([*carried, *own], found, strict=True))
            first = end
        count = len(tangents) + len(directions)
        return streams, [carried.get(k) or tuple(map(torch.zeros_like, streams)) for k in range(count)]

    def used(self, setting: Setting) -> list[Tensor]:
        """Return the parameters that are used, the current ones or a version."""
        rows = [evaluator.parameters if used is None else used for evaluator, used in self._with(setting)]
        return [p for row in rows for p in row]

    def _with(self, setting: Setting) -> Iterable[tuple[Evaluator, Parameters]]:
        return zip(self.evaluators, setting.versions, strict=True)


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss in two forms: the mean over the samples, and every sample's own, (n,)."""

    mean: LossFunction
    per_sample: LossFunction


class OwnLoss:
    """A block's own loss: of its auxiliary net on top of its outputs, or of the last block's logits."""

    def __init__(self, loss: Loss, auxiliary: Evaluator | None = None) -> None:
        self.loss = loss
        self.auxiliary = auxiliary

    @property
    def parameters(self) -> list[Tensor]:
        """Those of the auxiliary net."""
        return [] if self.auxiliary is None else self.auxiliary.parameters

    def gradient(
        self,
        outputs: Streams,
        labels: Tensor,
        *,
        microbatch: int,
        learns: bool = False,
        statistics: Statistics = "live",
    ) -> "LossGradient":
        """Return the gradient of the mean loss at the outputs, and at the net's parameters if it `learns`."""
        leaves = tuple(_leaf(x, requires_grad=True) for x in outputs)
        with torch.enable_grad(), held_statistics(statistics == "held"):
            streams = leaves
            if self.auxiliary is not None:
                streams = self.auxiliary.embedded(leaves, microbatch=microbatch, live=learns)
            loss = self.loss.mean(streams[0], labels)
        parameters = self.parameters if learns else []
        at = [x for x in leaves if x.requires_grad]
        found = torch.autograd.grad(loss, [*at, *parameters], allow_unused=True)
        gradients = dict(zip(map(id, at), found, strict=False))
        filled = tuple(_or_zeros(gradients.get(id(x)), x) for x in leaves)
        return LossGradient(loss.detach(), streams[0].detach(), filled, list(found[len(at) :]))

    def derivatives(
        self,
        outputs: Streams,
        tangents: Sequence[Streams],
        labels: Tensor,
        *,
        microbatch: int,
        statistics: Statistics,
    ) -> Tensor:
        """Return how every sample's share of the mean loss moves along K tangents of the outputs, (K, n)."""
        if not tangents:
            return torch.zeros(0, len(labels), device=labels.device)
        if self.auxiliary is not None:
            outputs, tangents = self.auxiliary.push(
                outputs, tangents, microbatch=microbatch, live=False, statistics=statistics
            )
        logits = [tangent[0] for tangent in tangents]
        _, moved = loss_tangents(self.loss.per_sample, outputs[0], logits, labels)
        return moved / len(labels)


@dataclass(frozen=True, slots=True)
class LossGradient:
    """A loss, its logits, and its gradients at a block's outputs and at the auxiliary net's parameters."""

    loss: Tensor
    logits: Tensor
    at_outputs: Streams
    at_parameters: list[Tensor | None]


def _sums(tangents: Iterable[tuple[int, Streams]]) -> dict[int, Streams]:
    """Add the tangents of one direction: from the unit's input and from its parameters."""
    summed: dict[int, Streams] = {}
    for k, tangent in tangents:
        before = summed.get(k)
        summed[k] = tangent if before is None else tuple(a + b for a, b in zip(before, tangent, strict=True))
    return summed


def _leaf(x: Tensor, *, requires_grad: bool) -> Tensor:
    x = x.detach()
    return x.requires_grad_() if requires_grad and x.is_floating_point() else x


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient
