"""The cells of a sweep: each is one run in a folder of its own, checked before anything starts.

Where a cell stands is read from its run folder and nowhere else, so a sweep that was killed, or whose runs
were continued by hand, goes on from what is there. A setting that the checks of a recipe refuse is no error:
a full product often holds some. A run that is there but is another one is an error: its numbers would stand
in the wrong row.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from petractl import build
from petractl.build.measured import MEASURED_BALANCES
from petractl.errors import Problem, RecipeError, UserError
from petractl.recipe.checks import idle_keys
from petractl.recipe.find import find_recipe
from petractl.recipe.flatten import flattened
from petractl.recipe.load import LoadedRecipe
from petractl.recipe.render import toml_value
from petractl.recipe.schema import SECTIONS, Recipe
from petractl.run_folder import ENVIRONMENT, LOCK, RECIPE, RESOLVED, RunFolder, open_run_folder
from petractl.sweep.fitting import METHOD_KEY, Fitted, fitted_recipe
from petractl.sweep.grid import SEED_KEY, Grid, GridError, Setting
from petractl.sweep.names import cell_name, setting_names
from petractl.tracking.comparison_run import RunRecord, is_run_folder, read_run

NO_EFFECT = "-"

# Where and how a run is made, not which run it is: they may differ from what a cell's run has.
_PLACE_KEYS = (
    "data.workers",
    "data.cache",
    "engine.mode",
    "engine.device",
    "engine.devices",
    "engine.backend",
    "engine.stall_timeout",
    "engine.threads",
    "run.directory",
    "run.checkpoint_every",
    "run.keep_last",
    "diagnostics.",
    "tracking.",
)
_LEFT_BY_A_START = {LOCK, RECIPE, ENVIRONMENT, f".{RESOLVED}", "checkpoints", "plots", "logs"}


class State(StrEnum):
    """Where a cell's run stands."""

    NEW = "new"
    STARTED = "started"
    """Begun and not ended well, whatever ended it: it is resumed."""
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a sweep: its folder, and what it sets besides the recipe."""

    name: str
    folder: Path
    overrides: tuple[str, ...]
    seed: int | None = None

    def record(self) -> RunRecord:
        """Read what its folder tells."""
        return read_run(self.folder, defaults=_defaults())

    @property
    def state(self) -> State:
        """Where it stands; every other problem of its folder is told by `check_folder`."""
        if not is_run_folder(self.folder):
            return State.NEW
        return State.FINISHED if self.record().state == "finished" else State.STARTED

    def check_folder(self) -> None:
        """Refuse a folder that is neither a run's nor one that can become it.

        Raises:
            UserError: it holds something else, or not what resuming needs.
        """
        if is_run_folder(self.folder):
            open_run_folder(self.folder)
        elif self.folder.exists() and not (self.folder.is_dir() and _is_leftover(self.folder)):
            raise UserError(
                "this holds files, but no run",
                where=str(self.folder),
                hint="move it away, or give another --dir",
            )

    def clear(self) -> None:
        """Remove what a run leaves that was killed before it had begun."""
        if not is_run_folder(self.folder) and self.folder.is_dir() and _is_leftover(self.folder):
            shutil.rmtree(self.folder)

    def is_held(self) -> bool:
        """Tell whether another process is at this run."""
        if not is_run_folder(self.folder):
            return False
        try:
            with RunFolder(self.folder).locked():
                return False
        except UserError:
            return True


@dataclass(frozen=True, slots=True)
class CheckedSetting:
    """A setting with its cells: either refused, and why, or what the checks have found out.

    `shown` has the value of every key of the grid: "-" where it has no effect, "" where it is not known.
    """

    setting: Setting
    name: str
    cells: tuple[Cell, ...]
    shown: Mapping[str, str]
    refusal: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    recipe: Recipe | None = None
    processes: int = 1
    threads: int = 1
    """Per process, as the recipe or the environment has it; else as many as there are cores."""
    is_on_gpu: bool = False
    open_keys: tuple[str, ...] = ()
    """Keys that measurements of this machine have chosen, which may come out otherwise next time."""
    text: str = ""
    """The recipe's text, without the keys in `left_out`."""
    left_out: tuple[str, ...] = ()
    """Keys of the recipe that the method of this setting cannot use."""

    @property
    def why(self) -> str:
        """Why it is refused, on one line; "" where it is allowed."""
        return "; ".join(f"{p.key}: {p.what}" if p.key else p.what for p in self.refusal)


def check_settings(
    recipe: str, grid: Grid, *, overrides: Sequence[str], directory: Path
) -> list[CheckedSetting]:
    """Check every setting as `run` would check it before its first step; nothing is written.

    Raises:
        UserError: there is no such recipe, or no setting is allowed.
        GridError: a cell's folder holds the run of another recipe.
    """
    names = setting_names(grid.settings, grid.keys)
    checked = [
        _check(recipe, setting, name, grid=grid, overrides=overrides, directory=directory)
        for name, setting in zip(names, grid.settings, strict=True)
    ]
    _check_some_are_allowed(checked, recipe)
    _check_folders(checked, grid)
    return checked


def _check(
    recipe: str, setting: Setting, name: str, *, grid: Grid, overrides: Sequence[str], directory: Path
) -> CheckedSetting:
    cells = tuple(_cells(setting, name, seeds=grid.seeds, overrides=overrides, directory=directory))
    own = {each.key: _as_shown(each.value) for each in setting.assignments}
    refused = CheckedSetting(setting, name, cells, {key: own.get(key, "") for key in grid.keys})
    try:
        fitted = _fitted(recipe, setting, cells[0], overrides=overrides)
        loaded = fitted.loaded
        plan = build.check(loaded)
    except RecipeError as error:
        return replace(refused, refusal=error.problems)
    processes = plan.layout.num_processes
    return CheckedSetting(
        setting,
        name,
        cells,
        _shown(loaded.recipe, grid.keys),
        warnings=(*loaded.warnings, *plan.warnings),
        recipe=plan.recipe,
        processes=processes,
        threads=build.num_threads(plan.recipe, processes=processes),
        is_on_gpu=plan.device.type == "cuda" or any(d.startswith("cuda") for d in plan.recipe.engine.devices),
        open_keys=_open_keys(loaded),
        text=fitted.text,
        left_out=fitted.left_out,
    )


def _fitted(recipe: str, setting: Setting, cell: Cell, *, overrides: Sequence[str]) -> Fitted:
    """Load a setting's recipe, without what another method than the recipe's own cannot use."""
    method = next((str(e.value) for e in setting.assignments if e.key == METHOD_KEY), "")
    given = [text.partition("=")[0].strip() for text in overrides]
    fixed = {*given, *(each.key for each in setting.assignments)}
    return fitted_recipe(find_recipe(recipe), cell.overrides, fixed=fixed, method=method)


def _cells(
    setting: Setting, name: str, *, seeds: Sequence[int], overrides: Sequence[str], directory: Path
) -> list[Cell]:
    own = (*overrides, *setting.overrides)
    if not seeds:
        return [Cell(name, directory / name, own)]
    names = {seed: cell_name(name, seed) for seed in seeds}
    return [Cell(n, directory / n, (*own, f"{SEED_KEY}={seed}"), seed) for seed, n in names.items()]


def _check_some_are_allowed(checked: Sequence[CheckedSetting], recipe: str) -> None:
    if any(not each.refusal for each in checked):
        return
    if len({each.refusal for each in checked}) == 1:
        raise RecipeError(checked[0].refusal, where=recipe)
    problems = [Problem(each.setting.text, f"not allowed: {each.why}") for each in checked]
    error = GridError(problems)
    error.what = error.what.replace(error.what.splitlines()[0], "no cell of the grid is allowed", 1)
    raise error


def _check_folders(checked: Sequence[CheckedSetting], grid: Grid) -> None:
    """Refuse to go on in a folder whose runs are others."""
    problems = []
    for each in checked:
        for cell in each.cells if each.recipe is not None else ():
            cell.check_folder()
            if cell.state is State.NEW:
                continue
            for key, here, there in differences(each, cell, grid_keys=grid.keys):
                what = f"{key} is {there} in the run that is there, and {here} in this sweep"
                problems.append(
                    Problem(str(cell.folder), what, "give another --dir, or move that folder away")
                )
    if problems:
        error = GridError(problems)
        error.what = error.what.replace("problem", "difference", 1)
        error.what = error.what.replace("in the grid", "between this sweep and the runs that are there", 1)
        raise error


def differences(
    checked: CheckedSetting, cell: Cell, *, grid_keys: Sequence[str]
) -> list[tuple[str, str, str]]:
    """Return (key, value here, value there) of every key in which the run in a cell's folder is another."""
    assert checked.recipe is not None
    there = cell.record().keys or {}
    here = flattened(checked.recipe) | ({} if cell.seed is None else {SEED_KEY: cell.seed})
    compared = [
        key
        for key in here
        if key in there
        and not key.startswith(checked.open_keys)
        and (key in grid_keys or not key.startswith(_PLACE_KEYS))
    ]
    return [
        (key, toml_value(here[key]), toml_value(there[key])) for key in compared if here[key] != there[key]
    ]


def _open_keys(loaded: LoadedRecipe) -> tuple[str, ...]:
    recipe = loaded.recipe
    measured = recipe.partition.balance in MEASURED_BALANCES and not recipe.partition.cuts
    least = recipe.engine.schedule == "least"
    return (*(("partition.",) if measured else ()), *(("engine.lookahead",) if least else ()))


def _defaults() -> dict[str, Any]:
    """Return the default of every key that has one, as JSON has it."""
    found = {
        f"{name}.{key}": field.get_default(call_default_factory=True)
        for name, section in SECTIONS.items()
        for key, field in section.model_fields.items()
        if not field.is_required()
    }
    return dict(json.loads(json.dumps(found)))


def _shown(recipe: Recipe, keys: Sequence[str]) -> dict[str, str]:
    idle = {each.key for each in idle_keys(recipe)}
    return {key: NO_EFFECT if key in idle else _as_shown(_value(recipe, key)) for key in keys}


def _value(recipe: Recipe, key: str) -> Any:
    value: Any = recipe.model_dump(mode="json")
    for part in key.split("."):
        value = value.get(part, "") if isinstance(value, dict) else ""
    return value


def _as_shown(value: Any) -> str:
    return value if isinstance(value, str) and value else toml_value(value)


def _is_leftover(folder: Path) -> bool:
    """Tell a folder that a run was killed in before it had begun: no file of it is anybody's work."""
    paths = list(folder.iterdir())
    return all(path.name in _LEFT_BY_A_START for path in paths) and not any(
        child for path in paths if path.is_dir() for child in path.iterdir()
    )
