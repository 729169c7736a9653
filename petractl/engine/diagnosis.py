"""How good are the gradients that a stage learns from? Chosen microbatches are compared with backpropagation.

A stage learns from an estimate: the gradient of old activations at new parameters, or a guess that is
projected. For a diagnosed microbatch every stage hands over what it did: its parameters at the forward and at
the backward, the gradients of this microbatch alone, the inputs that its reversible units rebuilt. When the
last stage is done with it, the end-to-end gradients at both parameters are computed beside the training,
which goes on with the same bits. Only diagnosed microbatches cost memory and time: copies of the parameters,
and two times backpropagation with recomputation.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from petractl.engine.agreement import Agreement, agreement, mean_agreement, relative_error
from petractl.engine.end_to_end import EndToEnd, MeanLoss, end_to_end, snapshot_of
from petractl.methods.evaluation import Evaluator
from petractl.models.units import Streams

GuessSpace = Literal["activation", "weight"]
Gradients = Sequence[Tensor | None]


class Observer(Protocol):
    """What a stage tells about a microbatch that is observed.

    `stage` is the stage's index, `microbatch` the place in training (what randomness is drawn by), `unit` the
    place of a unit in its stage, `updates` what the stage has made so far.
    """

    def wants(self, microbatch: int) -> bool:
        """Tell whether this microbatch is observed: only then is anything else called."""
        ...

    def forward(self, stage: int, microbatch: int, streams: Streams, labels: Tensor, *, updates: int) -> None:
        """Note that the stage is about to run its forward."""
        ...

    def unit_inputs(self, stage: int, microbatch: int, unit: int, streams: Streams) -> None:
        """Take the true inputs of a unit that will rebuild them."""
        ...

    def backward(self, stage: int, microbatch: int, *, updates: int) -> None:
        """Note that the stage is about to run its backward."""
        ...

    def unit_gradients(
        self, stage: int, microbatch: int, unit: int, gradients: Gradients, *, inputs: Streams | None = None
    ) -> None:
        """Take the parameters' gradients of this microbatch alone, and the inputs that were rebuilt."""
        ...

    def guess(
        self,
        stage: int,
        microbatch: int,
        guess: Gradients,
        target: Gradients | None = None,
        *,
        space: GuessSpace,
    ) -> None:
        """Take a guess and its target: of the stage's outputs, or of its parameters, unit after unit.

        Without a target the guess is compared with the end-to-end gradient.
        """
        ...

    def finished(self, stage: int, microbatch: int) -> None:
        """Note that the stage is done with the microbatch."""
        ...


@runtime_checkable
class Observable(Protocol):
    """What a diagnosis needs of a stage: its units, in order, and the loss of the last stage."""

    observer: Observer | None

    @property
    def evaluators(self) -> Sequence[Evaluator]:
        """The stage's units."""
        ...

    @property
    def loss(self) -> MeanLoss | None:
        """The loss, on the last stage."""
        ...


@dataclass(frozen=True, slots=True)
class StageDiagnosis:
    """What was found of one stage at one microbatch.

    `current` and `forward` compare the estimate with the end-to-end gradients at the parameters of the
    backwards, and of the forwards, of all stages. `delayed` compares these two with each other: the gradient
    at the forwards' parameters is what plain delayed gradients, with their graph kept, would have learned
    from in the same place with the same delay. `reconstruction_errors` has an entry for each unit: the
    relative error of the inputs that it rebuilt, None where it did not.
    """

    stage: int
    microbatch: int
    updates: int
    delay: int
    current: Agreement
    forward: Agreement
    delayed: Agreement
    guess: Agreement | None
    reconstruction_errors: tuple[float | None, ...]


@dataclass(slots=True)
class _Guess:
    guess: Gradients
    target: Gradients | None
    space: GuessSpace


@dataclass(slots=True)
class _StageNotes:
    """What a stage has told of a microbatch."""

    at_forward: list[list[Tensor]] = field(default_factory=list)
    at_backward: list[list[Tensor]] = field(default_factory=list)
    updates_at_forward: int = 0
    updates_at_backward: int = 0
    inputs: dict[int, Streams] = field(default_factory=dict)
    errors: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[int, list[Tensor | None]] = field(default_factory=dict)
    guesses: list[_Guess] = field(default_factory=list)
    is_finished: bool = False

    @property
    def delay(self) -> int:
        """Updates between the forward and the backward."""
        return self.updates_at_backward - self.updates_at_forward


@dataclass(slots=True)
class _Case:
    """A microbatch under diagnosis."""

    microbatch: int
    stages: list[_StageNotes]
    images: Streams = ()
    labels: Tensor | None = None


class Diagnosis:
    """The observer that compares: every `every`-th microbatch, the last one of each stretch of so many.

    Not the first, because it enters an empty pipeline, where nothing is old. `stages[j]` are the evaluators
    of stage j, of a net that is all in one process. `first` is the first microbatch that enters in this
    session: of those in flight when a run was saved, the forward was not seen. `report` is given the findings
    of all stages together.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[Evaluator]],
        *,
        loss: MeanLoss,
        every: int,
        first: int = 0,
        report: Callable[[list[StageDiagnosis]], None] = lambda findings: None,
    ) -> None:
        assert every >= 1
        self._first = first
        self.report = report
        self._stages = [list(stage) for stage in stages]
        self._evaluators = [evaluator for stage in stages for evaluator in stage]
        self._loss = loss
        self._every = every
        self._cases: dict[int, _Case] = {}
        ends = list(accumulate(len(stage) for stage in stages))
        self._units = [range(end - len(stage), end) for stage, end in zip(stages, ends, strict=True)]

    def wants(self, microbatch: int) -> bool:
        """Tell whether this microbatch is observed."""
        return microbatch >= self._first and (microbatch + 1) % self._every == 0

    def forward(self, stage: int, microbatch: int, streams: Streams, labels: Tensor, *, updates: int) -> None:
        """Copy the parameters; the net's input is kept."""
        if microbatch not in self._cases:
            self._cases[microbatch] = _Case(microbatch, [_StageNotes() for _ in self._stages])
        case = self._cases[microbatch]
        if stage == 0:
            case.images, case.labels = streams, labels
        notes = case.stages[stage]
        notes.updates_at_forward = updates
        notes.at_forward = snapshot_of(self._stages[stage])

    def unit_inputs(self, stage: int, microbatch: int, unit: int, streams: Streams) -> None:
        """Keep the true inputs of a unit that will rebuild them."""
        self._notes(stage, microbatch).inputs[unit] = streams

    def backward(self, stage: int, microbatch: int, *, updates: int) -> None:
        """Copy the parameters, unless they are still the forward's."""
        notes = self._notes(stage, microbatch)
        notes.updates_at_backward = updates
        notes.at_backward = snapshot_of(self._stages[stage]) if notes.delay else notes.at_forward

    def unit_gradients(
        self, stage: int, microbatch: int, unit: int, gradients: Gradients, *, inputs: Streams | None = None
    ) -> None:
        """Copy the gradients, which training may change; compare the inputs that were rebuilt."""
        notes = self._notes(stage, microbatch)
        notes.gradients[unit] = [None if g is None else g.detach().clone() for g in gradients]
        truth = notes.inputs.pop(unit, None)
        if inputs is not None and truth is not None:
            notes.errors[unit] = relative_error(inputs, truth)

    def guess(
        self,
        stage: int,
        microbatch: int,
        guess: Gradients,
        target: Gradients | None = None,
        *,
        space: GuessSpace,
    ) -> None:
        """Copy a guess and its target."""
        copies = [
            None if row is None else [None if g is None else g.detach().clone() for g in row]
            for row in (guess, target)
        ]
        assert copies[0] is not None
        self._notes(stage, microbatch).guesses.append(_Guess(copies[0], copies[1], space))

    def finished(self, stage: int, microbatch: int) -> None:
        """Compare, and report, if no other stage has the microbatch still before it."""
        self._notes(stage, microbatch).is_finished = True
        case = self._cases[microbatch]
        if all(notes.is_finished for notes in case.stages):
            del self._cases[microbatch]
            self.report(list(self._findings(case)))

    def _notes(self, stage: int, microbatch: int) -> _StageNotes:
        return self._cases[microbatch].stages[stage]

    def _findings(self, case: _Case) -> Iterator[StageDiagnosis]:
        forward = self._end_to_end(case, [values for notes in case.stages for values in notes.at_forward])
        current = forward
        if any(notes.delay for notes in case.stages):
            current = self._end_to_end(case, [v for notes in case.stages for v in notes.at_backward])
        for j, (notes, units) in enumerate(zip(case.stages, self._units, strict=True)):
            estimate = [g for unit in range(len(units)) for g in self._gradients(j, unit, notes)]
            yield StageDiagnosis(
                stage=j,
                microbatch=case.microbatch,
                updates=case.stages[-1].updates_at_backward,
                delay=notes.delay,
                current=agreement(estimate, _flat(current, units)),
                forward=agreement(estimate, _flat(forward, units)),
                delayed=agreement(_flat(forward, units), _flat(current, units)),
                guess=_guess_agreement(notes.guesses, forward, units),
                reconstruction_errors=tuple(
                    float(notes.errors[unit]) if unit in notes.errors else None for unit in range(len(units))
                ),
            )

    def _gradients(self, stage: int, unit: int, notes: _StageNotes) -> Gradients:
        none = [None] * len(self._stages[stage][unit].parameters)
        return notes.gradients.get(unit, none)

    def _end_to_end(self, case: _Case, snapshot: Sequence[Sequence[Tensor]]) -> EndToEnd:
        assert case.labels is not None
        return end_to_end(
            self._evaluators,
            snapshot,
            case.images,
            case.labels,
            loss=self._loss,
            microbatch=case.microbatch,
            outputs_of={
                bounds[-1] for bounds, notes in zip(self._units, case.stages, strict=True) if notes.guesses
            },
        )


def observe(stages: Sequence[Observable], *, every: int, first: int = 0) -> Diagnosis:
    """Have every `every`-th microbatch diagnosed on all stages of a net, from `first` on."""
    loss = stages[-1].loss
    assert loss is not None, "the last stage has the loss"
    diagnosis = Diagnosis([stage.evaluators for stage in stages], loss=loss, every=every, first=first)
    for stage in stages:
        stage.observer = diagnosis
    return diagnosis


def _flat(truth: EndToEnd, units: range) -> list[Tensor | None]:
    return [gradient for n in units for gradient in truth.parameters[n]]


def _guess_agreement(guesses: Sequence[_Guess], truth: EndToEnd, units: range) -> Agreement | None:
    """Return how the guesses agree with their targets, on average over several directions."""
    if not guesses:
        return None
    found = []
    for one in guesses:
        target = one.target
        if target is None:
            target = truth.outputs[units[-1]] if one.space == "activation" else _flat(truth, units)
        found.append(agreement(one.guess, target))
    return mean_agreement(found)
