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

from petractl.engine.messages import Activation, Gradient
from petractl.engine.update import Updater
from petractl.methods.keeping import Keeper, Parameters
from petractl.models.units import Streams

Loss = Callable[[Tensor, Tensor], Tensor]
"""(output of the last unit, labels) -> mean loss over the samples."""


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
        self.samples, self.loss, self.correct = 0, None, None


@dataclass(slots=True)
class InFlight:
    """What a stage keeps of one microbatch between its forward and its backward."""

    kept: list[Any]
    parameters: list[Parameters]
    updates_at_forward: int


@dataclass(slots=True)
class Stage:
    """One stage. `stashes[n]` is true where unit n's backward uses its forward's parameters.

    `loss` is given to the last stage and to no other. `sends_streams` is true where the unit below this stage
    rebuilds its input and so needs this stage's input back.
    """

    index: int
    keepers: Sequence[Keeper]
    stashes: Sequence[bool]
    updater: Updater
    loss: Loss | None = None
    sends_streams: bool = False
    counters: Counters = field(default_factory=Counters)
    totals: Totals = field(default_factory=Totals)
    offset: int = 0
    """Microbatches before the current epoch: in-unit randomness counts from the start of training."""
    _in_flight: dict[int, InFlight] = field(default_factory=dict)
    _version: list[Parameters] | None = None
    _delay: int = 0

    def forward(self, message: Activation) -> Activation:
        """Run the units in order and keep what the method keeps."""
        streams, flight = self._run_forward(self.keepers, message.streams, message.microbatch)
        self._in_flight[message.microbatch] = flight
        self.counters.forwards += 1
        return Activation(message.microbatch, streams, message.labels)

    def backward(self, message: Gradient, *, group_size: int) -> Gradient:
        """Run the units in reverse and add 1/`group_size` of their gradients to the running average."""
        flight = self._in_flight[message.microbatch]
        result = self._run_backward(
            self.keepers, message.streams, message.gradients, flight, message.microbatch, 1.0 / group_size
        )
        del self._in_flight[message.microbatch]
        self.counters.backwards += 1
        self._delay = self.counters.updates - flight.updates_at_forward
        return result

    def forward_backward(self, message: Activation, *, group_size: int) -> Gradient:
        """Run the last stage's forward, loss and backward of one microbatch."""
        assert self.loss is not None, "only the last stage has a loss"
        body, head = self.keepers[:-1], self.keepers[-1]
        streams, flight = self._run_forward(body, message.streams, message.microbatch)
        i, weight = message.microbatch, 1.0 / group_size
        outputs, kept = head.forward(streams, microbatch=self.offset + i, parameters=None)
        logits = outputs[0].requires_grad_()
        with torch.enable_grad():
            loss = self.loss(logits, message.labels)
        self.totals.add(loss, logits, message.labels)
        gradients = torch.autograd.grad(loss, [logits])
        down = head.backward(kept, None, gradients, microbatch=self.offset + i, parameters=None)
        _accumulate(head, down.parameter_gradients, weight, messages=(*gradients, *down.gradients))
        result = self._run_backward(body, down.inputs, down.gradients, flight, i, weight)
        self.counters.forwards += 1
        self.counters.backwards += 1
        self._delay = 0
        return result

    def update(self, *, partial: bool) -> None:
        """Step the optimiser with the averaged gradient; `partial` marks a group smaller than k."""
        self._protect_versions()
        self.updater.step(delay=self._delay, position=self.counters.updates)
        self.counters.updates += 1
        self.counters.partial_groups += partial

    def microbatches_in_flight(self) -> int:
        """Return how many microbatches wait for their backward."""
        return len(self._in_flight)

    def _run_forward(self, keepers: Sequence[Keeper], streams: Streams, i: int) -> tuple[Streams, InFlight]:
        parameters = self._forward_parameters()
        kept = []
        for keeper, used in zip(keepers, parameters, strict=False):
            streams, item = keeper.forward(streams, microbatch=self.offset + i, parameters=used)
            kept.append(item)
        return streams, InFlight(kept, parameters, self.counters.updates)

    def _run_backward(
        self,
        keepers: Sequence[Keeper],
        streams: Streams | None,
        gradients: Streams,
        flight: InFlight,
        i: int,
        weight: float,
    ) -> Gradient:
        for n in range(len(keepers) - 1, -1, -1):
            keeper = keepers[n]
            down = keeper.backward(
                flight.kept[n],
                streams if keeper.needs_outputs else None,
                gradients,
                microbatch=self.offset + i,
                parameters=flight.parameters[n],
            )
            flight.kept[n] = None
            messages = (*gradients, *down.gradients)
            _accumulate(keeper, down.parameter_gradients, weight, messages=messages)
            streams, gradients = down.inputs, down.gradients
        return Gradient(i, streams if self.sends_streams else None, gradients)

    def _forward_parameters(self) -> list[Parameters]:
        """Return what each unit's forward uses: None for the current parameters, or a version that will stay.

        A version shares the parameters' memory until an update is about to change it: so there are never more
        copies than versions in flight. `.data` because a `detach()` would share the counter of in-place
        changes.
        """
        if self._version is None:
            self._version = [
                [p.data.requires_grad_() for p in keeper.evaluator.parameters] if stash else None
                for keeper, stash in zip(self.keepers, self.stashes, strict=True)
            ]
        return self._version

    def _protect_versions(self) -> None:
        """Give the parameters memory of their own if a microbatch in flight still needs the old values."""
        if any(flight.parameters is self._version for flight in self._in_flight.values()):
            for keeper, stash in zip(self.keepers, self.stashes, strict=True):
                if stash:
                    for p in keeper.evaluator.parameters:
                        p.data = p.data.clone()
        self._version = None


def _accumulate(
    keeper: Keeper, gradients: Sequence[Tensor | None], weight: float, *, messages: Streams
) -> None:
    """Add the weighted gradients to the parameters' running average, in the parameters' memory layout.

    A first gradient is taken over as it is, unless its memory is also another's: a parameter's, or a
    message's that a neighbour may still read when the optimiser writes here.
    """
    taken = {message.untyped_storage().data_ptr() for message in messages}
    for p, g in zip(keeper.evaluator.parameters, gradients, strict=True):
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
