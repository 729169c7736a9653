"""One stretch of a run, from its start or from a checkpoint to its end or an interruption.

A session joins what `build` made with what watches: it opens the listeners, lets the trainer train, saves
checkpoints, and ends well, whatever the reason. In a run of several processes each has one: all train and
save, and the first alone has the journal, the console and MLflow; the others keep a log.
"""

import contextlib
import json
import secrets
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from petractl import build, checkpoint
from petractl.build.advice import memory_advice
from petractl.engine.assembly import stage_bounds
from petractl.engine.diagnosis import Diagnosis, Observable, observe
from petractl.engine.evaluation import Scores
from petractl.engine.memory import keep_freed_memory, peak_memory_bytes
from petractl.engine.memory_left import MemoryLeft, memory_left
from petractl.engine.numbers import Numbers
from petractl.engine.process_pipeline import ProcessPipeline
from petractl.engine.sentinel import NonFinite, Place
from petractl.engine.trainer import Outcome, Trainer, TrainingState, stretch_of
from petractl.engine.world import Launch, World
from petractl.errors import OutOfMemory, PeerLost, Problem, RunError, Stopped, lack_of_memory
from petractl.estimator import LOCAL
from petractl.events import (
    CheckpointSaved,
    EventBus,
    RunFailed,
    RunFinished,
    RunInterrupted,
    RunStarted,
    WarningRaised,
)
from petractl.interrupts import Interrupts
from petractl.processes import is_child_of_petractl, kind_of, log_name
from petractl.recipe.flatten import as_parameters
from petractl.run_folder import RunFolder
from petractl.saving.identity import PipelineIdentity
from petractl.saving.policy import CutPolicy, StopRequests
from petractl.saving.restore import Restorer
from petractl.saving.saver import Keeping, Saver
from petractl.saving.snapshot import Photographer
from petractl.tracking.console import TIMELINE_NAME, ConsoleListener
from petractl.tracking.diagnosis_plot import DiagnosisPlotter
from petractl.tracking.journal import Journal
from petractl.tracking.log_file import LogFile
from petractl.tracking.mlflow_tracker import MlflowTracker, tracking_uri
from petractl.tracking.plots import CurvePlotter
from petractl.tracking.timeline import TimelineFiles

EXIT_INTERRUPTED = 130

STOPPED_KEY = "stopped"
"""Under which a run that was stopped tells later starts by torchrun what by, and the command that goes on."""
_FAILURE_KEY = "failure"
_INTERRUPTED_KEY = "interrupted"
_DIED_KEY = "died"
_NON_FINITE_KEY = "non-finite"
_NOTICE_S = 0.5  # in which a broken connection is noticed, and told


def prepare_process(plan: build.CheckedPlan, *, processes: int = 1) -> None:
    """Set threads and memory, and rule out algorithms chosen by time: bits are promised.

    `processes` of the run are on this machine.
    """
    torch.set_num_threads(build.num_threads(plan.recipe, processes=processes))
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    keep_freed_memory()


def state_of(saved: checkpoint.Checkpoint | None) -> TrainingState:
    """Return where a run stood at a checkpoint."""
    if saved is None:
        return TrainingState()
    fields = dict(saved.state["training"])
    scores = fields.pop("scores")
    return TrainingState(**fields, scores=Scores(**scores) if scores else None)


def _is_on_one_machine() -> bool:
    launch = Launch.from_environment()
    return launch is None or launch.world_size == launch.local_world_size


class Session:
    """One stretch of a run, from its start or from a checkpoint to its end or an interruption."""

    def __init__(
        self,
        folder: RunFolder,
        plan: build.CheckedPlan,
        built: build.Built,
        *,
        interrupts: Interrupts,
        recipe_name: str,
        trace: bool = False,
    ) -> None:
        self._folder = folder
        self._interrupts = interrupts
        self._recipe = plan.recipe
        self._built = built
        self._recipe_name = recipe_name
        self._trace = trace
        self._notes = [*plan.warnings]
        if built.left_weights:
            left = ", ".join(built.left_weights)
            self._notes.append(Problem("model.weights", f"left as initialised: {left}", ""))
        self._plan = plan
        bounds = stage_bounds(plan.cuts, num_units=len(plan.names))
        self._photographer = Photographer(built, bounds=bounds)
        self._saver: Saver | None = None
        self._skipped: dict[int, dict[str, Any]] = {}
        self._state = TrainingState()
        self._timeline: TimelineFiles | None = None
        self._resolved = ""

    def warn(self, problems: Sequence[Problem]) -> None:
        """Add warnings to those told at the start."""
        self._notes += problems

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Put the parameters, buffers, optimisers, counters and what was in flight in this process back.

        Raises:
            RunError: the checkpoint is not one of this run.
        """
        restorer = Restorer(saved, state_of(saved), self._built, self._photographer)
        self._notes += restorer.restore()
        self._skipped = restorer.skipped

    def drain(self, state: TrainingState) -> Path:
        """Give what is in flight its backward, save that, and return the new checkpoint; trains no further.

        In a process other than the first the path is that of no file.
        """
        bus = EventBus()
        self._saver = self._open_saver(bus)
        try:
            self._saver.save_trained(self._trainer(bus).drain(state))
            self._saver.finish()
        finally:
            bus.close()
        return self._saver.saved_path or Path()

    def train(self, state: TrainingState) -> int:
        """Run to the end; returns the exit code."""
        self._state = state
        with contextlib.suppress(OSError):
            self._resolved = self._folder.resolved.read_text(encoding="utf-8")
        bus = self._open_bus()
        self._timeline = self._timeline_files(bus) if self._trace else None
        started = time.perf_counter()
        left = memory_left(self._built.placement.device)
        try:
            self._saver = self._open_saver(bus)
            self._tell_start(bus, state)
            with self._interrupts.deferred(self._recipe.run.stop_deadline):
                outcome = self._run(self._trainer(bus), state)
                self._interrupts.finishing = True
            self._saver.finish()
            bus.emit(self._finished_event(outcome, time.perf_counter() - started))
        except BaseException as error:
            if not self._is_interruption(error):
                if isinstance(error, NonFinite):
                    first = self._first_not_finite(error)
                    bus.emit(RunFailed(message=self._cause(first)))
                    raise first from None
                bus.emit(RunFailed(message=self._cause(error)))
                if isinstance(error, Exception) and lack_of_memory(error):
                    raise self._out_of_memory(error, left) from error
                raise
            self._save_before_stopping(error)
            if self._interrupts.is_overdue:
                limit_s = self._recipe.run.stop_deadline
                what = f"not saved within run.stop_deadline = {limit_s:g} s: the last checkpoint stands"
                bus.emit(WarningRaised(message=what, hint="give it longer, or save more often"))
            bus.emit(self._interrupted_event())
            return EXIT_INTERRUPTED
        finally:
            if self._timeline is not None:
                self._timeline.draw()
            bus.close()
        return 0

    def _run(self, trainer: Trainer, state: TrainingState) -> Outcome:
        try:
            return trainer.run(state)
        except Stopped:
            # Somebody else may have said so; then the signal to this process is still to come. And torchrun
            # tells all others to stop as soon as one has ended.
            is_torchruns = isinstance(self._built.world, World) and not is_child_of_petractl()
            self._interrupts.leaving = is_torchruns or not self._interrupts.requested
            raise

    def _first_not_finite(self, error: NonFinite) -> NonFinite:
        """Return the first of what the processes have found; each diverges by itself, a moment apart."""
        world = self._built.world
        if not isinstance(world, World):
            return error
        places = [error.place]
        with contextlib.suppress(Exception):
            world.tell(f"{_NON_FINITE_KEY}/{world.seat.rank}", json.dumps(asdict(error.place)))
            time.sleep(_NOTICE_S)
            size = world.seat.num_places * world.seat.num_replicas
            told = [world.ask(f"{_NON_FINITE_KEY}/{rank}") for rank in range(size)]
            places += [Place.of(json.loads(text)) for text in told if text]
        return NonFinite(min(places, key=Place.order))

    def _out_of_memory(self, error: Exception, left: MemoryLeft | None) -> RunError:
        """Return the error that says what would fit; `left` was there before the first step."""
        world = self._built.world
        stage = world.seat.place if isinstance(world, World) else None
        what, hint = "", f"lower data.batch_size (now {self._recipe.data.batch_size})"
        with contextlib.suppress(Exception):  # the model is advice; without it the error still stands
            what, hint = memory_advice(self._plan, stage=stage, left=left)
        told = f"out of memory: {lack_of_memory(error)}" + (f" ({what})" if what else "")
        return OutOfMemory(told, hint=f"{hint}; checkpoints are intact")

    def _save_before_stopping(self, error: BaseException) -> None:
        """Wait until what was handed over at the stop is saved.

        Where the deadline passes, or another signal comes, the last checkpoint stands.
        """
        if self._saver is None or not isinstance(error, Stopped):
            return
        with contextlib.suppress(KeyboardInterrupt), self._interrupts.limited(self._recipe.run.stop_deadline):
            self._saver.part_stopped()
            # torchrun takes an end with 130 for a failure, and starts all again: right where only another
            # machine goes, for which it may wait for one in its place.
            if self._built.world.seat.rank == 0 and (self._saver.stop_is_own or _is_on_one_machine()):
                event = self._interrupted_event()
                self._built.world.tell_later_starts(STOPPED_KEY, f"{event.cause}\n{event.resume_command}")

    def _interrupted_event(self) -> RunInterrupted:
        """Say where the run goes on: from what this session has saved, else from where it began."""
        state = self._state
        if self._saver is not None and self._saver.saved_state is not None:
            state = self._saver.saved_state
        return RunInterrupted(
            epoch=state.epochs_done + 1,
            microbatch=state.microbatches_done or None,
            cause=self._saver.stop_cause if self._saver is not None else "",
            resume_command=shlex.join(["petractl", "resume", str(self._folder.path)]),
        )

    def _is_interruption(self, error: BaseException) -> bool:
        """Tell whether a run that ends was told to; the others may have ended a moment before.

        A neighbour that dies makes torchrun stop all others: a signal after that is no interruption.
        """
        world = self._built.world
        if isinstance(error, PeerLost) and not self._interrupts.requested:
            with contextlib.suppress(Exception):
                return world.ask(_INTERRUPTED_KEY) is not None
            return False
        is_left_by_others = kind_of(error) in ("lost", "stalled") and self._interrupts.requested
        if isinstance(error, KeyboardInterrupt | Stopped) or is_left_by_others:
            with contextlib.suppress(Exception):
                if self._others_died():
                    return False
                world.tell(_INTERRUPTED_KEY, "yes")
                world.tell(f"{_INTERRUPTED_KEY}/{world.seat.rank}", "yes")
            return True
        return False

    def _others_died(self) -> bool:
        """Tell whether torchrun stops this process because another one died, not because somebody said so.

        Its neighbours see their connections broken by one who has not said that it was interrupted. Only
        torchrun is in doubt: our own launcher knows.
        """
        world, pipeline = self._built.world, self._built.pipeline
        if not isinstance(world, World) or is_child_of_petractl():
            return False
        time.sleep(_NOTICE_S)
        lost = pipeline.lost_ranks() if isinstance(pipeline, ProcessPipeline) else []
        silent = [rank for rank in lost if world.ask(f"{_INTERRUPTED_KEY}/{rank}") is None]
        if silent:
            world.tell(_DIED_KEY, f"{world.seat.title} lost the connection to rank {silent[0]}")
        return world.ask(_DIED_KEY) is not None

    def _cause(self, error: BaseException) -> str:
        """Return why the run failed: another process knows it where a neighbour was lost."""
        words = f"{type(error).__name__}: {error}"
        world = self._built.world
        if isinstance(error, KeyboardInterrupt):
            words = "stopped, because another process ended"
        elif not isinstance(error, PeerLost):
            words = f"{world.seat.title}: {words}" if isinstance(world, World) else words
            with contextlib.suppress(Exception):
                world.tell(_FAILURE_KEY, words)
            return words
        told = None
        with contextlib.suppress(Exception):
            told = world.ask(_FAILURE_KEY) or world.ask(_DIED_KEY)
        return told or words

    def _tell_start(self, bus: EventBus, state: TrainingState) -> None:
        bus.emit(self._started_event(state))
        for note in self._notes:
            message = f"{note.key}: {note.what}" if note.key else note.what
            bus.emit(WarningRaised(message=message, hint=note.hint))
        bus.emit(self._built.plan)

    def _open_saver(self, bus: EventBus) -> Saver:
        """Make what saves this process's part; the first one clears away what killed processes have left."""
        run, world, length = self._recipe.run, self._built.world, self._built.length
        seat = world.seat
        if seat.rank == 0:
            checkpoint.discard_unfinished(self._folder.checkpoints)
            if run.notice_file and Path(run.notice_file).exists():
                what = f"{run.notice_file} is there already: an old notice, which stops nothing"
                hint = "only its coming, or a change of it, stops the run; delete it"
                self._notes.append(Problem("run.notice_file", what, hint))
        token = world.share(secrets.token_hex(4))
        stops = StopRequests(
            signalled=lambda: self._interrupts.cause,
            board=world,
            notice=Path(run.notice_file) if run.notice_file else None,
        )
        policy = CutPolicy(
            run.interval,
            rows=length.rows,
            accumulation=self._recipe.method.accumulation,
            ahead=self._plan.lookahead[0],
            replica=seat.replica,
            num_replicas=seat.num_replicas,
            stops=stops,
            board=world,
        )
        return Saver(
            self._built,
            keeping=Keeping(self._folder.checkpoints, run.interval.epochs, run.keep_last),
            pipeline=PipelineIdentity.of(self._plan),
            policy=policy,
            stops=stops,
            photographer=self._photographer,
            token=token,
            wait_s=self._recipe.engine.stall_timeout,
            saved=lambda event: self._note_saved(bus, event),
        )

    def _note_saved(self, bus: EventBus, event: CheckpointSaved) -> None:
        """Tell of a checkpoint; without the recipe beside it nothing could read it."""
        bus.emit(event)
        if self._resolved and not self._folder.resolved.exists():
            self._folder.path.mkdir(parents=True, exist_ok=True)
            self._folder.write_resolved(self._resolved)
            what = f"{self._folder.resolved} was gone, and is written again"
            bus.emit(WarningRaised(message=what, hint="somebody deletes files of this run"))

    def _trainer(self, bus: EventBus) -> Trainer:
        assert self._saver is not None
        return Trainer(
            pipeline=self._built.pipeline,
            world=self._built.world,
            training_data=self._built.training_data,
            length=self._built.length,
            evaluate=self._built.evaluate,
            settle=self._built.settle,
            trace=self._timeline.write if self._timeline is not None else None,
            diagnosis=self._diagnosis(),
            numbers=self._numbers(),
            placement=self._built.placement,
            epochs=self._recipe.training.epochs,
            evaluate_every=self._recipe.training.evaluate_every,
            emit=bus.emit,
            saver=self._saver,
        )

    def _diagnosis(self) -> Diagnosis | None:
        """Have the stages observed, if the recipe says so."""
        every, stages = self._recipe.diagnostics.every, self._built.pipeline.stages
        if not every:
            return None
        observable = [stage for stage in stages if isinstance(stage, Observable)]
        assert len(observable) == len(self._built.plan.stages), "checked before: all stages are here"
        rows, state = self._built.length.rows, self._state
        entered = self._built.pipeline.entered(stretch_of(state), num_microbatches=rows)
        return observe(observable, every=every, first=state.epochs_done * rows + entered)

    def _numbers(self) -> Numbers:
        """Have the numbers of the stages in this process looked after."""
        recipe = self._recipe
        numbers = Numbers(
            self._built.pipeline.stages,
            device=self._built.placement.device,
            skips=recipe.training.non_finite == "skip",
            drift_every=recipe.diagnostics.drift_every,
            drift_limit=recipe.drift_limit,
        )
        numbers.resume(self._skipped)
        return numbers

    def _timeline_files(self, bus: EventBus) -> TimelineFiles:
        return TimelineFiles(
            self._folder.path,
            chart=self._folder.path / TIMELINE_NAME,
            name=self._recipe_name,
            num_stages=len(self._built.plan.stages),
            num_places=self._built.world.seat.num_places,
            warn=lambda message: bus.emit(WarningRaised(message=message)),
        )

    def _open_bus(self) -> EventBus:
        """Subscribe the listeners: the journal hears of everything first, MLflow finds the curves drawn."""
        bus = EventBus()
        path, tracking = self._folder.path, self._recipe.tracking
        seat = self._built.world.seat
        if isinstance(self._built.world, World):
            bus.subscribe(LogFile(path / "logs" / log_name(seat.title)))
        if seat.rank != 0:
            return bus
        uri = tracking_uri(tracking.uri, directory=Path(self._recipe.run.directory))
        bus.subscribe(
            Journal(
                path, on_warning=lambda message, hint: bus.emit(WarningRaised(message=message, hint=hint))
            )
        )
        tracker: MlflowTracker | None = None
        console = ConsoleListener(tracking=lambda: "" if tracker is None else tracker.how_to_look())
        bus.subscribe(console)
        bus.subscribe(CurvePlotter(path))
        if self._recipe.diagnostics.every:
            bus.subscribe(DiagnosisPlotter(path))
        if tracking.mlflow:
            tracker = MlflowTracker(
                path,
                uri=uri,
                experiment=tracking.experiment,
                run_name=tracking.run_name or path.name,
                parameters=as_parameters(self._recipe),
                on_notice=console.tell_waiting,
                on_warning=lambda message, hint: bus.emit(WarningRaised(message=message, hint=hint)),
            )
            bus.subscribe(tracker)
        return bus

    def _started_event(self, state: TrainingState) -> RunStarted:
        return RunStarted(
            run_dir=str(self._folder.path),
            recipe_name=self._recipe_name,
            method=self._short_method(),
            model=self._recipe.model.name,
            dataset=self._recipe.data.name,
            resumed_from_epoch=state.epochs_done if state != TrainingState() else None,
            resumed_from_microbatch=state.microbatches_done or None,
        )

    def _short_method(self) -> str:
        """Return the method for titles; of an estimator what tells most."""
        choice = self._recipe.method.estimator
        if choice is None or choice == LOCAL:
            return self._built.plan.method
        return f"{self._recipe.method.name} ({choice.target} along {choice.guess})"

    def _finished_event(self, outcome: Outcome, seconds: float) -> RunFinished:
        state, scores = outcome.state, outcome.state.scores
        return RunFinished(
            epochs=state.epochs_done,
            seconds=seconds,
            best_top1=state.best_top1,
            best_epoch=state.best_epoch,
            final_loss=scores.loss if scores else None,
            final_top1=scores.top1 if scores else None,
            final_top5=scores.top5 if scores else None,
            images_per_s=outcome.images / outcome.training_s if outcome.images else None,
            peak_memory_bytes=peak_memory_bytes(self._built.placement.device),
        )
