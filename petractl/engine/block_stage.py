"""A stage that learns as a block: the operations, messages and counters of every other stage.

What its messages carry is the learner's business (`petractl.methods.learner`). Where nothing comes down, a
microbatch is one operation here, and its answer goes up instead of down.
"""

from collections.abc import Sequence

from torch import Tensor

from petractl.engine.diagnosis import Observer
from petractl.engine.finiteness import are_finite
from petractl.engine.messages import Activation, Gradient
from petractl.engine.replicas import Reducer
from petractl.engine.sentinel import Sentinel
from petractl.engine.stage import Counters, Totals, accumulate
from petractl.engine.tensor_tree import Tree
from petractl.engine.update import Updater
from petractl.engine.versions import Versions
from petractl.methods.block import LossFunction, Setting
from petractl.methods.evaluation import Evaluator
from petractl.methods.learner import Flight, Learner
from petractl.methods.spaces import Slots
from petractl.models.units import Streams


class BlockStage:
    """Stage `index`, which learns by `learner`; `num_streams` are those of its input."""

    sends_streams = False

    def __init__(self, learner: Learner, *, index: int, updater: Updater, num_streams: int) -> None:
        self.index = index
        self.updater = updater
        self.counters = Counters()
        self.at_epoch_start = Counters()
        self.totals = Totals()
        self.offset = 0
        self.delay = 0
        self.reducer: Reducer | None = None
        self.replica = 0
        self.replicas = 1
        self.observer: Observer | None = None
        self.sentinel: Sentinel | None = None
        self.is_alone = learner.choice.is_local or learner.choice.probes
        self._learner = learner
        self._num_streams = num_streams
        evaluators = learner.row.evaluators
        self._versions = Versions(evaluators, stashes=[True] * len(evaluators))
        self._in_flight: dict[int, tuple[Flight, int]] = {}
        self._group_samples = 0

    @property
    def evaluators(self) -> Sequence[Evaluator]:
        """The units, in order."""
        return self._learner.row.evaluators

    @property
    def guarded(self) -> Sequence[Evaluator]:
        """All that is evaluated here, the auxiliary nets too."""
        return [*self.evaluators, *self._learner.auxiliary_evaluators]

    @property
    def loss(self) -> LossFunction | None:
        """The net's loss, on the last stage."""
        own = self._learner.own_loss
        return own.loss.mean if self._learner.is_last and own is not None else None

    def forward(self, message: Activation) -> Activation:
        """Evaluate the block and send its outputs up, in forward mode with the tangents of guesses."""
        flight, tangents = self._enter(message)
        self._in_flight[message.microbatch] = (flight, self.counters.updates)
        self.counters.forwards += 1
        streams = (*flight.outputs, *(x for tangent in tangents for x in tangent))
        return Activation(message.microbatch, streams, message.labels)

    def backward(self, message: Gradient, *, group_size: int) -> Gradient:
        """Estimate the gradient with what comes down, and pass on what is for the blocks below."""
        flight, updates_at_forward = self._in_flight[message.microbatch]
        self._observe_backward(flight)
        if self.sentinel is not None:
            self.sentinel.received(flight.setting.microbatch, message.gradients, upwards=False)
        learner = self._learner
        if learner.choice.carries_tangents:
            down = learner.take_derivatives(flight, message.gradients[0])
        else:
            down = learner.take_gradients(flight, message.gradients)
        self._learn(flight, learner.gradients(flight, down.estimate), group_size, beside=down.tensors)
        del self._in_flight[message.microbatch]
        self.delay = self.counters.updates - updates_at_forward
        return Gradient(message.microbatch, None, down.tensors)

    def forward_backward(self, message: Activation, *, group_size: int) -> Activation | Gradient:
        """Run forward and backward of one microbatch, and return the message for the neighbour."""
        self.counters.forwards += 1
        self.delay = 0
        if self._learner.is_last:
            return self._finish(message, group_size)
        flight, _ = self._enter(message)
        self._observe_backward(flight)
        estimate = self._learner.estimate(flight)
        self._learn(flight, self._learner.gradients(flight, estimate), group_size, beside=flight.outputs)
        return Activation(message.microbatch, flight.outputs, message.labels)

    def update(self, *, partial: bool) -> None:
        """Step the optimiser with the averaged estimates; `partial` marks a group smaller than k."""
        if self.reducer is not None:
            self.reducer.finish(samples=self._group_samples)
        self._group_samples = 0
        self._versions.protect(flight.setting.versions for flight, _ in self._in_flight.values())
        if self.sentinel is None or self.sentinel.may_update():
            self.updater.step(delay=self.delay, position=self.counters.updates)
        else:
            self.updater.skip(position=self.counters.updates)
        self.counters.updates += 1
        self.counters.partial_groups += partial

    def microbatches_in_flight(self) -> int:
        """Return how many microbatches wait for their backward."""
        return len(self._in_flight)

    def suspended(self) -> dict[str, Tree]:
        """Return what the stage holds besides parameters, buffers and the optimiser's state."""
        flights = {str(i): entry for i, entry in self._in_flight.items()}
        versions, numbers = self._versions.suspended(
            [flight.setting.versions for flight, _ in flights.values()]
        )
        return {
            "versions": versions,
            "flights": {
                i: {
                    "version": number,
                    "updates_at_forward": updates,
                    "block": self._learner.suspended(flight),
                }
                for (i, (flight, updates)), number in zip(flights.items(), numbers, strict=True)
            },
            "group": {"microbatches": 0, "samples": self._group_samples},
        }

    def resume(self, state: dict[str, Tree]) -> None:
        """Go on from what `suspended` returned; `offset` and the parameters must be in place."""
        flights = state["flights"].items()
        used = self._versions.resumed(state["versions"], [flight["version"] for _, flight in flights])
        self._in_flight = {
            int(i): (
                self._learner.resumed(flight["block"], Setting(self._position(int(i)), versions)),
                flight["updates_at_forward"],
            )
            for (i, flight), versions in zip(flights, used, strict=True)
        }
        self.resume_group(state["group"])

    def resume_group(self, group: dict[str, Tree]) -> None:
        """Go on in the middle of a group; its gradients are the parameters'."""
        self._group_samples = group["samples"]

    def _enter(self, message: Activation) -> tuple[Flight, list[Streams]]:
        inputs, below = self._split(message.streams)
        setting = self._setting(message)
        self._observe_forward(inputs, message.labels, setting)
        if self.sentinel is not None:
            self.sentinel.received(setting.microbatch, inputs, upwards=True)
        flight, tangents = self._learner.enter(inputs, below, message.labels, setting)
        self._guard_outputs(flight, flight.outputs)
        if self.sentinel is not None and flight.own is not None:
            self.sentinel.loss(setting.microbatch, flight.own.loss)
        return flight, tangents

    def _finish(self, message: Activation, group_size: int) -> Gradient:
        """Run the last block: loss, gradients, and what goes down."""
        inputs, below = self._split(message.streams)
        setting = self._setting(message)
        self._observe_forward(inputs, message.labels, setting)
        found, gradients, down = self._learner.top(inputs, below, message.labels, setting)
        flight = Flight(setting, inputs, message.labels)
        self._guard_outputs(flight, (found.logits,))
        if self.sentinel is None or self.sentinel.loss(setting.microbatch, found.loss):
            self.totals.add(found.loss, found.logits, message.labels)
        self._observe_backward(flight)
        self._learn(flight, gradients, group_size, beside=down)
        return Gradient(message.microbatch, None, down)

    def _learn(
        self, flight: Flight, gradients: Sequence[Tensor | None], group_size: int, *, beside: Streams
    ) -> None:
        """Add a microbatch's gradients to the group's average; `beside` is what a neighbour may read."""
        self._observe_learning(flight, gradients)
        if self.sentinel is not None:
            gradients = list(gradients)
            self.sentinel.block_gradients(flight.setting.microbatch, beside, gradients)
        weight = 1.0 / group_size
        accumulate(self._learner.row.parameters, gradients, weight, messages=(*beside, *flight.inputs))
        if flight.own is not None and self._learner.own_loss is not None:
            accumulate(self._learner.own_loss.parameters, flight.own.at_parameters, weight)
        self._group_samples += len(flight.labels)
        self.counters.backwards += 1

    def _guard_outputs(self, flight: Flight, outputs: Streams) -> None:
        if self.sentinel is not None:
            i = flight.setting.microbatch
            self.sentinel.block_outputs(
                i, flight.inputs, outputs, locate=lambda: self._first_bad_unit(flight)
            )

    def _first_bad_unit(self, flight: Flight) -> int:
        """Evaluate unit by unit again, to find the first whose outputs are not finite."""
        streams, setting = flight.inputs, flight.setting
        for n, (evaluator, used) in enumerate(zip(self.evaluators, setting.versions, strict=True)):
            streams = evaluator.plain(streams, microbatch=setting.microbatch, live=False, parameters=used)
            if not are_finite(streams):
                return n
        return len(self.evaluators) - 1

    def _split(self, streams: Streams) -> tuple[Streams, list[Streams]]:
        """Part the input's streams from the tangents behind them."""
        size = self._num_streams
        return streams[:size], [streams[n : n + size] for n in range(size, len(streams), size)]

    def _setting(self, message: Activation) -> Setting:
        return Setting(self._position(message.microbatch), self._versions.current())

    def _position(self, microbatch: int) -> int:
        """Return a microbatch's place in training, over all replicas."""
        return (self.offset + microbatch) * self.replicas + self.replica

    # What an observer is told.

    def _observe_forward(self, inputs: Streams, labels: Tensor, setting: Setting) -> None:
        observer, i = self.observer, setting.microbatch
        if observer is not None and observer.wants(i):
            observer.forward(self.index, i, inputs, labels, updates=self.counters.updates)

    def _observe_backward(self, flight: Flight) -> None:
        observer, i = self.observer, flight.setting.microbatch
        if observer is not None and observer.wants(i):
            observer.backward(self.index, i, updates=self.counters.updates)

    def _observe_learning(self, flight: Flight, gradients: Sequence[Tensor | None]) -> None:
        observer, i = self.observer, flight.setting.microbatch
        if observer is None or not observer.wants(i):
            return
        in_activations = self._learner.choice.space == "activation"
        target = self._learner.target(flight) if flight.guesses else None
        for guess in flight.guesses:
            observer.guess(
                self.index,
                i,
                _tensors(guess),
                None if target is None else _tensors(target),
                space="activation" if in_activations else "weight",
            )
        first = 0
        for unit, evaluator in enumerate(self._learner.row.evaluators):
            end = first + len(evaluator.parameters)
            observer.unit_gradients(self.index, i, unit, gradients[first:end])
            first = end
        observer.finished(self.index, i)


def _tensors(slots: Slots) -> list[Tensor]:
    return [tensor for slot in slots for tensor in slot]
