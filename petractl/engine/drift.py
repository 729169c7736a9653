"""How far the inputs that reversible units rebuild have drifted from the true ones, watched in every run.

Nothing else tells of it: a rebuilt input that is wrong gives finite, plausible, wrong gradients. With the
parameters of the forward the error is rounding's; where updates came in between (PETRA), it is mostly theirs.
Every so many microbatches each stage keeps a few samples of its units' true inputs until their backward, and
compares: the memory and the time are too little to be seen. A diagnosis (`petractl.engine.diagnosis`) takes
whole microbatches, and measures much more, in one process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from petractl.engine.agreement import relative_error
from petractl.engine.diagnosis import Gradients, GuessSpace, Observer
from petractl.methods.evaluation import Evaluator
from petractl.models.units import Streams

_SAMPLES = 4


@dataclass(frozen=True, slots=True)
class Drift:
    """The worst unit of a stage since the last time: |rebuilt - true| / |true| of its inputs.

    `unit` is its place in the whole net, `microbatch` the place in training; `checks` counts microbatches.
    """

    stage: int
    unit: int
    name: str
    microbatch: int
    error: float
    checks: int

    @property
    def severity(self) -> float:
        """The error, what is not a number being the worst."""
        return math.inf if math.isnan(self.error) else self.error


class DriftWatch:
    """The observer of one stage that compares every `every`-th microbatch, the last one of so many."""

    def __init__(self, stage: int, evaluators: Sequence[Evaluator], *, every: int) -> None:
        assert every >= 1
        self.stage = stage
        self._names = [(evaluator.index, evaluator.name) for evaluator in evaluators]
        self._every = every
        self._inputs: dict[tuple[int, int], Streams] = {}
        self._errors: list[tuple[int, int, Tensor]] = []

    def wants(self, microbatch: int) -> bool:
        """Tell whether this microbatch is compared."""
        return (microbatch + 1) % self._every == 0

    def forward(self, stage: int, microbatch: int, streams: Streams, labels: Tensor, *, updates: int) -> None:
        """Take no notice."""

    def unit_inputs(self, stage: int, microbatch: int, unit: int, streams: Streams) -> None:
        """Keep a few samples of the true inputs."""
        self._inputs[microbatch, unit] = tuple(x[:_SAMPLES].clone() for x in streams)

    def backward(self, stage: int, microbatch: int, *, updates: int) -> None:
        """Take no notice."""

    def unit_gradients(
        self, stage: int, microbatch: int, unit: int, gradients: Gradients, *, inputs: Streams | None = None
    ) -> None:
        """Compare the inputs that were rebuilt."""
        truth = self._inputs.pop((microbatch, unit), None)
        if inputs is not None and truth is not None:
            few = tuple(x[:_SAMPLES] for x in inputs)
            self._errors.append((microbatch, unit, relative_error(few, truth)))

    def guess(
        self,
        stage: int,
        microbatch: int,
        guess: Gradients,
        target: Gradients | None = None,
        *,
        space: GuessSpace,
    ) -> None:
        """Take no notice."""

    def finished(self, stage: int, microbatch: int) -> None:
        """Take no notice."""

    def take(self) -> Drift | None:
        """Return the worst since the last time; waits for the device. None where nothing was compared."""
        checks = len({microbatch for microbatch, _, _ in self._errors})
        found = [
            Drift(self.stage, *self._names[unit], microbatch, float(error), checks)
            for microbatch, unit, error in self._errors
        ]
        self._errors = []
        return max(found, key=lambda drift: drift.severity, default=None)


class Observers:
    """Several observers in the place of one; each is told of the microbatches that it wants."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def wants(self, microbatch: int) -> bool:
        """Tell whether any of them wants it."""
        return any(observer.wants(microbatch) for observer in self._observers)

    def forward(self, stage: int, microbatch: int, streams: Streams, labels: Tensor, *, updates: int) -> None:
        """Pass it on."""
        for observer in self._of(microbatch):
            observer.forward(stage, microbatch, streams, labels, updates=updates)

    def unit_inputs(self, stage: int, microbatch: int, unit: int, streams: Streams) -> None:
        """Pass it on."""
        for observer in self._of(microbatch):
            observer.unit_inputs(stage, microbatch, unit, streams)

    def backward(self, stage: int, microbatch: int, *, updates: int) -> None:
        """Pass it on."""
        for observer in self._of(microbatch):
            observer.backward(stage, microbatch, updates=updates)

    def unit_gradients(
        self, stage: int, microbatch: int, unit: int, gradients: Gradients, *, inputs: Streams | None = None
    ) -> None:
        """Pass it on."""
        for observer in self._of(microbatch):
            observer.unit_gradients(stage, microbatch, unit, gradients, inputs=inputs)

    def guess(
        self,
        stage: int,
        microbatch: int,
        guess: Gradients,
        target: Gradients | None = None,
        *,
        space: GuessSpace,
    ) -> None:
        """Pass it on."""
        for observer in self._of(microbatch):
            observer.guess(stage, microbatch, guess, target, space=space)

    def finished(self, stage: int, microbatch: int) -> None:
        """Pass it on."""
        for observer in self._of(microbatch):
            observer.finished(stage, microbatch)

    def _of(self, microbatch: int) -> list[Observer]:
        return [observer for observer in self._observers if observer.wants(microbatch)]


class Watched(Protocol):
    """What is watched of a stage that rebuilds inputs."""

    index: int
    observer: Observer | None

    @property
    def evaluators(self) -> Sequence[Evaluator]:
        """The units."""
        ...


def watch_drift(stages: Sequence[Watched], *, every: int) -> list[DriftWatch]:
    """Have stages watched, beside any observer that they have; return the watches."""
    watches = []
    for stage in stages:
        watch = DriftWatch(stage.index, stage.evaluators, every=every)
        stage.observer = watch if stage.observer is None else Observers([stage.observer, watch])
        watches.append(watch)
    return watches
