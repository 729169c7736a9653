"""A block that learns: what it computes of one microbatch, on the way up and on the way down.

What a block needs beyond itself depends on its choice (`petractl.estimator`), and so does what passes by:

- nothing: its own auxiliary loss is target and guess, or the guess is noise that is compared with it;
- the rest of the net (`Rest`), through which it looks by itself, one block's tangents at a time;
- *forward mode*: tangents of the guesses go up behind the streams, to the loss that is the target, and the
  derivatives along them, the coefficients, come down;
- *reverse mode*: gradients come down as in backpropagation; they are projected here, and go on unprojected.

The last block takes its true gradient. With one direction for the whole net (Baydin et al., "Gradients
without Backpropagation", 2022) it takes its part of that, and nothing is differentiated backwards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from petractl.estimator import FROM_ABOVE, Estimator, Kind, Statistics
from petractl.methods.block import LossGradient, OwnLoss, Row, Setting
from petractl.methods.evaluation import Evaluator
from petractl.methods.projection import Projector
from petractl.methods.randomness import derive_seed, seed_device
from petractl.methods.rest import Rest
from petractl.methods.spaces import Graph, Slots, Space
from petractl.models.auxiliary_nets import AuxiliaryNet, reinitialise
from petractl.models.units import Streams


@dataclass(frozen=True, slots=True)
class Guessing:
    """An auxiliary net for guesses alone: frozen, or with new weights at every microbatch."""

    net: AuxiliaryNet
    loss: OwnLoss
    is_new_each_time: bool


@dataclass(slots=True)
class Flight:
    """What a block keeps of one microbatch between its forward and its backward."""

    setting: Setting
    inputs: Streams
    labels: Tensor
    outputs: Streams = ()
    graph: Graph | None = None
    held: Graph | None = None
    """The block's graph with batch statistics held, once it was needed."""
    own: LossGradient | None = None
    guesses: list[Slots] = field(default_factory=list)
    num_tangents: int = 0
    moved: Tensor | None = None
    """How the target moves along the block's own guesses, as far as it is known, (K, m)."""
    moved_below: Tensor | None = None
    """The same for the block below, whose tangents end here."""


@dataclass(frozen=True, slots=True)
class Down:
    """An estimate, and the tensors for the block below."""

    estimate: Slots
    tensors: Streams


class Learner:
    """Block `index` of `num_blocks`; see the module's docstring.

    `own_loss`: the auxiliary net's, the last block's the net's, None where it is not needed. `above` is the
    rest of the net, for choices that look through it, and for observers. `seed` is the net's: random guesses
    are a function of it, the block and the microbatch.
    """

    def __init__(
        self,
        row: Row,
        choice: Estimator,
        *,
        index: int,
        num_blocks: int,
        own_loss: OwnLoss | None,
        guessing: Guessing | None = None,
        above: Rest | None = None,
        seed: int,
        device: torch.device,
    ) -> None:
        self.row = row
        self.choice = choice
        self.own_loss = own_loss
        self.is_last = index == num_blocks - 1
        self.space = Space(row, choice, estimates=not self.is_last)
        self._index = index
        self._guessing = guessing
        self._above = above
        self._rest = above if choice.probes else None
        self._seed = seed
        self._device = device
        self._projector = Projector(
            choice.projection,
            per_sample=choice.per_sample,
            is_random=choice.has_random_guess,
            normalise_random=choice.normalise_random,
        )
        self._kinds = choice.kinds
        self._forward_mode = choice.measures and choice.resolved_derivative == "forward"
        reverse = choice.measures and choice.resolved_derivative == "reverse"
        pulls_down = choice.sends_down and not choice.carries_tangents
        self._keeps_graph = choice.space == "activation" or reverse or pulls_down

    @property
    def auxiliary_evaluators(self) -> list[Evaluator]:
        """Those of the block's own auxiliary nets."""
        losses = [self.own_loss, self._guessing.loss if self._guessing is not None else None]
        return [loss.auxiliary for loss in losses if loss is not None and loss.auxiliary is not None]

    # Upwards.

    def enter(
        self, inputs: Streams, below: Sequence[Streams], labels: Tensor, setting: Setting
    ) -> tuple[Flight, list[Streams]]:
        """Evaluate the block and make its guesses; return also the tangents that go up.

        `below` are tangents of the inputs, of guesses of the blocks below.
        """
        flight = Flight(setting, inputs, labels)
        if self._keeps_graph or not self.choice.has_random_guess:
            flight.graph = self.space.linearize(inputs, setting, live=True)
            self._leave(flight, flight.graph.outputs)
        elif not self._forward_mode:
            self._leave(flight, self.row.plain(inputs, setting, live=True))
        flight.guesses = self._guesses(flight)
        tangents = self._carry(flight, below) if self._forward_mode and flight.guesses else []
        if not self._keeps_graph:
            flight.graph = None
        return flight, tangents

    def _leave(self, flight: Flight, outputs: Streams) -> None:
        """Take the block's outputs, and the gradient of its own loss where that is in use."""
        flight.outputs = outputs
        if self.own_loss is not None and not self.is_last:
            i = flight.setting.microbatch
            flight.own = self.own_loss.gradient(outputs, flight.labels, microbatch=i, learns=True)

    def _guesses(self, flight: Flight) -> list[Slots]:
        """Return the guesses that need nothing from above, or what the block sees there by itself."""
        choice, i = self.choice, flight.setting.microbatch
        seed_device(derive_seed(self._seed, "guess", self._index, i), device=self._device)
        if choice.has_random_guess:
            like, samples = flight.outputs, len(flight.labels)
            return [
                self.space.random(like, samples=samples, guess=choice.guess) for _ in range(choice.directions)
            ]
        if self._guessing is not None:
            if self._guessing.is_new_each_time:
                reinitialise(self._guessing.net)
            found = self._guessing.loss.gradient(flight.outputs, flight.labels, microbatch=i)
            assert flight.graph is not None
            return [self.space.vectors(flight.graph, found.at_outputs)]
        if choice.guess not in FROM_ABOVE:
            return [self._vectors(flight, choice.guess, "live", {})]
        if self._rest is None:
            return []
        loss = "global" if choice.guess == "global" else "above"
        seen = self._rest.gradient(loss, flight.outputs, flight.labels, microbatch=i)
        return [self._vectors(flight, choice.guess, "live", {(loss, "live"): seen})]

    def _carry(self, flight: Flight, below: Sequence[Streams]) -> list[Streams]:
        """Carry tangents of the inputs and of the guesses as far as this block can; return the others."""
        made, carried, own = self.space.tangents(
            flight.inputs,
            below,
            flight.guesses,
            flight.setting,
            statistics=self.choice.resolved_statistics,
            outputs=flight.outputs or None,
        )
        if not flight.outputs:
            self._leave(flight, made)
        flight.num_tangents = len(own)
        if self.choice.granularity == "net":
            return _sums(carried, own) if below else own
        if self.choice.target in ("local", "sum"):
            flight.moved = self.own_derivatives(flight, own)
        if self._rest is not None:
            flight.moved = _plus(flight.moved, self._seen_derivatives(flight, own))
        if self._rest is not None or self.choice.target == "local":
            return []
        if self.choice.target == "global":
            return [*carried, *own]
        flight.moved_below = self.own_derivatives(flight, carried)
        return own

    def own_derivatives(self, flight: Flight, tangents: Sequence[Streams]) -> Tensor:
        """Return how the block's own loss moves along tangents of its outputs, (K, m)."""
        if not tangents:
            return torch.zeros(0, len(flight.labels) if self.choice.per_sample else 1, device=self._device)
        assert self.own_loss is not None
        return self._in_rows(
            self.own_loss.derivatives(
                flight.outputs,
                tangents,
                flight.labels,
                microbatch=flight.setting.microbatch,
                statistics=self.choice.resolved_statistics,
            )
        )

    def _seen_derivatives(self, flight: Flight, tangents: Sequence[Streams]) -> Tensor:
        """Return how the target moves along tangents of the block's outputs, seen through the rest."""
        assert self._rest is not None
        return self._in_rows(
            self._rest.derivatives(
                "global" if self.choice.target == "global" else "above",
                flight.outputs,
                tangents,
                flight.labels,
                microbatch=flight.setting.microbatch,
                statistics=self.choice.resolved_statistics,
            )
        )

    def _in_rows(self, moved: Tensor) -> Tensor:
        """Return (K, n) where every sample has a coefficient, else the sums over the batch, (K, 1)."""
        return moved if self.choice.per_sample else moved.sum(1, keepdim=True)

    # At the top.

    def top(
        self, inputs: Streams, below: Sequence[Streams], labels: Tensor, setting: Setting
    ) -> tuple[LossGradient, list[Tensor | None], Streams]:
        """Return the last block's loss, its parameters' gradients, and the tensors for the block below."""
        assert self.own_loss is not None
        if self.choice.granularity == "net":
            return self._top_of_net(inputs, below, labels, setting)
        graph = self.space.linearize(inputs, setting, live=True)
        flight = Flight(setting, inputs, labels, graph.outputs, graph)
        found = self.own_loss.gradient(flight.outputs, labels, microbatch=setting.microbatch)
        at_inputs, gradients = graph.pull(found.at_outputs)
        if self.choice.carries_tangents and not self.choice.probes:
            return found, list(gradients), (self._derivatives_at_top(flight, below),)
        down = [
            at_inputs if statistics == "live" else self._held_gradient(flight)
            for _, statistics in self._kinds
        ]
        return found, list(gradients), tuple(x for streams in down for x in streams)

    def _top_of_net(
        self, inputs: Streams, below: Sequence[Streams], labels: Tensor, setting: Setting
    ) -> tuple[LossGradient, list[Tensor | None], Streams]:
        flight, tangents = self.enter(inputs, below, labels, setting)
        assert self.own_loss is not None
        found = self.own_loss.gradient(flight.outputs, labels, microbatch=setting.microbatch)
        flight.moved = self.own_derivatives(flight, tangents)
        gradients = self.gradients(flight, self.estimate(flight))
        return found, gradients, () if flight.moved is None else (flight.moved,)

    def _derivatives_at_top(self, flight: Flight, below: Sequence[Streams]) -> Tensor:
        statistics = self.choice.resolved_statistics
        carried: Sequence[Streams] = []
        if below:
            _, carried = self.row.push(flight.inputs, below, flight.setting, statistics=statistics)
        return self.own_derivatives(flight, carried)

    def _held_gradient(self, flight: Flight) -> Streams:
        """Return the gradient of the block's own loss at its inputs, batch statistics held."""
        assert self.own_loss is not None
        i = flight.setting.microbatch
        found = self.own_loss.gradient(flight.outputs, flight.labels, microbatch=i, statistics="held")
        return self._graph(flight, "held").pull(found.at_outputs)[0]

    # Downwards.

    def take_derivatives(self, flight: Flight, moved: Tensor) -> Down:
        """Forward mode: take the derivatives along the own guesses out of those of all, (K, m)."""
        if self.choice.granularity == "net":
            flight.moved, rest = moved, moved
        elif self.choice.target == "global":
            first = len(moved) - flight.num_tangents
            rest, flight.moved = moved[:first], moved[first:]
        else:
            assert flight.moved_below is not None
            flight.moved, rest = _plus(flight.moved, moved), flight.moved_below
        return Down(self.estimate(flight), (rest,))

    def take_gradients(self, flight: Flight, tensors: Streams) -> Down:
        """Reverse mode: project the gradients at the outputs, and pull them to the inputs."""
        size = len(flight.outputs)
        at = {kind: tensors[n * size : (n + 1) * size] for n, kind in enumerate(self._kinds)}
        estimate = self.estimate(flight, at)
        if self._index == 0:
            return Down(estimate, ())
        pulled = [
            self._graph(flight, statistics).pull(
                at[loss, statistics]
                if loss == "global"
                else self._at_outputs(flight, "local", statistics, {})
            )[0]
            for loss, statistics in self._kinds
        ]
        return Down(estimate, tuple(x for streams in pulled for x in streams))

    def estimate(self, flight: Flight, at: Mapping[Kind, Streams] | None = None) -> Slots:
        """Return the projection of the target on the guesses; `at` are gradients that came down."""
        at, choice = at or {}, self.choice
        guesses = flight.guesses = flight.guesses or [self._vectors(flight, choice.guess, "live", at)]
        slots = range(len(guesses[0]))
        coefficients: Sequence[Tensor | None]
        if not choice.uses_target:
            coefficients = self._random_signs(flight, guesses)
        elif choice.is_identity:
            coefficients = [None for _ in slots]
        elif choice.resolved_derivative == "forward":
            if flight.moved is None:
                self._carry(flight, [])
            assert flight.moved is not None
            coefficients = self.space.arranged(flight.moved, num_guesses=len(guesses))
        else:
            target = self._vectors(flight, choice.target, choice.resolved_statistics, at)
            coefficients = [self._projector.coefficients(target[s], [g[s] for g in guesses]) for s in slots]
        return [self._projector.estimate([g[s] for g in guesses], coefficients[s]) for s in slots]

    def target(self, flight: Flight) -> Slots | None:
        """Return the target itself, by backpropagation, for who observes; None where that is end-to-end's."""
        choice, i = self.choice, flight.setting.microbatch
        if choice.target == "global" and choice.space != "weight":
            return None
        at: dict[Kind, Streams] = {}
        if choice.target != "local":
            assert self._above is not None
            loss = "global" if choice.target == "global" else "above"
            seen = self._above.gradient(loss, flight.outputs, flight.labels, microbatch=i)
            at[loss, "live"] = seen
        graph = flight.graph or self.space.linearize(flight.inputs, flight.setting, live=False)
        return self.space.vectors(graph, self._at_outputs(flight, choice.target, "live", at))

    def gradients(self, flight: Flight, estimate: Slots) -> list[Tensor | None]:
        """Return the parameter gradients that an estimate stands for."""
        return self.space.parameter_gradients(flight.graph, estimate)

    # In the middle of an epoch, saved and loaded.

    def suspended(self, flight: Flight) -> dict[str, Any]:
        """Return from what a flight can be made again; copies where learning may change it in place."""
        own = flight.own
        return {
            "inputs": flight.inputs,
            "labels": flight.labels,
            "outputs": flight.outputs,
            "has_graph": flight.graph is not None,
            "own": None
            if own is None
            else {
                "loss": own.loss,
                "logits": own.logits,
                "at_outputs": own.at_outputs,
                "at_parameters": [None if g is None else g.clone() for g in own.at_parameters],
            },
            "guesses": [[[x.clone() for x in slot] for slot in guess] for guess in flight.guesses],
            "num_tangents": flight.num_tangents,
            "moved": flight.moved,
            "moved_below": flight.moved_below,
        }

    def resumed(self, saved: Mapping[str, Any], setting: Setting) -> Flight:
        """Make a flight again; its graph has the same bits, and running statistics stay as they are."""
        inputs, own = tuple(saved["inputs"]), saved["own"]
        flight = Flight(setting, inputs, saved["labels"], tuple(saved["outputs"]))
        if saved["has_graph"]:
            flight.graph = self.space.linearize(inputs, setting, live=False)
        if own is not None:
            at_outputs = tuple(own["at_outputs"])
            flight.own = LossGradient(own["loss"], own["logits"], at_outputs, own["at_parameters"])
        flight.guesses = [[tuple(slot) for slot in guess] for guess in saved["guesses"]]
        flight.num_tangents = saved["num_tangents"]
        flight.moved, flight.moved_below = saved["moved"], saved["moved_below"]
        return flight

    def _random_signs(self, flight: Flight, guesses: Sequence[Slots]) -> list[Tensor]:
        seed = derive_seed(self._seed, "sign", self._index, flight.setting.microbatch)
        seed_device(seed, device=self._device)
        rows = len(flight.labels) if self.choice.per_sample else 1
        like = guesses[0][0][0]
        return [torch.randint_like(like.new_empty(len(guesses), rows), 2) * 2 - 1 for _ in guesses[0]]

    def _vectors(
        self, flight: Flight, loss: str, statistics: Statistics, at: Mapping[Kind, Streams]
    ) -> Slots:
        """Return the gradient of a loss in the space of the choice."""
        graph = self._graph(flight, statistics if self.choice.space != "activation" else "live")
        return self.space.vectors(graph, self._at_outputs(flight, loss, statistics, at))

    def _at_outputs(
        self, flight: Flight, loss: str, statistics: Statistics, at: Mapping[Kind, Streams]
    ) -> Streams:
        """Return the gradient of a loss at the block's outputs."""
        if loss == "global":
            return at["global", statistics]
        if loss == "above":
            return at["above", statistics]
        assert flight.own is not None
        assert self.own_loss is not None
        own = flight.own.at_outputs
        if statistics == "held":
            i = flight.setting.microbatch
            own = self.own_loss.gradient(
                flight.outputs, flight.labels, microbatch=i, statistics="held"
            ).at_outputs
        if loss == "local":
            return own
        return tuple(map(torch.add, own, at["above", statistics]))

    def _graph(self, flight: Flight, statistics: Statistics) -> Graph:
        assert flight.graph is not None
        if statistics == "live":
            return flight.graph
        if flight.held is None:
            flight.held = self.space.linearize(flight.inputs, flight.setting, live=False, statistics="held")
        return flight.held


def _sums(a: Sequence[Streams], b: Sequence[Streams]) -> list[Streams]:
    return [tuple(map(torch.add, x, y)) for x, y in zip(a, b, strict=True)]


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b
