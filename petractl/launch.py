"""Starts runs and continues them.

`run` and `resume` return the exit code: 0 done, 130 interrupted after the last checkpoint. What is wrong with
the user's input is found, and raised, before a run folder is made.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from petractl import build, checkpoint
from petractl.engine.evaluation import Scores
from petractl.engine.memory import keep_freed_memory
from petractl.engine.trainer import TrainingState
from petractl.errors import DataError, Problem, RecipeError, RunError, UserError
from petractl.events import RunFinished, RunStarted
from petractl.interrupts import Interrupts
from petractl.recipe.load import LoadedRecipe, load_recipe
from petractl.recipe.render import render
from petractl.run_folder import RunFolder, create_run_folder, open_run_folder
from petractl.session import Session
from petractl.tracking.environment import environment
from petractl.tracking.journal import JOURNAL_NAME, read_journal
from petractl.tracking.masking import mask_credentials
from petractl.tracking.mlflow_tracker import tracking_problem

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
    with Interrupts().handled() as interrupts:
        loaded = load_recipe(recipe, overrides=overrides)
        _check_tracking(loaded)
        plan = build.check(loaded)
        _prepare_process(plan)
        built = build.build(plan)
        folder = create_run_folder(directory, parent=loaded.recipe.run.directory, recipe_name=loaded.name)
        with folder.locked():
            folder.write_start(recipe=loaded.text, resolved=render(plan.recipe), environment=environment())
            session = Session(folder, plan, built, interrupts=interrupts, recipe_name=loaded.name)
            session.warn(loaded.warnings)
            return session.train(TrainingState())


def resume(run: Path, *, overrides: Sequence[str]) -> int:
    """Continue a run from its last checkpoint, or from the start if there is none.

    Raises:
        UserError: no such run, a key that may not change, or another process is at it.
        RunError: the run failed.
    """
    folder = open_run_folder(run)
    _check_resumable(overrides)
    with Interrupts().handled() as interrupts, folder.locked():
        loaded = load_recipe(folder.resolved, overrides=overrides)
        _check_tracking(loaded)
        saved, damaged = checkpoint.newest_checkpoint(folder.checkpoints)
        if saved is None and damaged:
            raise RunError(
                f"no checkpoint is whole: {'; '.join(f'{e.where}: {e.what}' for e in damaged)}",
                where=str(run),
                hint=f"to train again from the start, delete {folder.checkpoints}",
            )
        state = _state_of(saved)
        name, is_finished = _told_before(folder)
        _check_length(state, loaded)
        if is_finished and state.epochs_done == loaded.recipe.training.epochs:
            _say_nothing_is_left(run, state, overrides)
            return 0
        plan = build.check(loaded, starting_weights=saved is None)
        _prepare_process(plan)
        built = build.build(plan, starting_weights=saved is None)
        folder.write_resolved(render(plan.recipe))
        session = Session(folder, plan, built, interrupts=interrupts, recipe_name=name)
        session.warn(_lost(damaged, state, run))
        session.warn([*loaded.warnings, *_length_warning(state, overrides)])
        if saved is not None:
            session.restore(saved)
        return session.train(state)


def _check_length(state: TrainingState, loaded: LoadedRecipe) -> None:
    done, wanted = state.epochs_done, loaded.recipe.training.epochs
    if wanted < done:
        raise UserError(
            f"{wanted} epochs are asked for, but {done} are done",
            where="training.epochs",
            hint=f"give {done} or more",
        )


def _say_nothing_is_left(run: Path, state: TrainingState, overrides: Sequence[str]) -> None:
    sys.stderr.write(f"{run}: finished, {state.epochs_done} epochs are done; nothing to do\n")
    if overrides:
        sys.stderr.write(f"warning: not applied: {', '.join(overrides)}\n")


def _lost(damaged: Sequence[RunError], state: TrainingState, run: Path) -> list[Problem]:
    """Return what a resumed run has lost, and where it goes on instead."""
    start = (
        f"it goes on after epoch {state.epochs_done}" if state.epochs_done else "it starts again from epoch 1"
    )
    if not damaged and not state.epochs_done:
        return [Problem("", f"{run} has no checkpoint: {start}")]
    return [Problem("", f"{error.where}: {error.what}: {start}") for error in damaged]


def _length_warning(state: TrainingState, overrides: Sequence[str]) -> list[Problem]:
    if not state.epochs_done or not any(text.strip().startswith("training.epochs") for text in overrides):
        return []
    what = "the learning rate now follows the new length, which is not what it did so far"
    return [Problem("training.epochs", what, 'with lr_decay = "constant" or "multi-step" nothing jumps')]


def _prepare_process(plan: build.CheckedPlan) -> None:
    """Set threads and memory, and rule out algorithms chosen by time: bits are promised."""
    torch.set_num_threads(build.num_threads(plan.recipe))
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    keep_freed_memory()


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


def _told_before(folder: RunFolder) -> tuple[str, bool]:
    """Return what the journal tells of the run: its recipe's name, and whether it has come to its end."""
    try:
        records = read_journal(folder.path / JOURNAL_NAME)
    except DataError:
        records = []
    names = [str(record["recipe_name"]) for record in records if record.get("event") == RunStarted.name]
    marks = [
        record["event"] for record in records if record.get("event") in (RunStarted.name, RunFinished.name)
    ]
    return (names[0] if names else folder.path.name), bool(marks) and marks[-1] == RunFinished.name
