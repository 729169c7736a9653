"""Starts runs, continues them, and ends them well, whatever the reason.

`run` and `resume` return the exit code: 0 done, 130 interrupted after the last checkpoint. What is wrong with
the user's input is found, and raised, before a run folder is made.
"""

import dataclasses
import json
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from petractl import build, checkpoint
from petractl.engine.evaluation import Scores
from petractl.engine.memory import keep_freed_memory, peak_memory_bytes
from petractl.engine.stage import Counters
from petractl.engine.trainer import Outcome, Trainer, TrainingState
from petractl.errors import Problem, RecipeError
from petractl.events import (
    CheckpointSaved,
    EventBus,
    RunFailed,
    RunFinished,
    RunInterrupted,
    RunStarted,
    WarningRaised,
)
from petractl.optim import load_optimizer_state, optimizer_state
from petractl.recipe.load import LoadedRecipe, load_recipe
from petractl.recipe.render import render
from petractl.recipe.schema import Recipe
from petractl.run_folder import RunFolder, create_run_folder, open_run_folder
from petractl.tracking.console import ConsoleListener
from petractl.tracking.environment import environment
from petractl.tracking.journal import JOURNAL_NAME, Journal, read_journal
from petractl.tracking.masking import mask_credentials
from petractl.tracking.mlflow_tracker import MlflowTracker, how_to_look, tracking_problem, tracking_uri
from petractl.tracking.plots import CurvePlotter

EXIT_INTERRUPTED = 130
RESUMABLE_KEYS = (
    "partition.stages",
    "partition.cuts",
    "partition.balance",
    "engine.mode",
    "engine.device",
    "engine.threads",
    "training.epochs",
    "training.evaluate_every",
    "run.checkpoint_every",
    "run.keep_last",
    "tracking.",
)


def run(recipe: str, *, directory: Path | None, overrides: Sequence[str]) -> int:
    """Train by a recipe in a new run folder.

    Raises:
        UserError: the recipe, the data or the folder are wrong; nothing was started.
        RunError: the run failed.
    """
    loaded = load_recipe(recipe, overrides=overrides)
    _check_tracking(loaded)
    plan = build.check(loaded)
    _prepare_process(plan)
    built = build.build(plan)
    folder = create_run_folder(directory, parent=loaded.recipe.run.directory, recipe_name=loaded.name)
    folder.write_start(recipe=loaded.text, resolved=render(plan.recipe), environment=environment())
    return _Session(folder, loaded, plan, built, recipe_name=loaded.name).train(TrainingState())


def resume(run: Path, *, overrides: Sequence[str]) -> int:
    """Continue a run from its last checkpoint, or from the start if there is none.

    Raises:
        UserError: no such run, or a key that may not change.
        RunError: the run failed.
    """
    folder = open_run_folder(run)
    _check_resumable(overrides)
    loaded = load_recipe(folder.resolved, overrides=overrides)
    _check_tracking(loaded)
    saved, damaged = checkpoint.newest_checkpoint(folder.checkpoints)
    state = _state_of(saved)
    if state.epochs_done >= loaded.recipe.training.epochs:
        sys.stderr.write(f"{run}: finished, {state.epochs_done} epochs are done; nothing to do\n")
        return 0
    plan = build.check(loaded)
    _prepare_process(plan)
    built = build.build(plan)
    folder.write_resolved(render(plan.recipe))
    session = _Session(folder, loaded, plan, built, recipe_name=_recipe_name(folder))
    session.warn([Problem("", str(error.what), str(error.where)) for error in damaged])
    if saved is not None:
        session.restore(saved)
    return session.train(state)


class _Session:
    """One stretch of a run, from its start or from a checkpoint to its end or an interruption."""

    def __init__(
        self,
        folder: RunFolder,
        loaded: LoadedRecipe,
        plan: build.CheckedPlan,
        built: build.Built,
        *,
        recipe_name: str,
    ) -> None:
        self._folder = folder
        self._recipe = plan.recipe
        self._built = built
        self._plan = plan
        self._recipe_name = recipe_name
        self._notes = [*loaded.warnings, *plan.warnings]
        if built.left_weights:
            left = ", ".join(built.left_weights)
            self._notes.append(Problem("model.weights", f"left as initialised: {left}", ""))
        self._epoch = 0

    def warn(self, problems: Sequence[Problem]) -> None:
        """Add warnings to those told at the start."""
        self._notes += problems

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Put parameters, buffers, optimisers and counters back."""
        self._built.network.load_state_dict(saved.tensors["model"])
        counters = Counters(**saved.state["counters"])
        for stage, parameters in self._stage_parameters():
            stage.counters = dataclasses.replace(counters)
            load_optimizer_state(
                stage.updater.optimizer,
                parameters,
                saved.tensors["optimizer"],
                saved.state["optimizer_numbers"],
            )

    def train(self, state: TrainingState) -> int:
        """Run to the end; returns the exit code."""
        self._epoch = state.epochs_done
        bus = self._open_bus()
        started = time.perf_counter()
        try:
            with _terminated_as_interrupt():
                bus.emit(self._started_event(state))
                for note in self._notes:
                    message = f"{note.key}: {note.what}" if note.key else note.what
                    bus.emit(WarningRaised(message=message, hint=note.hint))
                bus.emit(self._built.plan)
                outcome = self._trainer(bus).run(state)
                bus.emit(self._finished_event(outcome, time.perf_counter() - started))
        except KeyboardInterrupt:
            command = shlex.join(["petractl", "resume", str(self._folder.path)])
            bus.emit(RunInterrupted(epoch=self._epoch + 1, resume_command=command))
            return EXIT_INTERRUPTED
        except Exception as error:
            bus.emit(RunFailed(message=f"{type(error).__name__}: {error}"))
            raise
        finally:
            bus.close()
        return 0

    def _trainer(self, bus: EventBus) -> Trainer:
        every = self._recipe.run.checkpoint_epochs

        def save(state: TrainingState, is_best: bool, is_last: bool) -> None:
            if is_best or is_last or state.epochs_done % every == 0:
                bus.emit(self._save(state, is_best))
            self._epoch = state.epochs_done

        return Trainer(
            self._built.network,
            pipeline=self._built.pipeline,
            training_data=self._built.training_data,
            evaluation_data=self._built.evaluation_data,
            placement=self._built.placement,
            epochs=self._recipe.training.epochs,
            evaluate_every=self._recipe.training.evaluate_every,
            emit=bus.emit,
            save=save,
        )

    def _save(self, state: TrainingState, is_best: bool) -> CheckpointSaved:
        started = time.perf_counter()
        tensors: dict[str, torch.Tensor] = {}
        numbers: dict[str, bool | int | float] = {}
        for stage, parameters in self._stage_parameters():
            more_tensors, more_numbers = optimizer_state(stage.updater.optimizer, parameters)
            tensors |= more_tensors
            numbers |= more_numbers
        path = checkpoint.save_checkpoint(
            self._folder.checkpoints,
            epoch=state.epochs_done,
            tensors={"model": self._built.network.state_dict(), "optimizer": tensors},
            state={
                "training": dataclasses.asdict(state),
                # Every stage has done the same by the end of an epoch: named by none of them.
                "counters": dataclasses.asdict(self._built.pipeline.stages[0].counters),
                "optimizer_numbers": numbers,
            },
        )
        checkpoint.prune_checkpoints(
            self._folder.checkpoints, keep_last=self._recipe.run.keep_last, best_epoch=state.best_epoch
        )
        seconds = time.perf_counter() - started
        return CheckpointSaved(epoch=state.epochs_done, path=str(path), best=is_best, seconds=seconds)

    def _stage_parameters(self) -> Iterator[tuple[Any, list[tuple[str, torch.nn.Parameter]]]]:
        names = dict(self._built.network.named_parameters())
        name_of = {id(p): name for name, p in names.items()}
        for stage in self._built.pipeline.stages:
            groups = stage.updater.optimizer.param_groups
            yield stage, [(name_of[id(p)], p) for group in groups for p in group["params"]]

    def _open_bus(self) -> EventBus:
        """Subscribe the listeners: the journal hears of everything first, MLflow finds the curves drawn."""
        bus = EventBus()
        path, tracking = self._folder.path, self._recipe.tracking
        uri = tracking_uri(tracking.uri, directory=Path(self._recipe.run.directory))
        bus.subscribe(Journal(path))
        bus.subscribe(ConsoleListener(tracking=how_to_look(uri) if tracking.mlflow else ""))
        bus.subscribe(CurvePlotter(path))
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
            method=self._built.plan.method,
            model=self._recipe.model.name,
            dataset=self._recipe.data.name,
            resumed_from_epoch=state.epochs_done or None,
        )

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
            images_per_s=outcome.images / outcome.training_s,
            peak_memory_bytes=peak_memory_bytes(self._plan.device),
        )


def _prepare_process(plan: build.CheckedPlan) -> None:
    """Set threads and memory, and rule out algorithms chosen by time: bits are promised."""
    torch.set_num_threads(build.num_threads(plan.recipe))
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    keep_freed_memory()


@contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end a run as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: signals are someone else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_tracking(loaded: LoadedRecipe) -> None:
    tracking = loaded.recipe.tracking
    problem = tracking_problem(tracking.uri) if tracking.mlflow and tracking.uri else ""
    if problem:
        shown = mask_credentials(tracking.uri)
        raise RecipeError([Problem("tracking.uri", f'"{shown}": {problem}')], where=str(loaded.path))


def _check_resumable(overrides: Sequence[str]) -> None:
    problems = [
        Problem(
            text.split("=")[0].strip(),
            "may not change when a run is resumed",
            f"these may: {', '.join(key + ('*' if key.endswith('.') else '') for key in RESUMABLE_KEYS)}",
        )
        for text in overrides
        if not text.strip().startswith(RESUMABLE_KEYS)
    ]
    if problems:
        raise RecipeError(problems, where="--set")


def _state_of(saved: checkpoint.Checkpoint | None) -> TrainingState:
    if saved is None:
        return TrainingState()
    fields = dict(saved.state["training"])
    scores = fields.pop("scores")
    return TrainingState(**fields, scores=Scores(**scores) if scores else None)


def _recipe_name(folder: RunFolder) -> str:
    for record in read_journal(folder.path / JOURNAL_NAME):
        if record.get("event") == RunStarted.name:
            return str(record["recipe_name"])
    return folder.path.name


def _flattened(recipe: Recipe) -> dict[str, str]:
    """Return every key as `section.key` with its value as text, the address of a server without secrets."""
    values = recipe.model_dump(mode="json")
    flat = {f"{section}.{key}": value for section, keys in values.items() for key, value in keys.items()}
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat.items()}
    text["tracking.uri"] = mask_credentials(text["tracking.uri"])
    return text
