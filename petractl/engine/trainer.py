"""The training loop: epochs through the pipeline, evaluation, and the events that tell of both.

Every process of a run is in the same loop; at the end of an epoch the first one gathers what the stages have
counted and measured, and tells it. The loop waits for the device only where a number is shown: at most twice
a second, and at the end of an epoch.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from petractl.engine.cut import Cutter
from petractl.engine.data_watch import DataWatch, TrainingData, samples_skipped
from petractl.engine.diagnosis import Diagnosis, StageDiagnosis
from petractl.engine.evaluation import Evaluation, LabelledBatch, Placement, Scores
from petractl.engine.measures import Measures
from petractl.engine.memory import peak_memory_bytes
from petractl.engine.numbers import Findings, Numbers
from petractl.engine.pipeline import Pipeline
from petractl.engine.recorder import Record, Recorder
from petractl.engine.schedule import Stretch, num_updates
from petractl.engine.stage import Counters
from petractl.engine.world import Alone, World
from petractl.errors import Stopped
from petractl.events import (
    EpochStarted,
    EpochTrained,
    Evaluated,
    Event,
    GradientsDiagnosed,
    StageCounted,
    StageMeasured,
    StepsDone,
    WarningRaised,
)

PROGRESS_INTERVAL_S = 0.5
_PROGRESS_KEY = "progress"


class EvaluationData(Protocol):
    """A source of every sample once."""

    def __iter__(self) -> Iterator[LabelledBatch]:
        """Yield batches."""
        ...


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Where a run stands: with the tensors, all that it needs to go on.

    `microbatches_done` are those of the next epoch (rows, with replicas) that have had their backward; where
    that is all of them, the epoch is to be evaluated. `is_drained`: nothing else has entered.
    """

    epochs_done: int = 0
    microbatches_done: int = 0
    is_drained: bool = True
    best_top1: float | None = None
    best_epoch: int | None = None
    scores: Scores | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run tells: its last state, and the images and seconds of this stretch's training."""

    state: TrainingState
    images: int
    training_s: float


@dataclass(frozen=True, slots=True)
class EpochLength:
    """Microbatches of an epoch: of this replica, and the most over all replicas."""

    microbatches: int
    rows: int


class Saving(Cutter, Protocol):
    """Saves the run, in the middle of an epoch and at the end of one."""

    def begin(self, state: TrainingState) -> None:
        """Begin an epoch, or the rest of one."""
        ...

    def poll(self) -> None:
        """Hear that a microbatch is done."""
        ...

    def is_stopping(self) -> bool:
        """Tell whether the run is to stop, as far as this process knows."""
        ...

    def save_trained(self, state: TrainingState) -> None:
        """Save an epoch that is trained and not evaluated."""
        ...

    def is_due(self) -> bool:
        """Tell at the end of an epoch whether it is to be saved, as far as this process knows."""
        ...

    def save_epoch(self, state: TrainingState, *, is_best: bool, is_last: bool, is_due: bool) -> None:
        """Save the end of an epoch, if there is a reason to."""
        ...


@dataclass(frozen=True, slots=True)
class _Totals:
    """The sums of an epoch on the last stage of one replica; `carried`: samples of an earlier session."""

    samples: int
    carried: int
    loss: float
    correct: int


@dataclass(frozen=True, slots=True)
class _Report:
    """What one process tells of an epoch."""

    replica: int
    rank: int
    stages: tuple[tuple[int, Counters], ...]
    microbatches: int
    totals: _Totals | None
    rate: float
    updates: int
    measures: tuple[Measures, ...]
    records: tuple[Record, ...]
    peak_memory_bytes: int | None
    waited_s: float
    steady_wait_s: float
    skipped: tuple[str, ...]
    numbers: Findings | None


class Trainer:
    """Runs epochs until `epochs` are done.

    `training_data` is given where images enter and nowhere else. `settle` is called when an epoch is trained:
    replicas then make their running statistics one. `trace` is given (epoch, records with their replica) on
    rank 0, and wanted by all or by none. `evaluate` gives every process the same scores. What `diagnosis`
    and `numbers` find is told.
    """

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        world: World | Alone,
        training_data: TrainingData | None,
        length: EpochLength,
        evaluate: Evaluation,
        placement: Placement,
        epochs: int,
        evaluate_every: int,
        emit: Callable[[Event], None],
        saver: Saving,
        settle: Callable[[], None] = lambda: None,
        trace: Callable[[int, list[tuple[int, Record]]], None] | None = None,
        diagnosis: Diagnosis | None = None,
        numbers: Numbers | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._world = world
        self._data = training_data
        self._length = length
        self._evaluation = evaluate
        self._placement = placement
        self._epochs = epochs
        self._evaluate_every = evaluate_every
        self._emit = emit
        self._saver = saver
        self._settle = settle
        self._trace = trace
        self._numbers = numbers
        if diagnosis is not None:
            diagnosis.report = self._tell_diagnosed
        self._watch = DataWatch(training_data)
        self._clock_offset = 0.0
        self._images = 0
        self._training_s = 0.0
        self._has_diverged = False

    def run(self, state: TrainingState) -> Outcome:
        """Train from `state` to the last epoch.

        Raises:
            Stopped: the run was told to stop, and has been handed to the saver.
        """
        for epoch in range(state.epochs_done + 1, self._epochs + 1):
            is_last = epoch == self._epochs
            self._emit(EpochStarted(epoch=epoch))
            self._saver.begin(state)
            self._train(epoch, state)
            trained = replace(state, microbatches_done=self._length.rows, is_drained=True)
            is_best = False
            state = replace(state, epochs_done=epoch, microbatches_done=0, is_drained=True)
            # Stages stop together: each hears of it at the same place, here, in evaluation or by a cut.
            try:
                stops, is_due = self._world.share((self._saver.is_stopping(), self._saver.is_due()))
                if stops:
                    raise Stopped
                if is_last or epoch % self._evaluate_every == 0:
                    state, is_best = self._evaluate(state)
            except Stopped:
                self._saver.save_trained(trained)
                raise
            self._saver.save_epoch(state, is_best=is_best, is_last=is_last, is_due=is_due)
        return Outcome(state, self._images, self._training_s)

    def drain(self, state: TrainingState) -> TrainingState:
        """Give what is in flight its backward, and let nothing enter; returns where the run then stands."""
        ahead = self._pipeline.entered(stretch_of(state), num_microbatches=self._length.rows)
        until = self._world.share(ahead)
        self._pipeline.train(
            iter(()),
            num_microbatches=self._length.microbatches,
            num_rows=self._length.rows,
            offset=state.epochs_done * self._length.rows,
            stretch=replace(stretch_of(state), until=until),
        )
        return replace(state, microbatches_done=until, is_drained=True)

    def _train(self, epoch: int, state: TrainingState) -> None:
        if not state.microbatches_done:
            self._pipeline.stages[-1].totals.reset()
        self._watch.begin()
        if self._trace is not None:
            # Every epoch anew: clocks of two machines drift apart by a microbatch within the hour.
            self._clock_offset = self._world.clock_offset()
            self._pipeline.recorder = Recorder(self._placement.device)
        started = time.perf_counter()
        if state.microbatches_done < self._length.rows:
            self._run_stretch(epoch, state, _Progress(self, epoch, started))
        self.poll()
        if self._numbers is not None:
            self._numbers.settle()
        report = self._report()
        self._settle()
        reports = self._world.gather(report)
        seconds = time.perf_counter() - started  # now the other stages have made their last update too
        if reports:
            self._tell_trained(epoch, reports, seconds=seconds)
            self._tell_of_numbers(epoch, reports)
            self._tell_of_data(epoch, reports, seconds=seconds)

    def _run_stretch(self, epoch: int, state: TrainingState, progress: "_Progress") -> None:
        """Train the epoch, or what is left of it."""
        stretch, length = stretch_of(state), self._length
        start = self._pipeline.entered(stretch, num_microbatches=length.microbatches)
        with self._microbatches(epoch, start=start) as microbatches:
            self._pipeline.train(
                microbatches,
                num_microbatches=length.microbatches,
                num_rows=length.rows,
                offset=(epoch - 1) * length.rows,
                on_microbatch=progress,
                stretch=stretch,
                cutter=self._saver,
            )

    def _report(self) -> _Report:
        """Sum up the epoch; waits for the device."""
        seat, last = self._world.seat, self._pipeline.stages[-1]
        totals = None
        if last.totals.loss is not None and last.totals.correct is not None:
            sums = last.totals
            totals = _Totals(sums.samples, sums.carried, float(last.totals.loss), int(last.totals.correct))
        device = self._placement.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return _Report(
            replica=seat.replica,
            rank=seat.rank,
            stages=tuple(
                (stage.index, _since(stage.counters, stage.at_epoch_start)) for stage in self._pipeline.stages
            ),
            microbatches=self._length.microbatches,
            totals=totals,
            rate=last.updater.rate,
            updates=last.counters.updates,
            measures=tuple(self._pipeline.stage_measures()),
            records=self._own_records(),
            peak_memory_bytes=peak_memory_bytes(device) if isinstance(self._world, World) else None,
            waited_s=self._watch.waited_s(),
            steady_wait_s=self._watch.steady_s(),
            skipped=self._watch.newly_skipped(),
            numbers=None if self._numbers is None else self._numbers.findings(replica=seat.replica),
        )

    def _own_records(self) -> tuple[Record, ...]:
        """Return what this process did when, by rank 0's clock; nothing without a trace."""
        recorder = self._pipeline.recorder
        if recorder is None:
            return ()
        shift = self._clock_offset
        return tuple(
            replace(record, start_s=record.start_s + shift, end_s=record.end_s + shift)
            for record in recorder.records()
        )

    def _tell_trained(self, epoch: int, reports: list[_Report], *, seconds: float) -> None:
        last = [report for report in reports if report.totals is not None]
        samples = sum(report.totals.samples for report in last if report.totals)
        loss_sum = sum(report.totals.loss for report in last if report.totals)
        correct = sum(report.totals.correct for report in last if report.totals)
        loss = loss_sum / samples if samples else math.nan
        if not math.isfinite(loss):
            self._warn_of_divergence(epoch, loss)
        here = samples - sum(report.totals.carried for report in last if report.totals)
        self._images += here
        self._training_s += seconds
        self._emit(
            EpochTrained(
                epoch=epoch,
                loss=loss,
                top1=100.0 * correct / samples if samples else math.nan,
                samples=samples,
                images_per_s=here / seconds if here else None,
                seconds=seconds,
                lr=last[0].rate if last else math.nan,
                update=last[0].updates if last else 0,
                data_wait_percent=100.0 * max(report.waited_s for report in reports) / seconds,
            )
        )
        if self._trace is not None:
            self._trace(epoch, [(report.replica, record) for report in reports for record in report.records])
        rows = [
            (report.replica, index, n, report)
            for report in reports
            for n, (index, _) in enumerate(report.stages)
        ]
        rows.sort(key=lambda row: row[:2])
        for _, index, n, report in rows:
            self._emit(self._counted(epoch, index, report, report.stages[n][1]))
        for _, index, n, report in rows:
            if report.measures:
                self._emit(_measured(epoch, index, report, report.measures[n]))

    def _tell_diagnosed(self, findings: Sequence[StageDiagnosis]) -> None:
        for found in findings:
            self._emit(_diagnosed(found, epoch=found.microbatch // self._length.rows + 1))

    def _tell_of_numbers(self, epoch: int, reports: list[_Report]) -> None:
        if self._numbers is not None:
            found = [report.numbers for report in reports if report.numbers is not None]
            updates = num_updates(
                num_microbatches=self._length.rows, accumulation=self._pipeline.accumulation
            )
            for event in self._numbers.events(epoch, found, updates=updates):
                self._emit(event)

    def _tell_of_data(self, epoch: int, reports: list[_Report], *, seconds: float) -> None:
        self._tell_skipped(epoch, [report.skipped for report in reports])
        waited_s = max(report.steady_wait_s for report in reports)
        warning = self._watch.warning(epoch, waited_s=waited_s, seconds=seconds)
        if warning is not None:
            self._emit(warning)

    def _tell_skipped(self, epoch: int, skipped: list[tuple[str, ...]]) -> None:
        event = samples_skipped(epoch, skipped)
        if event is not None:
            self._emit(event)
        self._watch.require_few(skipped)

    def _warn_of_divergence(self, epoch: int, loss: float) -> None:
        if not self._has_diverged:
            self._has_diverged = True
            message = f"the training loss of epoch {epoch} is {loss}: the run has diverged"
            hint = "stop it; lower optimizer.lr, lengthen training.warmup_epochs or set optimizer.clip_norm"
            self._emit(WarningRaised(message=message, hint=hint))

    def _counted(self, epoch: int, stage: int, report: _Report, done: Counters) -> StageCounted:
        counted = StageCounted(
            epoch=epoch,
            stage=stage,
            microbatches=report.microbatches,
            forwards=done.forwards,
            backwards=done.backwards,
            updates=done.updates,
            partial_groups=done.partial_groups,
            replica=report.replica,
        )
        expected = num_updates(num_microbatches=self._length.rows, accumulation=self._pipeline.accumulation)
        complete = counted.forwards == counted.backwards == report.microbatches
        assert complete, f"microbatches were dropped: {counted}"
        assert counted.updates == expected, f"updates were dropped: {counted}"
        return counted

    @contextmanager
    def _microbatches(self, epoch: int, *, start: int) -> Iterator[Iterator[tuple[Tensor, Tensor]] | None]:
        """Give the epoch's microbatches from `start` on the device; None where no data enter."""
        if self._data is None:
            yield None
            return
        # The pipeline takes no more than it needs, so the loader would not see the end.
        with closing(self._data.epoch(epoch - 1, start=start)) as batches:
            yield ((self._placement.images(batch), self._placement.labels(batch)) for batch in batches)

    def poll(self) -> None:
        """Look after what goes on beside training."""
        self._saver.poll()

    def show_progress(self, epoch: int, *, microbatches: int, seconds: float) -> None:
        """Tell of the progress within an epoch; where the loss is, waits for the device.

        Loss and accuracy are the first replica's, the speed is that of all replicas together.
        """
        world = self._world
        warning = self._watch.early_warning(epoch, seconds=seconds) if world.seat.rank == 0 else None
        if warning is not None:
            self._emit(warning)
        if world.seat.is_last and world.seat.replica == 0:
            last = self._pipeline.stages[-1]
            loss, top1 = last.totals.means()
            steps = StepsDone(
                epoch=epoch,
                microbatches=microbatches,
                of=self._length.microbatches,
                loss=loss,
                top1=top1,
                images_per_s=(last.totals.samples - last.totals.carried) * world.seat.num_replicas / seconds,
                lr=last.updater.rate,
                update=last.counters.updates,
                data_wait_percent=self._watch.wait_percent(seconds),
            )
            if world.seat.rank == 0:
                self._emit(steps)
            else:
                world.tell(_PROGRESS_KEY, json.dumps(asdict(steps)))
        elif world.seat.rank == 0:
            told = json.loads(world.ask(_PROGRESS_KEY) or "{}")
            if told.get("epoch") == epoch:
                waited = self._watch.wait_percent(seconds)
                self._emit(replace(StepsDone(**told), data_wait_percent=waited))

    def _evaluate(self, state: TrainingState) -> tuple[TrainingState, bool]:
        started = time.perf_counter()
        scores = self._evaluation(self._saver.is_stopping)
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
        self._tell_skipped(epoch, self._world.gather(self._watch.newly_skipped()))
        is_best = scores.samples > 0 and (state.best_top1 is None or scores.top1 > state.best_top1)
        state = replace(state, scores=scores)
        if is_best:
            state = replace(state, best_top1=scores.top1, best_epoch=epoch)
        return state, is_best


def stretch_of(state: TrainingState) -> Stretch:
    """Return the part of the epoch that is left."""
    done = state.microbatches_done
    return Stretch(first=done) if state.is_drained else Stretch(after=done - 1)


def _since(now: Counters, before: Counters) -> Counters:
    return Counters(
        forwards=now.forwards - before.forwards,
        backwards=now.backwards - before.backwards,
        updates=now.updates - before.updates,
        partial_groups=now.partial_groups - before.partial_groups,
    )


def _measured(epoch: int, stage: int, report: _Report, measures: Measures) -> StageMeasured:
    percent = 100.0 / measures.seconds if measures.seconds else 0.0
    compute = percent * measures.compute_s
    return StageMeasured(
        epoch=epoch,
        stage=stage,
        replica=report.replica,
        rank=report.rank,
        seconds=measures.seconds,
        compute_percent=compute,
        wait_forward_percent=percent * measures.wait_forward_s if measures.is_itemised else None,
        wait_backward_percent=percent * measures.wait_backward_s if measures.is_itemised else None,
        idle_percent=100.0 - compute,
        bytes_sent_forward=measures.bytes_sent_forward,
        bytes_sent_backward=measures.bytes_sent_backward,
        staleness_updates=measures.staleness_updates,
        peak_memory_bytes=report.peak_memory_bytes,
    )


def _diagnosed(found: StageDiagnosis, *, epoch: int) -> GradientsDiagnosed:
    errors = [error for error in found.reconstruction_errors if error is not None]
    return GradientsDiagnosed(
        epoch=epoch,
        update=found.updates,
        stage=found.stage,
        microbatch=found.microbatch,
        delay_updates=found.delay,
        cosine=found.current.cosine,
        norm_ratio=found.current.norm_ratio,
        cosine_forward=found.forward.cosine,
        norm_ratio_forward=found.forward.norm_ratio,
        delayed_cosine=found.delayed.cosine,
        delayed_norm_ratio=found.delayed.norm_ratio,
        guess_cosine=found.guess.cosine if found.guess else None,
        guess_norm_ratio=found.guess.norm_ratio if found.guess else None,
        reconstruction_error=max(errors, default=None),
        reconstruction_errors=found.reconstruction_errors,
    )


class _Progress:
    """Called after each microbatch; tells of it when enough time has passed."""

    def __init__(self, trainer: Trainer, epoch: int, started: float) -> None:
        self._trainer = trainer
        self._epoch = epoch
        self._started = started
        self._last = started

    def __call__(self, microbatch: int) -> None:
        self._trainer.poll()
        now = time.perf_counter()
        if now - self._last < PROGRESS_INTERVAL_S:
            return
        self._last = now
        self._trainer.show_progress(self._epoch, microbatches=microbatch + 1, seconds=now - self._started)
