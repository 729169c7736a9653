"""Spaces: where a target and a guess are compared, and how an estimate there becomes parameter gradients.

`activation`: at the block's outputs; the estimate is then pulled back through the block alone.
`batch-weight`: at the parameters, gradients summed over the batch, a coefficient per tensor (or per block).
`weight`: the same for every sample's own copy of the parameters, summed over the samples afterwards.

Tangents of guesses have an order: guess by guess, in each slot by slot, and for "span" in each sample by
sample. `arranged` undoes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from petractl.estimator import Estimator, Statistics
from petractl.methods.block import Direction, Row, Setting
from petractl.methods.evaluation import Linearization
from petractl.methods.per_sample import Recording, Taps
from petractl.methods.per_sample_tangents import push_per_sample
from petractl.methods.projection import Vectors
from petractl.models.units import Streams

Slots = list[Vectors]
"""The vectors of one guess, target or estimate: one entry per coefficient (or row of coefficients)."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A block's evaluation with its graph, and in weight space the record of each sample's part in it."""

    row: Linearization
    recording: Recording | None = None

    @property
    def outputs(self) -> Streams:
        """The block's outputs, without their graph."""
        return tuple(y.detach() for y in self.row.outputs)

    def pull(self, at_outputs: Streams) -> tuple[Streams, Sequence[Tensor | None]]:
        """Return the gradients of the inputs and of the parameters; the graph stays."""
        return self.row.vjp(at_outputs, retain_graph=True)


class Space:
    """One block's side of a space; see the module's docstring."""

    def __init__(self, row: Row, choice: Estimator, *, estimates: bool = True) -> None:
        self._row = row
        self._choice = choice
        # The last block takes its true gradient: nobody asks for each sample's part in it.
        self._taps = Taps(row.modules) if choice.space == "weight" and estimates else None
        self._spans = choice.projection == "span" and choice.per_sample

    def linearize(
        self, inputs: Streams, setting: Setting, *, live: bool, statistics: Statistics = "live"
    ) -> Graph:
        """Evaluate the block with its graph."""
        if self._taps is None:
            return Graph(self._row.linearize(inputs, setting, live=live, statistics=statistics))
        with self._taps.record() as recording:
            row = self._row.linearize(inputs, setting, live=live, statistics=statistics)
        return Graph(row, recording)

    def random(self, outputs: Streams, *, samples: int, guess: str) -> Slots:
        """Draw a guess from torch's generator; `outputs` are needed for activations alone."""
        if self._choice.space == "activation":
            return self._slots([_draw(x, guess) for x in outputs])
        copies = (samples,) if self._choice.space == "weight" else ()
        return self._slots([_draw(p.detach().expand(*copies, *p.shape), guess) for p in self._row.parameters])

    def vectors(self, graph: Graph, at_outputs: Streams) -> Slots:
        """Return the gradient in this space of what has the gradient `at_outputs` at the block's outputs."""
        if self._choice.space == "activation":
            return self._slots(at_outputs)
        if graph.recording is None:
            found = graph.pull(at_outputs)[1]
            shapes = [p.shape for p in self._row.parameters]
        else:
            row = graph.row
            _, found = graph.recording.gradients(
                row.outputs,
                at_outputs,
                inputs=row.inputs,
                parameters=row.parameters,
                retain_graph=True,
            )
            shapes = [torch.Size([len(at_outputs[0]), *p.shape]) for p in self._row.parameters]
        pairs = zip(found, self._row.parameters, shapes, strict=True)
        return self._slots([p.new_zeros(shape) if g is None else g for g, p, shape in pairs])

    def parameter_gradients(self, graph: Graph | None, estimate: Slots) -> list[Tensor | None]:
        """Return the gradients of the batch's mean loss that an estimate stands for."""
        if self._choice.space == "activation":
            assert graph is not None
            return list(graph.pull(estimate[0])[1])
        tensors = [tensor for slot in estimate for tensor in slot]
        return [g.sum(0) for g in tensors] if self._choice.space == "weight" else list(tensors)

    def tangents(
        self,
        inputs: Streams,
        below: Sequence[Streams],
        guesses: Sequence[Slots],
        setting: Setting,
        *,
        statistics: Statistics,
        outputs: Streams | None,
    ) -> tuple[Streams, list[Streams], list[Streams]]:
        """Return the outputs, the tangents `below` carried through the block, and those of the guesses.

        Without `outputs` this is the block's evaluation, which its running statistics follow.
        """
        directions: list[Direction] = []
        own: list[Streams] = []
        if self._choice.space == "activation":
            own = [streams for guess in guesses for streams in self._at_outputs(guess)]
        elif self._choice.space == "batch-weight" or self._spans:
            directions = [direction for guess in guesses for direction in self._of_parameters(guess)]
        else:
            own = [
                self._of_copies(slot, first, inputs, setting, statistics)
                for guess in guesses
                for first, slot in zip(self._firsts(guess), guess, strict=True)
            ]
        if outputs is not None and not below and not directions:
            return outputs, [], own
        made, carried = self._row.push(
            inputs, below, setting, directions=directions, statistics=statistics, live=outputs is None
        )
        own = own or carried[len(below) :]
        return made if outputs is None else outputs, carried[: len(below)], own

    def arranged(self, derivatives: Tensor, *, num_guesses: int) -> list[Tensor]:
        """Return the coefficients of each slot, as `Projector.estimate` takes them, from those of tangents.

        `derivatives`: (K, n) for a coefficient per sample, (K, 1) else.
        """
        n = derivatives.shape[1]
        each = n if self._spans else 1
        slots = derivatives.reshape(num_guesses, -1, each, n)
        return [slots[:, s].reshape(num_guesses * each, n) for s in range(slots.shape[1])]

    def _slots(self, tensors: Sequence[Tensor]) -> Slots:
        one = self._choice.space == "activation" or self._choice.granularity != "tensor"
        return [tuple(tensors)] if one else [(tensor,) for tensor in tensors]

    def _at_outputs(self, guess: Slots) -> list[Streams]:
        (streams,) = guess
        if not self._spans:
            return [streams]
        # Every sample's guess in turn, laid at all samples: their derivatives are all the inner products.
        return [tuple(x[j : j + 1].expand_as(x) for x in streams) for j in range(len(streams[0]))]

    def _of_parameters(self, guess: Slots) -> list[Direction]:
        directions: list[Direction] = []
        for first, slot in zip(self._firsts(guess), guess, strict=True):
            tensors = [[x[j] for x in slot] for j in range(len(slot[0]))] if self._spans else [[*slot]]
            for row in tensors:
                direction: list[Tensor | None] = [None] * len(self._row.parameters)
                direction[first : first + len(row)] = row
                directions.append(direction)
        return directions

    def _of_copies(
        self, slot: Vectors, first: int, inputs: Streams, setting: Setting, statistics: Statistics
    ) -> Streams:
        """Return the tangent of the outputs where every sample's copy of a slot's parameters moves."""
        moved = [
            push_per_sample(
                self._row.evaluators,
                inputs,
                direction,
                position=first + n,
                microbatch=setting.microbatch,
                parameters=setting.versions,
                statistics=statistics,
            )[1]
            for n, direction in enumerate(slot)
        ]
        return tuple(torch.stack(parts).sum(0) for parts in zip(*moved, strict=True))

    @staticmethod
    def _firsts(guess: Slots) -> list[int]:
        """Return the position of each slot's first parameter."""
        lengths = [len(slot) for slot in guess]
        return [sum(lengths[:s]) for s in range(len(lengths))]


def _draw(like: Tensor, guess: str) -> Tensor:
    if not like.is_floating_point():
        return torch.zeros_like(like)
    if guess == "random-gaussian":
        return torch.randn_like(like)
    return torch.randint_like(like, 2) * 2 - 1
