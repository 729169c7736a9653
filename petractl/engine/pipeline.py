"""The in-process engine: every stage in one process, on one device, driven by the schedule.

The driver sweeps over the stages and lets each one run its next operation if the message for it is there. The
order of the sweep changes nothing in the result: a stage's state is a function of its own list and of its
messages.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, cast

from torch import Tensor

from petractl.engine import wire
from petractl.engine.cut import STOP, Cutter, PendingCuts, StageCut, StageRecord
from petractl.engine.measures import Measures
from petractl.engine.messages import Activation, Gradient
from petractl.engine.recorder import Recorder
from petractl.engine.schedule import (
    WHOLE_EPOCH,
    Kind,
    Operation,
    Stretch,
    group_size,
    stage_operations,
)
from petractl.engine.stage import Counters, Totals
from petractl.engine.tensor_tree import Tree
from petractl.engine.transport import Mailbox
from petractl.engine.update import Updater
from petractl.errors import RunError, Stopped

MicrobatchSource = Iterator[tuple[Tensor, Tensor]]
"""Images (n, c, h, w) and labels (n,), one microbatch after the other."""

M = TypeVar("M", Activation, Gradient)


class Pipeline(Protocol):
    """The stages of this process, and the way to train them."""

    accumulation: int
    recorder: Recorder | None

    @property
    def stages(self) -> Sequence[StageRecord]:
        """The stages that live in this process, the lowest first."""
        ...

    def train(
        self,
        source: MicrobatchSource | None,
        *,
        num_microbatches: int,
        num_rows: int | None = None,
        offset: int = 0,
        on_microbatch: Callable[[int], None] | None = None,
        stretch: Stretch = WHOLE_EPOCH,
        cutter: Cutter | None = None,
    ) -> None:
        """Train on the epoch's microbatches, or a stretch of them; all that enter get their backward.

        `source` begins with the first microbatch to enter (see `entered`). With `cutter` the run can be saved
        on the way, without being drained.

        Raises:
            Stopped: a cut has said so; every stage of this process has handed itself over.
        """
        ...

    def resume(self, cuts: Sequence[StageCut], *, offset: int) -> None:
        """Go on from a cut: put back what each stage held, and what was on its way, for the next `train`.

        `offset`: microbatches (rows) before the epoch.
        """
        ...

    def entered(self, stretch: Stretch, *, num_microbatches: int) -> int:
        """Return how many of the epoch's microbatches have entered the first stage before a stretch."""
        ...

    def stage_measures(self) -> Sequence[Measures]:
        """Return how each of the stages spent the last epoch; nothing where that has no meaning."""
        ...


class StageLike(Protocol):
    """What a stage has to be for the engine: `Stage`, or one that only sleeps (benchmarks)."""

    index: int
    offset: int
    counters: Counters
    at_epoch_start: Counters
    totals: Totals
    updater: Updater
    delay: int
    is_alone: bool
    """Nothing comes down to it: forward and backward are one operation, whose answer goes up."""

    def forward(self, message: Activation) -> Activation:
        """Run the forward."""
        ...

    def backward(self, message: Gradient, *, group_size: int) -> Gradient:
        """Run the backward."""
        ...

    def forward_backward(self, message: Activation, *, group_size: int) -> Activation | Gradient:
        """Run forward and backward of one microbatch, where they are one operation."""
        ...

    def update(self, *, partial: bool) -> None:
        """Update the parameters."""
        ...

    def microbatches_in_flight(self) -> int:
        """Count what waits for its backward."""
        ...

    def suspended(self) -> dict[str, Tree]:
        """Return what it holds besides parameters, buffers and the optimiser's state."""
        ...

    def resume(self, state: dict[str, Tree]) -> None:
        """Go on from what `suspended` returned."""
        ...


@dataclass(frozen=True, slots=True)
class _Seat:
    """A stage with its mailboxes: activations from below, gradients from above, and its way to send both."""

    stage: StageLike
    activations: Mailbox[Activation]
    gradients: Mailbox[Gradient]


class InProcessPipeline:
    """Runs epochs of microbatches through the stages and drains at the end of each.

    Messages between stages are rounded to `number_formats` (upwards, downwards), as on the wire between
    processes: the bits are the same.
    """

    def __init__(
        self,
        stages: Sequence[StageLike],
        *,
        lookahead: Sequence[int],
        accumulation: int,
        number_formats: tuple[str, str] = ("float32", "float32"),
    ) -> None:
        assert len(stages) == len(lookahead)
        self.stages = tuple(stages)
        self.lookahead = tuple(lookahead)
        self.accumulation = accumulation
        self.recorder: Recorder | None = None
        """Set to record when each stage did what."""
        self._formats = number_formats
        self._seats = [_Seat(stage, Mailbox(), Mailbox()) for stage in stages]

    def train(
        self,
        source: MicrobatchSource | None,
        *,
        num_microbatches: int,
        num_rows: int | None = None,
        offset: int = 0,
        on_microbatch: Callable[[int], None] | None = None,
        stretch: Stretch = WHOLE_EPOCH,
        cutter: Cutter | None = None,
    ) -> None:
        """Train on the epoch's microbatches, or a stretch of them; all that enter get their backward.

        `offset` is the number of microbatches trained on before the epoch. `on_microbatch(i)` is called after
        the last stage's backward of microbatch i.

        Raises:
            Stopped: a cut has said so.
        """
        assert source is not None
        begin_stretch(self.stages, stretch, offset=offset)
        cuts = self._cuts(num_microbatches)
        pending = [
            _Pending(
                stage_operations(
                    lookahead=w,
                    num_microbatches=num_microbatches,
                    accumulation=self.accumulation,
                    is_last=j == len(self.stages) - 1 or self.stages[j].is_alone,
                    num_rows=num_rows,
                    stretch=stretch,
                )
            )
            for j, w in enumerate(self.lookahead)
        ]
        while any(p.operation is not None for p in pending):
            moved = False
            for j, p in enumerate(pending):
                if p.operation is not None and self._ready(j, p.operation):
                    self._decide(j, p.operation, cuts, cutter)
                    with self._recorded(j, p.operation):
                        self._execute(j, p.operation, source, num_microbatches, cuts[j])
                    # Stages that learn alone have such operations too; the loss is on the last one.
                    done = p.operation.kind is Kind.FORWARD_BACKWARD and j == len(self.stages) - 1
                    if done and on_microbatch is not None:
                        on_microbatch(p.operation.microbatch)
                    if self._hand_over(j, p.operation, cuts[j], cutter):
                        p.stop()
                    p.advance()
                    moved = True
            assert moved, f"no stage can go on: {[str(p.operation) for p in pending]}"
        if any(p.is_stopped for p in pending):
            raise Stopped
        assert all(stage.microbatches_in_flight() == 0 for stage in self.stages)
        assert not any(seat.activations.ready() or seat.gradients.ready() for seat in self._seats)

    def resume(self, cuts: Sequence[StageCut], *, offset: int) -> None:
        """Put back what each stage held at a cut, and what was on its way."""
        for stage, cut in zip(self.stages, cuts, strict=True):
            stage.offset = offset
            stage.resume(cut.state)
            for message in cut.sent:
                self._send_up(stage.index, message)

    def entered(self, stretch: Stretch, *, num_microbatches: int) -> int:
        """Return how many of the epoch's microbatches have entered the first stage before a stretch."""
        return stretch.entered(lookahead=self.lookahead[0], num_microbatches=num_microbatches)

    def _cuts(self, num_microbatches: int) -> list[PendingCuts]:
        return [
            PendingCuts(
                lookahead_above=above, num_microbatches=num_microbatches, accumulation=self.accumulation
            )
            for above in (*self.lookahead[1:], None)
        ]

    def _decide(
        self, j: int, operation: Operation, cuts: Sequence[PendingCuts], cutter: Cutter | None
    ) -> None:
        """Ask for a cut where a microbatch enters; all stages hear of it at once."""
        if cutter is None or j > 0:
            return
        if operation.kind is Kind.UPDATE:
            cutter.before_update(operation.microbatch)
        elif operation.kind is not Kind.BACKWARD:
            flags = cutter.decide(operation.microbatch)
            for pending in cuts:
                pending.hear(operation.microbatch, flags)

    def _hand_over(self, j: int, operation: Operation, cuts: PendingCuts, cutter: Cutter | None) -> bool:
        """Hand a stage over if it stands at a cut; returns whether it stops there."""
        if cutter is None:
            return False
        if j == 0 and operation.kind is Kind.UPDATE:
            cutter.after_update(operation.microbatch)
        reached = cuts.reached(operation)
        if reached is None:
            return False
        stage, (m, flags, sent) = self.stages[j], reached
        cutter.take(stage, StageCut(stage.index, m, flags, sent, stage.suspended()))
        return bool(flags & STOP)

    def stage_measures(self) -> tuple[Measures, ...]:
        """Return nothing: stages of one process wait for nobody."""
        return ()

    def _recorded(self, j: int, operation: Operation) -> AbstractContextManager[None]:
        return nullcontext() if self.recorder is None else self.recorder.operation(j, operation)

    def _ready(self, j: int, operation: Operation) -> bool:
        if operation.kind is Kind.UPDATE:
            return True
        if operation.kind is Kind.BACKWARD:
            return self._seats[j].gradients.ready()
        return j == 0 or self._seats[j].activations.ready()

    def _execute(
        self, j: int, operation: Operation, source: MicrobatchSource, total: int, cuts: PendingCuts
    ) -> None:
        stage, i = self._seats[j].stage, operation.microbatch
        size = group_size(i, num_microbatches=total, accumulation=self.accumulation)
        if operation.kind is Kind.UPDATE:
            stage.update(partial=size < self.accumulation)
        elif operation.kind is Kind.BACKWARD:
            self._send_down(j, stage.backward(self._seats[j].gradients.receive(i), group_size=size))
        else:
            message = self._take_activation(j, i, source)
            answer: Activation | Gradient
            if operation.kind is Kind.FORWARD:
                answer = stage.forward(message)
            else:
                answer = stage.forward_backward(message, group_size=size)
            if isinstance(answer, Gradient):
                self._send_down(j, answer)
            else:
                cuts.sending(answer)
                self._send_up(j, answer)

    def _take_activation(self, j: int, i: int, source: MicrobatchSource) -> Activation:
        if j > 0:
            return self._seats[j].activations.receive(i)
        microbatch = next(source, None)
        if microbatch is None:
            raise RunError(f"the data ended after {i} microbatches", where="stage 0", hint="check the data")
        images, labels = microbatch
        return Activation(i, (images,), labels)

    def _send_up(self, j: int, message: Activation) -> None:
        self._seats[j + 1].activations.send(self._rounded(message, self._formats[0]))

    def _send_down(self, j: int, message: Gradient) -> None:
        if j > 0 and not self.stages[j - 1].is_alone:
            self._seats[j - 1].gradients.send(self._rounded(message, self._formats[1]))

    def _rounded(self, message: M, number_format: str) -> M:
        return cast(M, wire.rounded(message, number_format=number_format))


class _Pending:
    """A stage's list with the operation that comes next, None at the end."""

    def __init__(self, operations: Iterator[Operation]) -> None:
        self._operations = operations
        self.is_stopped = False
        self.operation = next(operations, None)

    def advance(self) -> None:
        self.operation = None if self.is_stopped else next(self._operations, None)

    def stop(self) -> None:
        self.is_stopped = True


class _InTraining(Protocol):
    """A stage that knows where in training it is."""

    offset: int
    counters: Counters
    at_epoch_start: Counters


def begin_stretch(stages: Sequence[_InTraining], stretch: Stretch, *, offset: int) -> None:
    """Tell the stages where in training they are; at the start of an epoch, to count from here."""
    for stage in stages:
        stage.offset = offset
        if not stretch.done:
            stage.at_epoch_start = replace(stage.counters)
