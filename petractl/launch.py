"""Starts runs and continues them: in this process, in processes of its own, or as one of torchrun's.

`run` and `resume` return the exit code: 0 done, 130 interrupted after the last checkpoint. What is wrong with
the user's input is found, and raised, before a run folder is made.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from petractl import build, checkpoint, worker
from petractl.engine.trainer import TrainingState
from petractl.engine.world import Launch, connect, wait_for_told
from petractl.errors import DataError, PeerLost, Problem, RecipeError, RunError, UserError
from petractl.events import RunFinished, RunStarted
from petractl.interrupts import Interrupts
from petractl.processes import die_with_launcher, redirect_output, reported, run_workers
from petractl.recipe.load import LoadedRecipe, load_recipe
from petractl.recipe.render import render
from petractl.run_folder import RunFolder, create_run_folder, open_run_folder
from petractl.session import Session, prepare_process, state_of
from petractl.tracking.environment import environment
from petractl.tracking.journal import JOURNAL_NAME, read_journal
from petractl.tracking.masking import mask_credentials
from petractl.tracking.mlflow_tracker import tracking_problem
from petractl.worker import LOGS, START_VARIABLE, Start

_START_KEY = "petractl/start"
_NO_START = "no start"
_NOTHING_TO_DO = "nothing to do"
_RESTARTS_VARIABLE = "TORCHELASTIC_RESTART_COUNT"

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
    "engine.threads",
    "training.epochs",
    "training.evaluate_every",
    "run.checkpoint_every",
    "run.keep_last",
    "diagnostics.",
    "tracking.",
)


def run(recipe: str, *, directory: Path | None, overrides: Sequence[str], trace: bool = False) -> int:
    """Train by a recipe in a new run folder; with `trace` it records what each stage does when.

    Raises:
        UserError: the recipe, the data or the folder are wrong; nothing was started.
        RunError: the run failed.
    """
    return _as_started(lambda launch: _prepare_run(recipe, directory, overrides, launch, trace))


def resume(run: Path, *, overrides: Sequence[str]) -> int:
    """Continue a run from its last checkpoint, or from the start if there is none.

    Raises:
        UserError: no such run, a key that may not change, or another process is at it.
        RunError: the run failed.
    """
    return _as_started(lambda launch: _prepare_resume(run, overrides, launch))


@dataclass(frozen=True, slots=True)
class _Ready:
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
        )


Preparation = Callable[[Launch | None], AbstractContextManager[_Ready | None]]
"""Checks everything and makes the folder, within a lock on it; None where nothing is left to do."""


def _as_started(prepare: Preparation) -> int:
    """Train in this process, in processes started here, or as one of those that torchrun started."""
    launch = Launch.from_environment()
    if launch is not None and launch.world_size > 1:
        return _join(prepare, launch)
    with ExitStack() as stack:
        with Interrupts().handled() as interrupts:
            ready = stack.enter_context(prepare(None))
            if ready is None:
                return 0
            if ready.built is not None:
                return _train_alone(ready, ready.built, interrupts)
        return _start_processes(ready)


def _train_alone(ready: _Ready, built: build.Built, interrupts: Interrupts) -> int:
    session = Session(
        ready.folder,
        ready.plan,
        built,
        interrupts=interrupts,
        recipe_name=ready.recipe_name,
        trace=ready.trace,
    )
    session.warn(ready.warnings)
    if ready.saved is not None:
        session.restore(ready.saved)
    return session.train(state_of(ready.saved))


def _start_processes(ready: _Ready) -> int:
    journal = ready.folder.path / JOURNAL_NAME
    before = _size(journal)
    code = run_workers(
        [sys.executable, "-m", "petractl.worker", str(ready.folder.path)],
        titles=ready.start.titles,
        log_dir=ready.folder.path / LOGS,
        environment={START_VARIABLE: ready.start.to_json()},
    )
    if code and _size(journal) == before:
        # Interrupted before the run has begun: no worker has said so.
        raise KeyboardInterrupt
    return code


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _join(prepare: Preparation, launch: Launch) -> int:
    """Train as one of the processes that torchrun started; rank 0 prepares the run for all.

    Never returns where it fails: the process then ends with its report.
    """
    rank = launch.rank
    die_with_launcher()
    with reported("process", rank), ExitStack() as stack:
        store = connect(launch)
        if rank == 0:
            try:
                with Interrupts().handled():
                    ready = stack.enter_context(prepare(launch))
            except BaseException:
                store.set(_START_KEY, _NO_START)
                raise
            store.set(_START_KEY, ready.start.to_json() if ready else _NOTHING_TO_DO)
        text = wait_for_told(store, _START_KEY)
        if text == _NOTHING_TO_DO:
            return 0
        if text == _NO_START:
            raise PeerLost("rank 0 has not started the run: its message says why")
        start = Start.from_json(text)
        _check_folder_is_here(start)
        with reported(start.title(rank), rank):
            redirect_output(Path(start.run_dir) / LOGS, rank, start.title(rank))
            try:
                code = worker.train(start, launch, store)
            except BaseException:
                if rank == 0 and start.is_new:
                    _discard_unstarted(Path(start.run_dir))
                raise
            if code:
                sys.exit(code)
    return 0


def _check_folder_is_here(start: Start) -> None:
    if not RunFolder(Path(start.run_dir)).resolved.is_file():
        raise UserError(
            "this machine does not see the run folder",
            where=start.run_dir,
            hint="give a folder that all machines share, with --dir or run.directory",
        )


@contextmanager
def _prepare_run(
    recipe: str, directory: Path | None, overrides: Sequence[str], launch: Launch | None, trace: bool
) -> Iterator[_Ready | None]:
    _check_first_start(directory)
    loaded = load_recipe(recipe, overrides=overrides)
    _check_tracking(loaded)
    plan = build.check(loaded, launch=launch)
    built = _built(plan, None)
    folder = create_run_folder(directory, parent=loaded.recipe.run.directory, recipe_name=loaded.name)
    with folder.locked():
        folder.write_start(recipe=loaded.text, resolved=render(plan.recipe), environment=environment())
        try:
            yield _Ready(
                folder, plan, loaded.name, tuple(loaded.warnings), built=built, is_new=True, trace=trace
            )
        except (UserError, KeyboardInterrupt):
            # Found by a process that opened the data, or interrupted before the first step: nothing was
            # started, and nothing is left behind.
            _discard_unstarted(folder.path)
            raise


def _check_first_start(directory: Path | None) -> None:
    """Refuse to begin a run again that torchrun restarts."""
    if int(os.environ.get(_RESTARTS_VARIABLE, "0") or "0"):
        raise UserError(
            "torchrun has restarted the processes, and `run` would train again from the start",
            hint=f"continue with: torchrun ... -m petractl resume {directory or 'RUN'}",
        )


def _is_of(warning: Problem, overrides: Sequence[str]) -> bool:
    """Tell whether a warning is news: resolved.toml has every key, also those that nobody has set."""
    return not warning.what.startswith("has no effect") or any(
        text.strip().startswith(warning.key) for text in overrides
    )


def _discard_unstarted(run_dir: Path) -> None:
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
def _prepare_resume(run: Path, overrides: Sequence[str], launch: Launch | None) -> Iterator[_Ready | None]:
    folder = open_run_folder(run)
    _check_resumable(overrides)
    with folder.locked():
        loaded = _unchosen(load_recipe(folder.resolved, overrides=overrides), overrides)
        _check_tracking(loaded)
        saved, damaged = checkpoint.newest_checkpoint(folder.checkpoints)
        if saved is None and damaged:
            raise RunError(
                f"no checkpoint is whole: {'; '.join(f'{e.where}: {e.what}' for e in damaged)}",
                where=str(run),
                hint=f"to train again from the start, delete {folder.checkpoints}",
            )
        state = state_of(saved)
        name, is_finished = _told_before(folder)
        _check_length(state, loaded)
        if is_finished and state.epochs_done == loaded.recipe.training.epochs:
            _say_nothing_is_left(run, state, overrides)
            yield None
            return
        plan = build.check(loaded, starting_weights=saved is None, launch=launch)
        built = _built(plan, saved)
        folder.write_resolved(render(plan.recipe))
        told = [w for w in loaded.warnings if _is_of(w, overrides)]
        warnings = [*_lost(damaged, state, run), *told, *_length_warning(state, overrides)]
        if saved is not None and built is None:
            saved = replace(saved, tensors={})  # each process reads its own; this one only waits
        yield _Ready(folder, plan, name, tuple(warnings), saved, built=built)


def _unchosen(loaded: LoadedRecipe, overrides: Sequence[str]) -> LoadedRecipe:
    """Have the lookaheads of `least` chosen again where other cuts, or another schedule, are asked for."""
    keys = ("partition.", "engine.schedule", "engine.mode")
    if not any(text.strip().startswith(keys) for text in overrides):
        return loaded
    return replace(loaded, recipe=loaded.recipe.with_lookahead(()))


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
