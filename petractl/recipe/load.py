"""From a recipe's text to a checked `Recipe`: TOML, overrides, the schema, then what keys say together.

All problems are collected, each with its key, the value given, the limit and the remedy, and told at once: a
wrong key does not hide the contradiction between two others. TOML values go through JSON, which is where
pydantic's strict mode takes a list for a tuple and still refuses `true` for 1.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli
from pydantic import ValidationError

from petractl.errors import Problem, RecipeError, UserError
from petractl.recipe.checks import find_conflicts, find_warnings
from petractl.recipe.find import find_recipe
from petractl.recipe.overrides import apply_overrides, split_overrides
from petractl.recipe.problems import dotted, problem_of, unusable_values
from petractl.recipe.schema import MODEL_NAMES, REQUIRED_SECTIONS, SECTIONS, Recipe

_Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A checked recipe, where it came from, its text as given, and what is allowed but likely not meant."""

    recipe: Recipe
    name: str
    path: Path
    text: str
    warnings: tuple[Problem, ...] = ()


def load_recipe(source: str | Path, *, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Load and check a recipe, given by path or by the name of a shipped one.

    `overrides` are `section.key=value` texts and win over the file.

    Raises:
        RecipeError: everything that is wrong with it and can be known without building the model.
        UserError: there is no such recipe, or it cannot be read.
    """
    path = find_recipe(source)
    text = _read(path)
    parsed, problems = split_overrides(overrides)
    try:
        data = tomli.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError([_syntax_problem(error, text), *problems], where=str(path)) from None
    apply_overrides(data, parsed)
    recipe, found = _validate(data, overridden={override.path[:2] for override in parsed})
    if recipe is None or found or problems:
        raise RecipeError([*found, *problems], where=str(path))
    return LoadedRecipe(recipe, path.stem, path, text, tuple(find_warnings(recipe)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"not a text file (byte {error.start} is not UTF-8)", where=str(path)) from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None


def _syntax_problem(error: Exception, text: str) -> Problem:
    """Return a TOML syntax error with the line it is in."""
    if isinstance(error, RecursionError):
        return Problem("", "not valid TOML: nested too deeply")
    message = str(error)
    place = re.search(r" \(at line (\d+), column (\d+)\)$", message)
    if place is None:
        return Problem("", f"not valid TOML: {message}")
    number, column = int(place[1]), int(place[2])
    lines = text.splitlines()
    line = lines[number - 1].strip() if number <= len(lines) else ""
    return Problem(
        f"line {number}, column {column}",
        f"not valid TOML: {message[: place.start()]}",
        f"the line reads: {line}" if line else "",
    )


def _validate(data: dict[str, Any], *, overridden: set[_Path]) -> tuple[Recipe | None, list[Problem]]:
    """Return the recipe and every problem of its keys, alone and together; with problems do not use it.

    A wrong key is taken out of `data`, and the rest validated again to find the contradictions in it.
    """
    problems: list[Problem] = []
    bad_keys: set[str] = set()
    for path, problem in list(unusable_values(data)):
        problems.append(problem)
        bad_keys |= _take_out(data, path)
    try:
        recipe: Recipe | None = Recipe.model_validate_json(json.dumps(data))
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            if dotted(detail["loc"][:2]) not in bad_keys:
                problems.append(problem_of(detail, overridden=detail["loc"][:2] in overridden))
        for detail in error.errors(include_url=False):
            bad_keys |= _take_out(data, detail["loc"])
        recipe = _stand_in(data)
    if recipe is not None:
        problems += [c.problem for c in find_conflicts(recipe) if bad_keys.isdisjoint(c.keys)]
    return recipe, problems


def _take_out(data: dict[str, Any], path: _Path) -> set[str]:
    """Remove the key, or the whole section, that `path` leads to; return the keys that are gone."""
    section, *rest = (str(part) for part in path)
    table = data.get(section)
    if rest and isinstance(table, dict):
        table.pop(rest[0], None)
        return {f"{section}.{rest[0]}"}
    data.pop(section, None)
    keys = SECTIONS[section].model_fields if section in SECTIONS else ()
    return {section, *(f"{section}.{key}" for key in keys)}


def _stand_in(data: dict[str, Any]) -> Recipe | None:
    """Return a recipe of the keys that are right, for checks between them; what is missing is made up."""
    for section in REQUIRED_SECTIONS:
        data.setdefault(section, {})
    data["model"].setdefault("name", MODEL_NAMES[0])
    try:
        return Recipe.model_validate_json(json.dumps(data))
    except ValidationError:
        return None
