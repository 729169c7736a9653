"""One stretch of a run, from its start or from a checkpoint to its end or an interruption.

A session joins what `build` made with what watches: it opens the listeners, lets the trainer train, saves
checkpoints, and ends well, whatever the reason. In a run of several processes each has one: all train and
save, and the first alone has the journal, the console and MLflow; the others keep a log.
"""

import contextlib
import dataclasses
import json
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from petractl import build, checkpoint
from petractl.engine.diagnosis import Diagnosis, Observable, observe
from petractl.engine.evaluation import Scores
from petractl.engine.memory import keep_freed_memory, peak_memory_bytes
from petractl.engine.pipeline import StageRecord
from petractl.engine.process_pipeline import ProcessPipeline
from petractl.engine.stage import Counters
from petractl.engine.trainer import Outcome, Trainer, TrainingState
from petractl.engine.world import World
from petractl.errors import PeerLost, Problem, RunError
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
from petractl.optim import load_optimizer_state, optimizer_state
from petractl.processes import is_child_of_petractl, log_name
from petractl.recipe.schema import Recipe
from petractl.run_folder import RunFolder
from petractl.tracking.console import TIMELINE_NAME, ConsoleListener
from petractl.tracking.diagnosis_plot import DiagnosisPlotter
from petractl.tracking.journal import Journal
from petractl.tracking.log_file import LogFile
from petractl.tracking.masking import mask_credentials
from petractl.tracking.mlflow_tracker import MlflowTracker, how_to_look, tracking_uri
from petractl.tracking.plots import CurvePlotter
from petractl.tracking.timeline import TimelineFiles

EXIT_INTERRUPTED = 130

_FAILURE_KEY = "failure"
_INTERRUPTED_KEY = "interrupted"
_DIED_KEY = "died"
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
        self._epoch = 0
        self._timeline: TimelineFiles | None = None

    def warn(self, problems: Sequence[Problem]) -> None:
        """Add warnings to those told at the start."""
        self._notes += problems

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Put the parameters, buffers, optimisers and counters of this process back.

        An auxiliary net that the checkpoint does not have, since its block is a new one, begins anew.
        """
        self._built.network.load_state_dict(saved.tensors["model"])
        new = self._restore_auxiliary(saved)
        counters = Counters(**saved.state["counters"])
        for stage, parameters in self._stage_parameters():
            stage.counters = dataclasses.replace(counters)
            load_optimizer_state(
                stage.updater.optimizer,
                [(name, p) for name, p in parameters if not name.startswith(new)],
                saved.tensors["optimizer"],
                saved.state["optimizer_numbers"],
            )

    def _restore_auxiliary(self, saved: checkpoint.Checkpoint) -> tuple[str, ...]:
        """Put the auxiliary nets back that are the same; return what the names of the others begin with."""
        if self._built.auxiliary is None:
            return ()
        found = saved.tensors.get("auxiliary", {})
        own = self._built.auxiliary.state_dict()
        of_net: dict[str, list[str]] = {}
        for name in own:
            of_net.setdefault(".".join(name.split(".")[:2]) + ".", []).append(name)
        new = tuple(
            net
            for net, names in of_net.items()
            if any(name not in found or found[name].shape != own[name].shape for name in names)
        )
        kept = {name: found[name] for net, names in of_net.items() if net not in new for name in names}
        self._built.auxiliary.load_state_dict({**own, **kept})
        if new:
            units = ", ".join(net.split(".")[1] for net in new)
            what = f"the auxiliary nets of the blocks that end with units {units} begin anew"
            self._notes.append(Problem("partition", what, "these blocks are not those of the checkpoint"))
        return new

    def train(self, state: TrainingState) -> int:
        """Run to the end; returns the exit code."""
        self._epoch = state.epochs_done
        bus = self._open_bus()
        self._timeline = self._timeline_files(bus) if self._trace else None
        started = time.perf_counter()
        try:
            self._tell_start(bus, state)
            outcome = self._trainer(bus).run(state)
            self._interrupts.finishing = True
            bus.emit(self._finished_event(outcome, time.perf_counter() - started))
        except BaseException as error:
            if not self._is_interruption(error):
                bus.emit(RunFailed(message=self._cause(error)))
                if isinstance(error, Exception) and _is_out_of_memory(error):
                    raise _out_of_memory(error, self._recipe.data.batch_size) from error
                raise
            command = shlex.join(["petractl", "resume", str(self._folder.path)])
            bus.emit(RunInterrupted(epoch=self._epoch + 1, resume_command=command))
            return EXIT_INTERRUPTED
        finally:
            if self._timeline is not None:
                self._timeline.draw()
            bus.close()
        return 0

    def _is_interruption(self, error: BaseException) -> bool:
        """Tell whether a run that ends was told to; the others may have ended a moment before.

        A neighbour that dies makes torchrun stop all others: a signal after that is no interruption.
        """
        world = self._built.world
        if isinstance(error, PeerLost) and not self._interrupts.requested:
            with contextlib.suppress(Exception):
                return world.ask(_INTERRUPTED_KEY) is not None
            return False
        if isinstance(error, KeyboardInterrupt) or self._interrupts.requested:
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

    def _trainer(self, bus: EventBus) -> Trainer:
        every = self._recipe.run.checkpoint_epochs

        def save(state: TrainingState, is_best: bool, is_last: bool) -> None:
            if is_best or is_last or state.epochs_done % every == 0:
                saved = self._save(state, is_best)
                if saved is not None:
                    bus.emit(saved)
            self._interrupts.finishing = is_last
            self._epoch = state.epochs_done

        return Trainer(
            pipeline=self._built.pipeline,
            world=self._built.world,
            training_data=self._built.training_data,
            length=self._built.length,
            evaluate=self._built.evaluate,
            settle=self._built.settle,
            trace=self._timeline.write if self._timeline is not None else None,
            diagnosis=self._diagnosis(),
            placement=self._built.placement,
            epochs=self._recipe.training.epochs,
            evaluate_every=self._recipe.training.evaluate_every,
            emit=bus.emit,
            save=save,
        )

    def _diagnosis(self) -> Diagnosis | None:
        """Have the stages observed, if the recipe says so."""
        every, stages = self._recipe.diagnostics.every, self._built.pipeline.stages
        if not every:
            return None
        observable = [stage for stage in stages if isinstance(stage, Observable)]
        assert len(observable) == len(self._built.plan.stages), "checked before: all stages are here"
        return observe(observable, every=every)

    def _timeline_files(self, bus: EventBus) -> TimelineFiles:
        return TimelineFiles(
            self._folder.path,
            chart=self._folder.path / TIMELINE_NAME,
            name=self._recipe_name,
            num_stages=len(self._built.plan.stages),
            num_places=self._built.world.seat.num_places,
            warn=lambda message: bus.emit(WarningRaised(message=message)),
        )

    def _save(self, state: TrainingState, is_best: bool) -> CheckpointSaved | None:
        """Write what lives here; the first process commits all of it, and tells."""
        started = time.perf_counter()
        world = self._built.world
        seat = world.seat
        draft = checkpoint.Draft(self._folder.checkpoints, epoch=state.epochs_done)
        try:
            return self._write(draft, state, is_best, started)
        except BaseException:
            if seat.rank == 0:
                draft.discard()
            raise

    def _write(
        self, draft: checkpoint.Draft, state: TrainingState, is_best: bool, started: float
    ) -> CheckpointSaved | None:
        world = self._built.world
        seat = world.seat
        if seat.rank == 0:
            draft.begin()
        world.share(None)  # nobody writes before there is room
        written = _Written({}, {})
        if seat.replica == 0:
            tensors, numbers = self._own_state()
            part = f"stage-{seat.place:02d}" if seat.num_places > 1 else ""
            written = _Written(draft.write(tensors, part=part), numbers)
        parts = world.gather(written)
        if seat.rank != 0:
            return None
        path = draft.commit(
            {name: total for part in parts for name, total in part.sums.items()},
            state={
                "training": dataclasses.asdict(state),
                # Every stage has done the same by the end of an epoch: named by none of them.
                "counters": dataclasses.asdict(self._built.pipeline.stages[0].counters),
                "optimizer_numbers": {
                    name: number for part in parts for name, number in part.numbers.items()
                },
            },
        )
        checkpoint.prune_checkpoints(
            self._folder.checkpoints,
            newest_epoch=state.epochs_done,
            keep_last=self._recipe.run.keep_last,
            best_epoch=state.best_epoch,
        )
        seconds = time.perf_counter() - started
        return CheckpointSaved(epoch=state.epochs_done, path=str(path), best=is_best, seconds=seconds)

    def _own_state(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, bool | int | float]]:
        """Return the tensors that live here, of model and optimisers, and the optimisers' numbers."""
        tensors: dict[str, torch.Tensor] = {}
        numbers: dict[str, bool | int | float] = {}
        for stage, parameters in self._stage_parameters():
            more_tensors, more_numbers = optimizer_state(stage.updater.optimizer, parameters)
            tensors |= more_tensors
            numbers |= more_numbers
        groups = {"model": self._built.network.state_dict(), "optimizer": tensors}
        if self._built.auxiliary is not None:
            # Apart from the model: an exported net has none.
            groups["auxiliary"] = self._built.auxiliary.state_dict()
        return groups, numbers

    def _stage_parameters(self) -> Iterator[tuple[StageRecord, list[tuple[str, torch.nn.Parameter]]]]:
        names = dict(self._built.network.named_parameters())
        if self._built.auxiliary is not None:
            names |= dict(self._built.auxiliary.named_parameters())
        name_of = {id(p): name for name, p in names.items()}
        for stage in self._built.pipeline.stages:
            groups = stage.updater.optimizer.param_groups
            yield stage, [(name_of[id(p)], p) for group in groups for p in group["params"]]

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
        bus.subscribe(Journal(path))
        bus.subscribe(ConsoleListener(tracking=how_to_look(uri) if tracking.mlflow else ""))
        bus.subscribe(CurvePlotter(path))
        if self._recipe.diagnostics.every:
            bus.subscribe(DiagnosisPlotter(path))
        if tracking.mlflow:
            bus.subscribe(
                MlflowTracker(
                    path,
                    uri=uri,
                    experiment=tracking.experiment,
                    run_name=tracking.run_name or path.name,
                    parameters=_flattened(self._recipe),
                    on_warning=lambda message, hint: bus.emit(WarningRaised(message=message, hint=hint)),
                )
            )
        return bus

    def _started_event(self, state: TrainingState) -> RunStarted:
        return RunStarted(
            run_dir=str(self._folder.path),
            recipe_name=self._recipe_name,
            method=self._short_method(),
            model=self._recipe.model.name,
            dataset=self._recipe.data.name,
            resumed_from_epoch=state.epochs_done or None,
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
            images_per_s=outcome.images / outcome.training_s if outcome.training_s else None,
            peak_memory_bytes=peak_memory_bytes(self._built.placement.device),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Written:
    """What one process has written of a checkpoint: checksums of files, numbers of optimisers."""

    sums: dict[str, str]
    numbers: dict[str, bool | int | float]


def _flattened(recipe: Recipe) -> dict[str, str]:
    """Return every key as `section.key` with its value as text, the address of a server without secrets."""
    values = recipe.model_dump(mode="json")
    flat = {f"{section}.{key}": value for section, keys in values.items() for key, value in keys.items()}
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat.items()}
    text["tracking.uri"] = mask_credentials(text["tracking.uri"])
    return text


def _is_out_of_memory(error: Exception) -> bool:
    """Tell a lack of memory from other errors; the CPU's allocator has no type of its own for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _out_of_memory(error: Exception, batch_size: int) -> RunError:
    return RunError(
        f"out of memory: {str(error).splitlines()[0]}",
        hint=f"lower data.batch_size (now {batch_size}), raise method.accumulation; checkpoints are intact",
    )
