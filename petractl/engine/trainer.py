"""The training loop: epochs through the pipeline, evaluation, and the events that tell of both.

The loop waits for the device only where a number is shown: at most twice a second, and at the end of an
epoch.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor, nn

from petractl.engine.evaluation import LabelledBatch, Placement, Scores, evaluate
from petractl.engine.pipeline import InProcessPipeline
from petractl.engine.schedule import num_updates
from petractl.engine.stage import Counters
from petractl.events import (
    EpochStarted,
    EpochTrained,
    Evaluated,
    Event,
    StageCounted,
    StepsDone,
    WarningRaised,
)

PROGRESS_INTERVAL_S = 0.5


class TrainingData(Protocol):
    """A source of epochs; what it yields is a function of (epoch, index) alone."""

    steps_per_epoch: int
    wait_s: float

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[LabelledBatch]:
        """Yield the microbatches of an epoch, counted from 0."""
        ...


class EvaluationData(Protocol):
    """A source of every sample once."""

    def __iter__(self) -> Iterator[LabelledBatch]:
        """Yield batches."""
        ...


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Where a run stands after `epochs_done` epochs: with the tensors, all that it needs to go on."""

    epochs_done: int = 0
    best_top1: float | None = None
    best_epoch: int | None = None
    scores: Scores | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run tells: its last state, and the images and seconds of this stretch's training."""

    state: TrainingState
    images: int
    training_s: float


class Trainer:
    """Runs epochs until `epochs` are done. `save(state, is_best, is_last)` is called after each."""

    def __init__(
        self,
        network: nn.Module,
        *,
        pipeline: InProcessPipeline,
        training_data: TrainingData,
        evaluation_data: EvaluationData,
        placement: Placement,
        epochs: int,
        evaluate_every: int,
        emit: Callable[[Event], None],
        save: Callable[[TrainingState, bool, bool], None],
    ) -> None:
        self._network = network
        self._pipeline = pipeline
        self._data = training_data
        self._evaluation_data = evaluation_data
        self._placement = placement
        self._epochs = epochs
        self._evaluate_every = evaluate_every
        self._emit = emit
        self._save = save
        self._images = 0
        self._training_s = 0.0
        self._has_diverged = False

    def run(self, state: TrainingState) -> Outcome:
        """Train from `state` to the last epoch."""
        for epoch in range(state.epochs_done + 1, self._epochs + 1):
            is_last = epoch == self._epochs
            self._emit(EpochStarted(epoch=epoch))
            self._train(epoch)
            is_best = False
            state = replace(state, epochs_done=epoch)
            if is_last or epoch % self._evaluate_every == 0:
                state, is_best = self._evaluate(state)
            self._save(state, is_best, is_last)
        return Outcome(state, self._images, self._training_s)

    def _train(self, epoch: int) -> None:
        steps = self._data.steps_per_epoch
        before = [replace(stage.counters) for stage in self._pipeline.stages]
        last = self._pipeline.stages[-1]
        last.totals.reset()
        waited = self._data.wait_s
        started = time.perf_counter()
        progress = _Progress(self, epoch, steps, started)
        batches = self._data.epoch(epoch - 1)
        self._pipeline.train(
            self._placed(batches),
            num_microbatches=steps,
            offset=(epoch - 1) * steps,
            on_microbatch=progress,
        )
        loss, top1 = last.totals.means()
        seconds = time.perf_counter() - started
        samples = last.totals.samples
        if not math.isfinite(loss):
            self._warn_of_divergence(epoch, loss)
        self._images += samples
        self._training_s += seconds
        self._emit(
            EpochTrained(
                epoch=epoch,
                loss=loss,
                top1=top1,
                samples=samples,
                images_per_s=samples / seconds,
                seconds=seconds,
                lr=self._rate(),
                update=last.counters.updates,
                data_wait_percent=100.0 * (self._data.wait_s - waited) / seconds,
            )
        )
        for stage, counters in zip(self._pipeline.stages, before, strict=True):
            self._emit(self._counted(epoch, stage.index, steps, stage.counters, counters))

    def _warn_of_divergence(self, epoch: int, loss: float) -> None:
        if not self._has_diverged:
            self._has_diverged = True
            message = f"the training loss of epoch {epoch} is {loss}: the run has diverged"
            hint = "stop it; lower optimizer.lr, lengthen training.warmup_epochs or set optimizer.clip_norm"
            self._emit(WarningRaised(message=message, hint=hint))

    def _counted(self, epoch: int, stage: int, steps: int, now: Counters, before: Counters) -> StageCounted:
        counted = StageCounted(
            epoch=epoch,
            stage=stage,
            microbatches=steps,
            forwards=now.forwards - before.forwards,
            backwards=now.backwards - before.backwards,
            updates=now.updates - before.updates,
            partial_groups=now.partial_groups - before.partial_groups,
        )
        expected = num_updates(num_microbatches=steps, accumulation=self._pipeline.accumulation)
        assert counted.forwards == counted.backwards == steps, f"microbatches were dropped: {counted}"
        assert counted.updates == expected, f"updates were dropped: {counted}"
        return counted

    def _placed(self, batches: Iterator[LabelledBatch]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            yield self._placement.images(batch), self._placement.labels(batch)

    def _rate(self) -> float:
        return self._pipeline.stages[-1].updater.rate

    def steps_done(self, epoch: int, *, microbatches: int, of: int, seconds: float) -> None:
        """Tell of the progress within an epoch; waits for the device."""
        last = self._pipeline.stages[-1]
        loss, top1 = last.totals.means()
        self._emit(
            StepsDone(
                epoch=epoch,
                microbatches=microbatches,
                of=of,
                loss=loss,
                top1=top1,
                images_per_s=last.totals.samples / seconds,
                lr=self._rate(),
                update=last.counters.updates,
            )
        )

    def _evaluate(self, state: TrainingState) -> tuple[TrainingState, bool]:
        started = time.perf_counter()
        scores = evaluate(self._network, self._evaluation_data, placement=self._placement)
        seconds = time.perf_counter() - started
        epoch = state.epochs_done
        self._emit(
            Evaluated(
                epoch=epoch,
                loss=scores.loss,
                top1=scores.top1,
                top5=scores.top5,
                samples=scores.samples,
                seconds=seconds,
            )
        )
        is_best = state.best_top1 is None or scores.top1 > state.best_top1
        state = replace(state, scores=scores)
        if is_best:
            state = replace(state, best_top1=scores.top1, best_epoch=epoch)
        return state, is_best


class _Progress:
    """Called after each microbatch; tells of it when enough time has passed."""

    def __init__(self, trainer: Trainer, epoch: int, of: int, started: float) -> None:
        self._trainer = trainer
        self._epoch = epoch
        self._of = of
        self._started = started
        self._last = started

    def __call__(self, microbatch: int) -> None:
        now = time.perf_counter()
        if now - self._last < PROGRESS_INTERVAL_S:
            return
        self._last = now
        self._trainer.steps_done(
            self._epoch, microbatches=microbatch + 1, of=self._of, seconds=now - self._started
        )
