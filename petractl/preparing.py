"""What happens before a run trains: everything is checked, the folder is made or opened, and locked.

A run is new, or goes on (`resume`), or is whichever of the two fits (`run --resume auto`, and what torchrun
starts again). What is wrong with the user's input is found, and raised, before a run folder is made; and a
resumed run keeps the recipe that it has until it stands again where it was.
"""

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from petractl import build, checkpoint
from petractl.continuing import change_of_recipe, changed_overrides, run_to_continue, start_facts
from petractl.draining import drained_first
from petractl.engine.trainer import TrainingState
from petractl.engine.world import Launch
from petractl.errors import Problem, RecipeError, UserError
from petractl.recipe.load import LoadedRecipe, load_recipe
from petractl.recipe.render import render
from petractl.restarts import lost_checkpoints, newest_whole_checkpoint, told_by_journal
from petractl.run_folder import RESOLVED, RESUMING, RunFolder, create_run_folder, open_run_folder
from petractl.session import prepare_process, state_of
from petractl.tracking.environment import environment
from petractl.tracking.journal import JOURNAL_NAME
from petractl.tracking.masking import mask_credentials
from petractl.tracking.mlflow_tracker import tracking_problem
from petractl.worker import Start

RESUMABLE_KEYS = (
    "data.train",
    "data.val",
    "data.workers",
    "data.cache",
    "partition.stages",
    "partition.cuts",
    "partition.balance",
    "engine.mode",
    "engine.schedule",
    "engine.device",
    "engine.devices",
    "engine.backend",
    "engine.stall_timeout",
    "engine.max_restarts",
    "engine.threads",
    "training.epochs",
    "training.evaluate_every",
    "training.non_finite",
    "run.checkpoint_every",
    "run.keep_last",
    "run.stop_deadline",
    "run.notice_file",
    "diagnostics.",
    "tracking.",
)


@dataclass(frozen=True, slots=True)
class Ready:
    """A run whose folder is ready and locked, to be trained in one process or in several."""

    folder: RunFolder
    plan: build.CheckedPlan
    recipe_name: str
    warnings: tuple[Problem, ...]
    saved: checkpoint.Checkpoint | None = None
    is_new: bool = False
    trace: bool = False
    built: build.Built | None = None
    """In one process: whatever is wrong with data or weights is known before the folder is made."""

    resolved: str = RESOLVED
    """The file in the folder that holds the recipe to train by."""

    @property
    def start(self) -> Start:
        """What the processes of the run must know."""
        layout = self.plan.layout
        return Start(
            run_dir=str(self.folder.path),
            recipe_name=self.recipe_name,
            num_places=layout.num_places,
            num_replicas=layout.num_replicas,
            info=asdict(self.plan.info),
            warnings=[[warning.key, warning.what, warning.hint] for warning in self.warnings],
            checkpoint=str(self.saved.path) if self.saved else "",
            is_new=self.is_new,
            trace=self.trace,
            resolved=self.resolved,
        )


Preparation = Callable[[Launch | None], AbstractContextManager[Ready | None]]
"""Checks everything and makes the folder, within a lock on it; None where nothing is left to do."""


@contextmanager
def prepare_run(
    recipe: str, directory: Path | None, overrides: Sequence[str], launch: Launch | None, trace: bool
) -> Iterator[Ready | None]:
    """Make a new run ready.

    Raises:
        UserError: the recipe, the data or the folder are wrong; nothing is left behind.
        RunError: the folder cannot be written.
    """
    loaded = load_recipe(recipe, overrides=overrides)
    check_tracking(loaded)
    plan = build.check(loaded, launch=launch)
    built = _built(plan, None)
    warnings = (*loaded.warnings, *_restart_warnings(plan, launch))
    folder = create_run_folder(directory, parent=loaded.recipe.run.directory, recipe_name=loaded.name)
    with folder.locked():
        try:
            facts = environment() | start_facts(loaded, overrides)
            folder.write_start(recipe=loaded.text, resolved=render(plan.recipe), environment=facts)
        except BaseException:
            discard_unstarted(folder.path)
            raise
        try:
            yield Ready(folder, plan, loaded.name, warnings, built=built, is_new=True, trace=trace)
        except (UserError, KeyboardInterrupt):
            # Found by a process that opened the data, or interrupted before the first step: nothing was
            # started, and nothing is left behind.
            discard_unstarted(folder.path)
            raise


@contextmanager
def prepare_auto(
    recipe: str, directory: Path | None, overrides: Sequence[str], launch: Launch | None, trace: bool
) -> Iterator[Ready | None]:
    """Make the run ready that the same command has begun before; a new one where there is none.

    Raises:
        UserError: as for a new run; or what may not change in the run that there is.
        RunError: it cannot be continued.
    """
    loaded = load_recipe(recipe, overrides=overrides)
    found = run_to_continue(loaded, directory, overrides, resumable=RESUMABLE_KEYS)
    if found is None:
        with prepare_run(recipe, directory, overrides, launch, trace) as ready:
            yield ready
        return
    changed = changed_overrides(found, overrides)
    notes = change_of_recipe(found, loaded)
    with prepare_resume(found.path, changed, launch, trace=trace, notes=notes) as ready:
        yield ready


def _is_of(warning: Problem, overrides: Sequence[str]) -> bool:
    """Tell whether a warning is news: resolved.toml has every key, also those that nobody has set."""
    return not warning.what.startswith("has no effect") or any(
        text.strip().startswith(warning.key) for text in overrides
    )


def discard_unstarted(run_dir: Path) -> None:
    """Delete the folder of a new run that has not begun."""
    if not (run_dir / JOURNAL_NAME).exists():
        shutil.rmtree(run_dir, ignore_errors=True)


def _built(plan: build.CheckedPlan, saved: checkpoint.Checkpoint | None) -> build.Built | None:
    """Build a run in one process; in several each builds its own part."""
    if plan.layout.mode != build.IN_PROCESS:
        return None
    prepare_process(plan)
    return build.build(plan, starting_weights=saved is None)


@contextmanager
def prepare_resume(
    run: Path,
    overrides: Sequence[str],
    launch: Launch | None,
    *,
    trace: bool = False,
    notes: Sequence[Problem] = (),
) -> Iterator[Ready | None]:
    """Make a run ready to go on; `notes` are told with its warnings.

    Raises:
        UserError: no such run, a key that may not change, or another process is at it.
        RunError: no checkpoint is whole, or the folder cannot be written.
    """
    folder = open_run_folder(run)
    _check_resumable(overrides)
    with folder.locked():
        loaded = _unchosen(load_recipe(folder.resolved, overrides=overrides), overrides)
        check_tracking(loaded)
        saved, damaged = newest_whole_checkpoint(folder)
        state = state_of(saved)
        told = told_by_journal(folder)
        _check_length(state, loaded)
        if told.is_finished and state.epochs_done == loaded.recipe.training.epochs:
            _say_nothing_is_left(run, state, overrides)
            yield None
            return
        plan = build.check(loaded, starting_weights=saved is None, launch=launch)
        saved, drained = drained_first(folder, saved, plan)
        built = _built(plan, saved)
        news = [w for w in loaded.warnings if _is_of(w, overrides)]
        lost = lost_checkpoints(damaged, state)
        if saved is None:
            lost = [Problem("", f"{run} has no checkpoint: it starts again from epoch 1")]
        more = [*drained, *_restart_warnings(plan, launch), *_length_warning(state, overrides)]
        warnings = (*notes, *lost, *news, *more)
        if saved is not None and built is None:
            saved = replace(saved, tensors={})  # each process reads its own; this one only waits
        name = told.recipe_name or folder.path.name
        with _proposed(folder, plan):
            yield Ready(
                folder, plan, name, warnings, saved, built=built, trace=trace, resolved=folder.proposed
            )


@contextmanager
def _proposed(folder: RunFolder, plan: build.CheckedPlan) -> Iterator[None]:
    """Keep the recipe to go on by beside the one that the run has, until it is adopted or given up."""
    folder.propose_resolved(render(plan.recipe))
    try:
        yield
    finally:
        (folder.path / RESUMING).unlink(missing_ok=True)


def _restart_warnings(plan: build.CheckedPlan, launch: Launch | None) -> list[Problem]:
    """Return a warning where torchrun decides how often processes are started again."""
    if launch is None or launch.world_size == 1 or not plan.recipe.engine.max_restarts:
        return []
    what = "has no effect under torchrun, which starts processes again by itself"
    return [Problem("engine.max_restarts", what, "tell torchrun: --max-restarts N")]


def _unchosen(loaded: LoadedRecipe, overrides: Sequence[str]) -> LoadedRecipe:
    """Have the lookaheads of `least` chosen again where other cuts, or another schedule, are asked for."""
    keys = ("partition.", "engine.schedule", "engine.mode")
    if not any(text.strip().startswith(keys) for text in overrides):
        return loaded
    return replace(loaded, recipe=loaded.recipe.with_lookahead(()))


def _check_length(state: TrainingState, loaded: LoadedRecipe) -> None:
    done, wanted = state.epochs_done, loaded.recipe.training.epochs
    begun = state.microbatches_done > 0
    if wanted < done + begun:
        has_begun = f", and epoch {done + 1} has begun" if begun else ""
        raise UserError(
            f"training.epochs = {wanted}, but {done} {'is' if done == 1 else 'are'} done{has_begun}",
            where="training.epochs",
            hint=f"give {done + begun} or more",
        )


def _say_nothing_is_left(run: Path, state: TrainingState, overrides: Sequence[str]) -> None:
    sys.stderr.write(f"{run}: finished, {state.epochs_done} epochs are done; nothing to do\n")
    if overrides:
        sys.stderr.write(f"warning: not applied: {', '.join(overrides)}\n")


def _length_warning(state: TrainingState, overrides: Sequence[str]) -> list[Problem]:
    has_begun = state.epochs_done or state.microbatches_done
    if not has_begun or not any(text.strip().startswith("training.epochs") for text in overrides):
        return []
    what = "the learning rate now follows the new length, which is not what it did so far"
    return [Problem("training.epochs", what, 'with lr_decay = "constant" or "multi-step" nothing jumps')]


def check_tracking(loaded: LoadedRecipe) -> None:
    """Raise `RecipeError` where the address of the tracking server is none."""
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
