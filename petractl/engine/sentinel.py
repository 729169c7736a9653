"""Looks after the numbers of a stage: what is not finite stops the run, or costs one update.

A number that is not finite spreads: from one activation to the loss, from there to every gradient, and with
the next update to every parameter. So each stage looks at what its units give, as they give it, and names the
first place. Two ways, one class:

    stop   the run ends (`NonFinite`); no checkpoint is made of what came after
    skip   the microbatch's gradients are marked, in every stage through which it has passed, and the update
           of a group with a mark in it is left out and counted; all replicas see the mark in the average

Activations and gradients between units are looked at for every microbatch. A gradient of parameters that
alone is not finite is seen before an update that might be left out; where the run stops anyway, after it: by
the parameters, when a unit first gives something else that is not finite, and before anything is saved.

Where the device is a GPU, which is not waited for, "stop" hears of all this some microbatches later. A
stage that only *received* a bad number is then not the first place: it waits for the stage that was.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from petractl.engine.finiteness import FlagsOnDevice, are_finite, look_finite
from petractl.engine.update import Updater
from petractl.errors import PeerLost, RunError
from petractl.methods.evaluation import Evaluator
from petractl.models.units import Streams


class Kind(StrEnum):
    """What is not finite."""

    ACTIVATION = "activation"
    LOSS = "loss"
    GRADIENT = "gradient"
    """With respect to a unit's inputs."""
    PARAMETER_GRADIENT = "parameter gradient"
    RECEIVED_ACTIVATION = "received activation"
    RECEIVED_GRADIENT = "received gradient"


_RECEIVED = (Kind.RECEIVED_ACTIVATION, Kind.RECEIVED_GRADIENT)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a number was not finite: `unit` is the place in the whole net, None for what is no unit's.

    `microbatch` is the place in training, from 0, over all replicas; of a group's sum the last one's.
    """

    stage: int
    unit: int | None
    name: str
    kind: Kind
    microbatch: int

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Place":
        """Return the place that `asdict` has taken apart."""
        return cls(**{**fields, "kind": Kind(fields["kind"])})

    def order(self) -> tuple[int, bool, int]:
        """Return what sorts places of several stages: microbatches, each upwards and then downwards."""
        comes_down = self.kind not in (Kind.ACTIVATION, Kind.LOSS, Kind.RECEIVED_ACTIVATION)
        return self.microbatch, comes_down, -self.stage if comes_down else self.stage

    def __str__(self) -> str:
        of_unit = "" if self.unit is None else f" of unit {self.unit} ({self.name})"
        if self.kind is Kind.RECEIVED_ACTIVATION and self.stage == 0:
            of_unit = " (the data)"
        return f"{self.kind}{of_unit}, stage {self.stage}, microbatch {self.microbatch}"


class NonFinite(RunError):  # noqa: N818 (what happened is the name)
    """A number of the training is not finite; `place` is the first that was found."""

    stands = True

    def __init__(self, place: Place) -> None:
        self.place = place
        hint = (
            "lower optimizer.lr, lengthen training.warmup_epochs or set optimizer.clip_norm; with "
            'training.non_finite = "skip" such updates are left out; checkpoints are intact'
        )
        super().__init__(f"the run has diverged, a number is not finite: {place}", hint=hint)


@dataclass(frozen=True, slots=True)
class SkippedUpdates:
    """Updates that a stage has left out, and the first place of the first of them; None where not seen."""

    stage: int
    count: int
    first: Place | None


class Sentinel:
    """The sentinel of one stage; `evaluators` are its units, in order, `others` what else is trained there.

    A *position* is a microbatch's place in training, over all replicas. `defers`: flags stay on the device
    until they have arrived (None: on GPUs, unless it skips).
    """

    def __init__(
        self,
        stage: int,
        evaluators: Sequence[Evaluator],
        *,
        device: torch.device,
        others: Sequence[Tensor] = (),
        skips: bool = False,
        defers: bool | None = None,
    ) -> None:
        self.stage = stage
        self.skips = skips
        self._evaluators = tuple(evaluators)
        self._others = tuple(others)
        if defers is None:
            defers = device.type == "cuda" and not skips
        assert not (skips and defers), "an update is left out before it is made"
        self._flags: FlagsOnDevice[Place] | None = FlagsOnDevice(device) if defers else None
        self._received: Place | None = None
        self._last_backward = -1
        self._marked: dict[int, Place] = {}
        """The bad microbatches that are not over, each with its first place."""
        self._in_group: set[int] = set()
        """Those whose gradients are in the current group's."""
        self._skipped = 0
        self._first: Place | None = None

    # What units give.

    def received(self, position: int, streams: Streams, *, upwards: bool) -> None:
        """Look at a message, where it can only be told later whether it was bad already."""
        if self._flags is not None:
            kind = Kind.RECEIVED_ACTIVATION if upwards else Kind.RECEIVED_GRADIENT
            self._flags.note(self._place(None, kind, position), streams)

    def outputs(self, unit: int, position: int, inputs: Streams, outputs: Streams) -> None:
        """Look at what unit number `unit` of the stage made of its inputs."""
        if self._flags is not None:
            self._flags.note(self._place(unit, Kind.ACTIVATION, position), _new(outputs, inputs))
        elif not look_finite(outputs, inputs):
            self._found(self._first_of_outputs(unit, position, inputs))

    def block_outputs(
        self, position: int, inputs: Streams, outputs: Streams, *, locate: Callable[[], int]
    ) -> None:
        """Look at what all units together made of their inputs; `locate` finds the first bad unit."""
        if self._flags is not None:
            self._flags.note(self._place(None, Kind.ACTIVATION, position), _new(outputs, inputs))
        elif not look_finite(outputs, inputs):
            unit = locate()
            self._found(self._first_of_outputs(unit, position, inputs if unit == 0 else ()))

    def loss(self, position: int, loss: Tensor) -> bool:
        """Look at a loss; tell whether it may be counted."""
        if self._flags is not None:
            self._flags.note(self._place(None, Kind.LOSS, position), [loss])
        elif not look_finite((loss.detach(),)):
            self._found(self._place(None, Kind.LOSS, position))
        return position not in self._marked

    def gradients(
        self, unit: int, position: int, above: Streams, below: Streams, parameters: list[Tensor | None]
    ) -> None:
        """Look at what a unit made of the gradients at its outputs: those at its inputs.

        Those at its parameters get a mark where the update is to be left out.
        """
        self._last_backward = position
        if self._flags is not None:
            self._flags.note(self._place(unit, Kind.GRADIENT, position), _new(below, above))
        elif not look_finite(below, above):
            at_edge = unit == len(self._evaluators) - 1 and not are_finite(above)
            received = self._place(None, Kind.RECEIVED_GRADIENT, position)
            self._found(received if at_edge else self._place(unit, Kind.GRADIENT, position))
        if position in self._marked:
            self._in_group.add(position)
            _mark(parameters)

    def block_gradients(self, position: int, below: Streams, parameters: list[Tensor | None]) -> None:
        """Look at what all units together made of what came from above, as `gradients` does."""
        unit, end = 0, len(parameters)
        if self._flags is None and not look_finite(below):
            for n in range(len(self._evaluators) - 1, 0, -1):
                first = end - len(self._evaluators[n].parameters)
                if not look_finite(parameters[first:end]):
                    unit = n
                    break
                end = first
        self.gradients(unit, position, (), below, parameters)

    # What an update does.

    def mark_sums(self, parameters: Iterable[Tensor]) -> None:
        """Mark gradients that are summed up, if the update is to be left out; nothing may be in flight."""
        self._in_group.update(self._marked)
        grads = [p.grad for p in parameters if p.grad is not None]
        if self._marked and grads:
            grads[0].fill_(float("nan"))

    def may_update(self) -> bool:
        """Tell whether the group's gradients may be applied; counts what is left out."""
        if self._flags is not None:
            self._flags.send()
            self._take(self._flags.read())
        if not self.skips:
            return True
        places = [self._marked.pop(position) for position in sorted(self._in_group)]
        self._in_group.clear()
        own = self._bad_parameters(gradients=True)
        if own is None:
            return True
        self._skipped += 1
        self._first = self._first or (places[0] if places else own)
        return False

    def suspended(self) -> dict[str, Any] | None:
        """Return what was left out since the last time, as plain values; None for nothing."""
        if not self._skipped:
            return None
        first = None if self._first is None else {**asdict(self._first), "kind": str(self._first.kind)}
        return {"count": self._skipped, "first": first}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on counting from what `suspended` returned."""
        first = state["first"]
        self._skipped = state["count"]
        self._first = None if first is None else Place.of(first)

    def take_skipped(self) -> SkippedUpdates | None:
        """Return what was left out since the last time."""
        if not self._skipped:
            return None
        skipped = SkippedUpdates(self.stage, self._skipped, self._first)
        self._skipped, self._first = 0, None
        return skipped

    def settle(self) -> None:
        """Make sure that what the stage holds is finite; waits for the device.

        Raises:
            NonFinite: something of this stage was not finite.
            PeerLost: it received what was not, and waits no longer for the stage that sent it.
        """
        if self._flags is not None:
            self._flags.send()
            self._take(self._flags.read(wait=True))
        if self._received is not None:
            raise PeerLost(f"a number is not finite: {self._received}")
        own = self._bad_parameters(gradients=False)
        if own is not None:
            raise NonFinite(own)

    def _first_of_outputs(self, unit: int, position: int, inputs: Streams) -> Place:
        """Tell a unit that makes bad numbers from one that was given them, or bad parameters."""
        if unit == 0 and not are_finite(inputs):
            return self._place(None, Kind.RECEIVED_ACTIVATION, position)
        if not are_finite(self._evaluators[unit].parameters):
            return self._place(unit, Kind.PARAMETER_GRADIENT, self._last_backward)
        return self._place(unit, Kind.ACTIVATION, position)

    def _bad_parameters(self, *, gradients: bool) -> Place | None:
        """Return the last unit whose parameters, or their gradients, are not finite: gradients come down."""
        rows = [(None, self._others), *((n, e.parameters) for n, e in enumerate(self._evaluators))]
        for unit, parameters in reversed(rows):
            if not look_finite(
                [p.grad for p in parameters] if gradients else [p.detach() for p in parameters]
            ):
                return self._place(unit, Kind.PARAMETER_GRADIENT, self._last_backward)
        return None

    def _take(self, bad: Sequence[Place]) -> None:
        """Raise where this stage was first; remember where it only received what was bad."""
        if not bad or self._received is not None:
            return
        if bad[0].kind in _RECEIVED:
            self._received = bad[0]
        else:
            raise NonFinite(bad[0])

    def _found(self, place: Place) -> None:
        if not self.skips:
            raise NonFinite(place)
        self._marked.setdefault(place.microbatch, place)

    def _place(self, unit: int | None, kind: Kind, position: int) -> Place:
        if unit is None:
            return Place(self.stage, None, "", kind, position)
        evaluator = self._evaluators[unit]
        return Place(self.stage, evaluator.index, evaluator.name, kind, position)


@runtime_checkable
class Guarded(Protocol):
    """A stage that can have a sentinel; `guarded` are all its evaluators, of auxiliary nets too."""

    index: int
    updater: Updater
    sentinel: Sentinel | None

    @property
    def evaluators(self) -> Sequence[Evaluator]:
        """The units, in order."""
        ...

    @property
    def guarded(self) -> Sequence[Evaluator]:
        """All that is evaluated in the stage."""
        ...


def guard(stages: Iterable[Guarded], *, device: torch.device, skips: bool) -> list[Sentinel]:
    """Give every stage a sentinel; where updates are left out, running statistics are protected too."""
    sentinels = []
    for stage in stages:
        of_units = {id(p) for evaluator in stage.evaluators for p in evaluator.parameters}
        others = [p for p in stage.updater.parameters if id(p) not in of_units]
        stage.sentinel = Sentinel(stage.index, stage.evaluators, device=device, others=others, skips=skips)
        sentinels.append(stage.sentinel)
        if skips:
            for evaluator in stage.guarded:
                evaluator.protect_buffers()
    return sentinels


def settle_all(sentinels: Iterable[Sentinel]) -> None:
    """Settle the stages of one process: the one that was first speaks before those that only received."""
    received: PeerLost | None = None
    for sentinel in sentinels:
        try:
            sentinel.settle()
        except PeerLost as error:
            received = received or error
    if received is not None:
        raise received


def require_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse to save what is not finite, so that it never takes the place of a good checkpoint.

    Raises:
        RunError: naming the first tensor.
    """
    for name, tensor in tensors:
        if not are_finite([tensor]):
            raise RunError(
                f"{name} is no longer finite: no checkpoint was made of it",
                hint="lower optimizer.lr or set optimizer.clip_norm; the checkpoints before it are intact",
            )


def _new(made: Streams, given: Streams) -> list[Tensor]:
    """Leave out what a unit only passes on."""
    return [y for y in made if not any(y is x for x in given)]


def _mark(gradients: list[Tensor | None]) -> None:
    for n, gradient in enumerate(gradients):
        if gradient is not None:
            gradients[n] = torch.full_like(gradient, float("nan"))
            return
