"""A recipe for another method than its own, without the keys that the other one cannot use.

A recipe of forward gradients says a target and a guess, which backprop beside it refuses. So where a cell
sets `method.name`, the recipe's own keys that the checks then find wrong, or without effect, are left out,
and the default takes their place, as in `petractl bench`. What the command line says is never left out.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tomli
import tomlkit

from petractl.errors import Problem, RecipeError
from petractl.recipe.load import LoadedRecipe, load_recipe

METHOD_KEY = "method.name"

_SECTIONS = ("method.", "auxiliary.")
_KEYS = ("engine.schedule", "engine.slack")


@dataclass(frozen=True, slots=True)
class Fitted:
    """A recipe that loads, its text, and the keys that were left out of it."""

    loaded: LoadedRecipe
    text: str
    left_out: tuple[str, ...] = ()


def fitted_recipe(recipe: Path, overrides: Sequence[str], *, fixed: Collection[str], method: str) -> Fitted:
    """Load a recipe with overrides, for `method` ("" for its own); `fixed` are keys that stay.

    Raises:
        RecipeError: what is wrong, also without the keys that may be left out.
    """
    own = _own_keys(recipe)
    is_foreign = bool(method) and own.get(METHOD_KEY, method) != method
    try:
        loaded = load_recipe(recipe, overrides=overrides)
    except RecipeError as error:
        left_out = _foreign(error.problems, own, fixed) if is_foreign else ()
        if not left_out:
            raise
    else:
        idle = [warning for warning in loaded.warnings if warning.what.startswith("has no effect")]
        left_out = _foreign(idle, own, fixed) if is_foreign else ()
        if not left_out:
            return Fitted(loaded, loaded.text)
    with TemporaryDirectory(prefix="petractl-sweep-") as folder:
        smaller = Path(folder) / recipe.name
        smaller.write_text(_without(recipe.read_text(encoding="utf-8-sig"), left_out), encoding="utf-8")
        rest = fitted_recipe(smaller, overrides, fixed=fixed, method=method)
    return Fitted(rest.loaded, rest.text, (*left_out, *rest.left_out))


def _own_keys(recipe: Path) -> dict[str, object]:
    """Return the keys that the recipe itself sets; none where it is no TOML, which loading it tells."""
    try:
        tables = tomli.loads(recipe.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {
        f"{section}.{key}": value
        for section, table in tables.items()
        if isinstance(table, dict)
        for key, value in table.items()
    }


def _foreign(problems: Sequence[Problem], own: Collection[str], fixed: Collection[str]) -> tuple[str, ...]:
    """Return the keys of the problems that may be left out, each once."""
    keys = [problem.key for problem in problems]
    may_go = [key for key in keys if key.startswith(_SECTIONS) or key in _KEYS]
    return tuple(
        dict.fromkeys(key for key in may_go if key in own and key not in fixed and key != METHOD_KEY)
    )


def _without(text: str, keys: Sequence[str]) -> str:
    document = tomlkit.parse(text)
    for name in keys:
        section, key = name.split(".", maxsplit=1)
        del document[section][key]
    return tomlkit.dumps(document)
