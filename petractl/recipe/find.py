"""Recipes by path or by name.

The shipped recipes are installed with the package, so `petractl run digits_revnet18` works in any folder; in
a checkout they are the files in `recipes/`. A file that lies at the path given always comes first.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import petractl
from petractl.errors import UserError
from petractl.recipe.problems import did_you_mean


@dataclass(frozen=True, slots=True)
class ShippedRecipe:
    """A recipe that comes with petractl: its name, the first line of its comment, its file."""

    name: str
    title: str
    path: Path


def find_recipe(name_or_path: str | Path) -> Path:
    """Return the file of a recipe: the path as given, else the shipped recipe of that name.

    A name may have `.toml` at its end and `recipes/` before it.

    Raises:
        UserError: there is no such recipe, or it is a folder.
    """
    given = Path(name_or_path)
    if _is(given, Path.is_file):
        return given
    name = _bare_name(given)
    shipped = {path.stem: path for path in _shipped_files()}
    if name in shipped:
        return shipped[name]
    if _is(given, Path.is_dir):
        hint = f"to continue this run: petractl resume {given}" if (given / "resolved.toml").is_file() else ""
        raise UserError("this is a folder, not a recipe", where=str(given), hint=hint)
    raise UserError("no such recipe", where=str(name_or_path), hint=_suggestion(given, name, list(shipped)))


def list_recipes() -> list[ShippedRecipe]:
    """Return the shipped recipes, by name."""
    return [ShippedRecipe(path.stem, _title(path), path) for path in _shipped_files()]


def _is(path: Path, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(path)
    except (OSError, ValueError):  # a name too long for the file system, or with a null byte
        return False


def _bare_name(path: Path) -> str:
    """Return the name for `name`, `name.toml` and `recipes/name.toml`; an empty string for any other path."""
    if path.is_absolute() or path.parts[:-1] not in ((), ("recipes",)):
        return ""
    return path.name.removesuffix(".toml")


def _shipped_files() -> list[Path]:
    package = Path(petractl.__file__).parent
    installed = package / "shipped_recipes"
    folder = installed if installed.is_dir() else package.parent / "recipes"
    return sorted(folder.glob("*.toml"))


def _suggestion(given: Path, name: str, shipped: list[str]) -> str:
    neighbours = [str(path) for path in _neighbours(given)]
    match = did_you_mean(str(given), neighbours) or did_you_mean(name or given.stem, shipped)
    return match or f"shipped recipes: {', '.join(shipped)}"


def _neighbours(given: Path) -> Iterator[Path]:
    try:
        yield from sorted(given.parent.glob("*.toml"))
    except (OSError, ValueError):
        return


def _title(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            return line.removeprefix("#").strip() if line.startswith("#") else ""
    return ""
