"""A stage: a row of units that runs on its own, from the messages of its neighbours alone.

All that changes during training lives here, once per stage: the units' parameters, what is kept of the
microbatches in flight, the optimiser and the counters. A stage executes operations; it does not know who
orders them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from petractl.engine.diagnosis import Observer
from petractl.engine.messages import Activation, Gradient
from petractl.engine.replicas import Reducer
from petractl.engine.sentinel import Sentinel
from petractl.engine.tensor_tree import Tree
from petractl.engine.update import Updater
from petractl.engine.versions import Versions
from petractl.methods.evaluation import Evaluator, Parameters
from petractl.methods.keeping import Keeper, UnitBackward
from petractl.models.units import Streams

Loss = Callable[[Tensor, Tensor], Tensor]
"""(output of the last unit, labels) -> mean loss over the samples."""

_Downward = tuple[Streams | None, Streams]
"""What a unit hands to the one below: its inputs, and the gradients of them."""


@dataclass(slots=True)
class Counters:
    """What a stage has done since the start of training; the proof that nothing was dropped."""

    forwards: int = 0
    backwards: int = 0
    updates: int = 0
    partial_groups: int = 0


@dataclass(slots=True)
class Totals:
    """Sums over samples on the last stage since the last reset; tensors, so that adding never waits."""

    samples: int = 0
    loss: Tensor | None = None
    correct: Tensor | None = None
    carried: int = 0
    """Of the samples, those from before the run was resumed."""

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a microbatch: its mean loss and its correct answers."""
        count = labels.shape[0]
        weighted = loss.detach().double() * count
        correct = (logits.detach().argmax(dim=1) == labels).sum()
        self.samples += count
        self.loss = weighted if self.loss is None else self.loss + weighted
        self.correct = correct if self.correct is None else self.correct + correct

    def means(self) -> tuple[float, float]:
        """Return the mean loss and the accuracy in percent; waits for the device."""
        if self.loss is None or self.correct is None:
            return float("nan"), float("nan")
        return float(self.loss) / self.samples, 100.0 * int(self.correct) / self.samples

    def reset(self) -> None:
        """Start again from nothing."""
        self.samples, self.loss, self.correct, self.carried = 0, None, None, 0


@dataclass(slots=True)
class InFlight:
    """What a stage keeps of one microbatch between its forward and its backward."""

    kept: list[Any]
    parameters: list[Parameters]
    updates_at_forward: int
    samples: int


@dataclass(slots=True)
class Stage:
    """One stage. `stashes[n]` is true where unit n's backward uses its forward's parameters.

    `loss` is given to the last stage and to no other. `sends_streams` is true where the unit below this stage
    rebuilds its input and so needs this stage's input back.

    With replicas, `reducer` averages the gradients over them. Each unit's reduction starts when the last
    microbatch of the group has given its gradient, and runs while the units below are differentiated;
    `update` waits for the rest. Nothing else can hide it: by contract the next forward follows the update.
    """

    index: int
    keepers: Sequence[Keeper]
    stashes: Sequence[bool]
    updater: Updater
    loss: Loss | None = None
    sends_streams: bool = False
    reducer: Reducer | None = None
    replica: int = 0
    replicas: int = 1
    counters: Counters = field(default_factory=Counters)
    at_epoch_start: Counters = field(default_factory=Counters)
    """The counters when the current epoch began."""
    totals: Totals = field(default_factory=Totals)
    offset: int = 0
    """Microbatches (rows, with replicas) before the current epoch.

    In-unit randomness counts from the start of training.
    """
    observer: Observer | None = None
    """Told of the microbatches that it wants."""
    sentinel: Sentinel | None = None
    """Looks after the numbers."""
    _in_flight: dict[int, InFlight] = field(default_factory=dict)
    _versions: Versions = field(init=False)
    delay: int = 0
    """Updates between the forward and the backward of the last microbatch."""
    _group_microbatches: int = 0
    _group_samples: int = 0

    is_alone: bool = field(default=False, init=False)
    """Its backward waits for the stage above."""

    def __post_init__(self) -> None:
        self._versions = Versions(self.evaluators, stashes=self.stashes)

    @property
    def evaluators(self) -> list[Evaluator]:
        """The units, in order."""
        return [keeper.evaluator for keeper in self.keepers]

    @property
    def rebuilds(self) -> bool:
        """Whether a unit rebuilds its inputs here."""
        return any(keeper.needs_outputs for keeper in self.keepers)

    @property
    def guarded(self) -> list[Evaluator]:
        """All that is evaluated here."""
        return self.evaluators

    def forward(self, message: Activation) -> Activation:
        """Run the units in order and keep what the method keeps."""
        streams, flight = self._run_forward(self.keepers, message)
        self._in_flight[message.microbatch] = flight
        self.counters.forwards += 1
        return Activation(message.microbatch, streams, message.labels)

    def backward(self, message: Gradient, *, group_size: int) -> Gradient:
        """Run the units in reverse and add 1/`group_size` of their gradients to the running average."""
        flight = self._in_flight[message.microbatch]
        self._group_microbatches += 1
        self._group_samples += flight.samples
        above = [(message.streams, message.gradients)]
        self._observe_backward(message.microbatch)
        if self.sentinel is not None:
            self.sentinel.received(self._position(message.microbatch), message.gradients, upwards=False)
        result = self._run_backward(self.keepers, above, flight, message.microbatch, group_size)
        del self._in_flight[message.microbatch]
        self.counters.backwards += 1
        self.delay = self.counters.updates - flight.updates_at_forward
        self._observe_end(message.microbatch)
        return result

    def forward_backward(self, message: Activation, *, group_size: int) -> Gradient:
        """Run the last stage's forward, loss and backward of one microbatch."""
        streams, flight = self._run_forward(self.keepers[:-1], message)
        self._group_microbatches += 1
        self._group_samples += flight.samples
        self._observe_backward(message.microbatch)
        above = [self._run_head(streams, message, group_size)]
        del streams  # the head's inputs are not needed below it
        result = self._run_backward(self.keepers[:-1], above, flight, message.microbatch, group_size)
        self.counters.forwards += 1
        self.counters.backwards += 1
        self.delay = 0
        self._observe_end(message.microbatch)
        return result

    def update(self, *, partial: bool) -> None:
        """Step the optimiser with the averaged gradient; `partial` marks a group smaller than k.

        Every replica makes every update, also one whose group held nothing. The delay told to the updater is
        this replica's own: in an epoch's last group, where shares may differ, so may the delay.
        """
        if self.reducer is not None:
            self.reducer.finish(samples=self._group_samples)
        self._group_microbatches = self._group_samples = 0
        self._versions.protect(flight.parameters for flight in self._in_flight.values())
        position = self.counters.updates
        if self.sentinel is None or self.sentinel.may_update():
            self.updater.step(delay=self.delay, position=position)
        else:
            self.updater.skip(position=position)
        self.counters.updates += 1
        self.counters.partial_groups += partial

    def microbatches_in_flight(self) -> int:
        """Return how many microbatches wait for their backward."""
        return len(self._in_flight)

    def suspended(self) -> dict[str, Tree]:
        """Return what the stage holds besides parameters, buffers and the optimiser's state.

        Tensors are those in use: nothing changes them in place.
        """
        flights = {str(i): flight for i, flight in self._in_flight.items()}
        versions, numbers = self._versions.suspended([flight.parameters for flight in flights.values()])
        return {
            "versions": versions,
            "flights": {
                i: {
                    "version": number,
                    "updates_at_forward": flight.updates_at_forward,
                    "samples": flight.samples,
                    "units": [
                        keeper.suspended(kept)
                        for keeper, kept in zip(self.keepers, flight.kept, strict=False)
                    ],
                }
                for (i, flight), number in zip(flights.items(), numbers, strict=True)
            },
            "group": {"microbatches": self._group_microbatches, "samples": self._group_samples},
        }

    def resume(self, state: dict[str, Tree]) -> None:
        """Go on from what `suspended` returned; `offset` and the parameters must be in place.

        Graphs are made again, with the parameters of their forward, and so with the same bits.
        """
        flights = state["flights"].items()
        used = self._versions.resumed(state["versions"], [flight["version"] for _, flight in flights])
        self._in_flight = {
            int(i): InFlight(
                self._rebuilt(int(i), flight["units"], parameters),
                parameters,
                flight["updates_at_forward"],
                flight["samples"],
            )
            for (i, flight), parameters in zip(flights, used, strict=True)
        }
        self.resume_group(state["group"])

    def resume_group(self, group: dict[str, Tree]) -> None:
        """Go on in the middle of a group; its gradients are the parameters'."""
        self._group_microbatches, self._group_samples = group["microbatches"], group["samples"]

    def _rebuilt(self, i: int, units: Sequence[Tree], parameters: list[Parameters]) -> list[Any]:
        # The last stage has nothing in flight, so that all units have something, if only None.
        return [
            keeper.resumed(kept, microbatch=self._position(i), parameters=used)
            for keeper, kept, used in zip(self.keepers, units, parameters, strict=True)
        ]

    def _position(self, microbatch: int) -> int:
        """Return a microbatch's place in training, over all replicas: what in-unit randomness is drawn by."""
        return (self.offset + microbatch) * self.replicas + self.replica

    def _run_forward(self, keepers: Sequence[Keeper], message: Activation) -> tuple[Streams, InFlight]:
        parameters = self._versions.current()
        streams, kept = message.streams, []
        i = self._position(message.microbatch)
        observer = self._observer(message.microbatch)
        if observer is not None:
            observer.forward(self.index, i, streams, message.labels, updates=self.counters.updates)
        sentinel = self.sentinel
        if sentinel is not None:
            sentinel.received(i, streams, upwards=True)
        for n, (keeper, used) in enumerate(zip(keepers, parameters, strict=False)):
            if observer is not None and keeper.needs_outputs:
                observer.unit_inputs(self.index, i, n, streams)
            inputs = streams
            streams, item = keeper.forward(inputs, microbatch=i, parameters=used)
            if sentinel is not None:
                sentinel.outputs(n, i, inputs, streams)
            del inputs  # what is not kept is not needed above
            kept.append(item)
        return streams, InFlight(kept, parameters, self.counters.updates, message.labels.shape[0])

    def _run_head(self, streams: Streams, message: Activation, group_size: int) -> _Downward:
        """Run the last unit's forward, the loss and the unit's backward; add the unit's gradients."""
        assert self.loss is not None, "only the last stage has a loss"
        head, i = self.keepers[-1], self._position(message.microbatch)
        outputs, kept = head.forward(streams, microbatch=i, parameters=None)
        if self.sentinel is not None:
            self.sentinel.outputs(len(self.keepers) - 1, i, streams, outputs)
        logits = outputs[0].requires_grad_()
        with torch.enable_grad():
            loss = self.loss(logits, message.labels)
        if self.sentinel is None or self.sentinel.loss(i, loss):
            self.totals.add(loss, logits, message.labels)
        gradients = torch.autograd.grad(loss, [logits])
        down = head.backward(kept, None, gradients, microbatch=i, parameters=None)
        self._observe_unit(len(self.keepers) - 1, down, message.microbatch)
        self._add(len(self.keepers) - 1, down, gradients, group_size, position=i)
        return down.inputs, down.gradients

    def _run_backward(
        self,
        keepers: Sequence[Keeper],
        above: list[_Downward],
        flight: InFlight,
        i: int,
        group_size: int,
    ) -> Gradient:
        """Run units in reverse, from what `above` holds; it is taken out, so that it dies with its last use.

        The same goes for what units hand down: a unit's backward is where a stage's memory peaks.
        """
        streams, gradients = above.pop()
        for n in range(len(keepers) - 1, -1, -1):
            keeper = keepers[n]
            if not keeper.needs_outputs:
                streams = None
            down = keeper.backward(
                flight.kept[n],
                streams,
                gradients,
                microbatch=self._position(i),
                parameters=flight.parameters[n],
            )
            flight.kept[n] = None
            self._observe_unit(n, down, i)
            self._add(n, down, gradients, group_size, position=self._position(i))
            streams, gradients = down.inputs, down.gradients
            del down
        return Gradient(i, streams if self.sends_streams else None, gradients)

    def _add(self, n: int, down: UnitBackward, gradients: Streams, group_size: int, *, position: int) -> None:
        """Add unit n's gradients to the running average; start its reduction if they are the group's last."""
        if self.sentinel is not None:
            self.sentinel.gradients(n, position, gradients, down.gradients, down.parameter_gradients)
        messages = (*gradients, *down.gradients)
        parameters = self.keepers[n].evaluator.parameters
        accumulate(parameters, down.parameter_gradients, 1.0 / group_size, messages=messages)
        if self.reducer is not None and self._group_microbatches == group_size:
            self.reducer.start(n, samples=self._group_samples)

    def _observer(self, microbatch: int) -> Observer | None:
        """Return the observer if it wants this microbatch."""
        wanted = self.observer is not None and self.observer.wants(self._position(microbatch))
        return self.observer if wanted else None

    def _observe_backward(self, microbatch: int) -> None:
        observer = self._observer(microbatch)
        if observer is not None:
            observer.backward(self.index, self._position(microbatch), updates=self.counters.updates)

    def _observe_unit(self, n: int, down: UnitBackward, microbatch: int) -> None:
        observer, keeper = self._observer(microbatch), self.keepers[n]
        if observer is not None:
            rebuilt = down.inputs if keeper.needs_outputs else None
            i = self._position(microbatch)
            observer.unit_gradients(self.index, i, n, down.parameter_gradients, inputs=rebuilt)

    def _observe_end(self, microbatch: int) -> None:
        observer = self._observer(microbatch)
        if observer is not None:
            observer.finished(self.index, self._position(microbatch))


def accumulate(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], weight: float, *, messages: Streams = ()
) -> None:
    """Add the weighted gradients to the parameters' running average, in the parameters' memory layout.

    A first gradient is taken over as it is, unless its memory is also another's: a parameter's, or a
    message's that a neighbour may still read when the optimiser writes here.
    """
    taken = {message.untyped_storage().data_ptr() for message in messages}
    for p, g in zip(parameters, gradients, strict=True):
        if g is None:
            continue
        if p.grad is not None:
            p.grad.add_(g, alpha=weight)
        elif g.stride() != p.stride() or g.dtype != p.dtype:
            # One layout for gradient, momentum and parameter: a resumed run then adds in the same order.
            p.grad = torch.empty_like(p).copy_(g).mul_(weight)
        elif weight == 1.0 and g.untyped_storage().data_ptr() not in taken:
            p.grad = g
            taken.add(g.untyped_storage().data_ptr())
        else:
            p.grad = g * weight
