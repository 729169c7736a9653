"""What `petractl run --resume auto` goes on with: the same command, given again, continues what it began.

With `--dir` that is the run in this folder; without it, the newest unfinished run of the same recipe in
`run.directory` that was begun with the same words. What a supervisor cannot know must not matter: a start
that was killed before there was a run leaves a folder without one, which is used again.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from petractl.errors import Problem, RecipeError, RunError, UserError
from petractl.recipe.load import LoadedRecipe, load_recipe
from petractl.recipe.overrides import parse_overrides
from petractl.recipe.schema import Recipe
from petractl.restarts import told_by_journal
from petractl.run_folder import ENVIRONMENT, LOCK, RECIPE, RESOLVED, RESUMING, RunFolder
from petractl.tracking.masking import mask_credentials

_OVERRIDES_KEY = "overrides"
_RECIPE_KEY = "recipe"
_START_FILES = frozenset({LOCK, RECIPE, ENVIRONMENT, f".{RESOLVED}", RESUMING})
_START_FOLDERS = frozenset({"checkpoints", "plots", "logs"})


def start_facts(loaded: LoadedRecipe, overrides: Sequence[str]) -> dict[str, object]:
    """Return what environment.json keeps of how a run was begun: enough to know the same command again."""
    return {_RECIPE_KEY: loaded.name, _OVERRIDES_KEY: [mask_credentials(text) for text in overrides]}


def run_to_continue(
    loaded: LoadedRecipe, directory: Path | None, overrides: Sequence[str], *, resumable: Sequence[str]
) -> RunFolder | None:
    """Return the run that this command goes on with, None where it begins one.

    `resumable` are the beginnings of keys that may change. What is left of a start that was killed before it
    began is cleared away.

    Raises:
        UserError: the folder holds the run of another recipe.
    """
    if directory is None:
        return _newest_unfinished(loaded, overrides, resumable)
    folder = RunFolder(directory)
    if folder.resolved.is_file():
        _check_recipe(folder, loaded)
        return folder
    _clear_unstarted(folder)
    return None


def changed_overrides(folder: RunFolder, overrides: Sequence[str]) -> list[str]:
    """Return the overrides that ask for something else than what the run has, or was begun with.

    Where runs are made says nothing about this one, which was found.
    """
    begun = _begun_with(folder)
    rest = [text for text in overrides if mask_credentials(text) not in begun and not _is_place(text)]
    if not rest:
        return []
    recipe = load_recipe(folder.resolved).recipe
    return [text for text in rest if not _is_as_it_was(folder, recipe, text)]


def change_of_recipe(folder: RunFolder, loaded: LoadedRecipe) -> list[Problem]:
    """Return a warning where the recipe is no longer what the run was begun with."""
    try:
        before = (folder.path / RECIPE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return []
    if before == loaded.text:
        return []
    what = f"{loaded.path} has changed since this run began; it goes on as {folder.resolved} says"
    return [Problem("", what, "to train by the changed recipe, begin a new run: petractl run, another --dir")]


def _newest_unfinished(
    loaded: LoadedRecipe, overrides: Sequence[str], resumable: Sequence[str]
) -> RunFolder | None:
    """Return the newest unfinished run of this recipe that differs in nothing that may not change."""
    found = sorted(_unfinished(Path(loaded.recipe.run.directory), loaded.name), key=lambda pair: pair[0])
    for _, folder in reversed(found):
        try:
            changed = changed_overrides(folder, overrides)
        except (UserError, RunError):
            continue  # its recipe cannot be read any more: no run of these words
        if all(text.strip().startswith(tuple(resumable)) for text in changed):
            return folder
    return None


def _unfinished(parent: Path, recipe_name: str) -> Iterator[tuple[tuple[float, str], RunFolder]]:
    """Yield the unfinished runs of a recipe in a folder, each with what orders them: when it began."""
    try:
        entries = [entry for entry in parent.iterdir() if entry.is_dir()]
    except OSError:
        return
    for entry in entries:
        folder = RunFolder(entry)
        if not folder.resolved.is_file():
            continue
        told = told_by_journal(folder)
        if not told.is_finished and (told.recipe_name or _recipe_name(folder)) == recipe_name:
            began_s = folder.resolved.stat().st_mtime if told.began_s is None else told.began_s
            yield (began_s, entry.name), folder


def _check_recipe(folder: RunFolder, loaded: LoadedRecipe) -> None:
    name = told_by_journal(folder).recipe_name or _recipe_name(folder)
    if name and name != loaded.name:
        raise UserError(
            f"this run is of the recipe {name}, not of {loaded.name}",
            where=str(folder.path),
            hint=f"give another --dir, or continue it: petractl resume {folder.path}",
        )


def _is_as_it_was(folder: RunFolder, recipe: Recipe, text: str) -> bool:
    (override,) = parse_overrides([text])
    section, key = override.path[:2]
    try:
        asked = load_recipe(folder.resolved, overrides=[text]).recipe
    except RecipeError:
        return False  # told when the run is resumed with it
    wanted, had = (getattr(getattr(each, section), key) for each in (asked, recipe))
    return bool(wanted == had)


def _is_place(text: str) -> bool:
    return text.partition("=")[0].strip() == "run.directory"


def _begun_with(folder: RunFolder) -> frozenset[str]:
    texts = _start_facts_of(folder).get(_OVERRIDES_KEY, [])
    return frozenset(str(text) for text in texts) if isinstance(texts, list) else frozenset()


def _recipe_name(folder: RunFolder) -> str:
    name = _start_facts_of(folder).get(_RECIPE_KEY, "")
    return name if isinstance(name, str) else ""


def _start_facts_of(folder: RunFolder) -> dict[str, object]:
    try:
        facts = json.loads((folder.path / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _clear_unstarted(folder: RunFolder) -> None:
    """Empty a folder that holds nothing but what a start writes first; anything else stays as it is."""
    if not _is_unstarted(folder.path):
        return
    with folder.locked():
        for entry in sorted(folder.path.iterdir()):
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()
    (folder.path / LOCK).unlink(missing_ok=True)


def _is_unstarted(path: Path) -> bool:
    try:
        entries = list(path.iterdir())
        return bool(entries) and all(_is_of_start(entry) for entry in entries)
    except OSError:
        return False


def _is_of_start(entry: Path) -> bool:
    if entry.is_symlink():
        return False
    if entry.is_dir():
        return entry.name in _START_FOLDERS and not any(entry.iterdir())
    return entry.name in _START_FILES
