"""What is compared: a recipe with other methods and schedules in it, all checked before anything starts.

    name[:keep][/schedule]      petra   petra/paper   delayed:graph   petra/[2,1,0]   backprop/gpipe

What a variant does not name is the recipe's own, where the variant's method can use it, and the default where
it cannot: `petra` in a recipe of `delayed` with `keep = "inputs"` has no use for that `keep`.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from petractl.errors import Problem, RecipeError
from petractl.recipe.checks import find_conflicts, find_warnings
from petractl.recipe.load import LoadedRecipe
from petractl.recipe.problems import problem_of
from petractl.recipe.schema import (
    BLOCK_METHODS,
    ESTIMATOR_KEYS,
    EXACT_SCHEDULE_NAMES,
    LOCKED_METHODS,
    STAGES_PER_PROCESS,
    Recipe,
)

_FORM = re.compile(r"(?P<name>[^:/]+)(:(?P<keep>[^:/]+))?(/(?P<schedule>[^:/]+))?")
_COMMA = re.compile(r",(?![^\[]*\])")


@dataclass(frozen=True, slots=True)
class Variant:
    """A method, what it keeps and its schedule; empty where the recipe decides."""

    text: str
    name: str
    keep: str = ""
    schedule: str = ""


def parse_variants(text: str) -> tuple[Variant, ...]:
    """Read a list of variants, parted by commas; commas in brackets belong to a schedule.

    Raises:
        RecipeError: entries that do not have the form, all of them together.
    """
    parts = [part.strip() for part in _COMMA.split(text)]
    matches = [(part, _FORM.fullmatch(part)) for part in parts]
    problems = [
        Problem(
            part or "(empty)", "is not of the form name[:keep][/schedule]", "write, for example, petra/paper"
        )
        for part, match in matches
        if match is None
    ]
    if problems:
        raise RecipeError(problems, where="--methods")
    return tuple(
        Variant(part, match["name"], match["keep"] or "", match["schedule"] or "")
        for part, match in matches
        if match is not None
    )


def vary(base: LoadedRecipe, variant: Variant, *, mode: str = "") -> LoadedRecipe:
    """Return the recipe with the variant's method and schedule in it, and engine.mode = `mode` if given.

    Raises:
        RecipeError: everything that is wrong with it and can be known without building the model.
    """
    data = base.recipe.model_dump(mode="json", exclude_unset=True)
    _set_method(data, base.recipe, variant)
    _set_schedule(data, base.recipe, variant)
    _set_stages(data, base.recipe)
    if mode:
        data["engine"]["mode"] = mode
    try:
        recipe = Recipe.model_validate_json(json.dumps(data))
    except ValidationError as error:
        found = [problem_of(detail, overridden=False) for detail in error.errors(include_url=False)]
        raise RecipeError(found, where=str(base.path)) from None
    conflicts = [conflict.problem for conflict in find_conflicts(recipe)]
    if conflicts:
        raise RecipeError(conflicts, where=str(base.path))
    return dataclasses.replace(base, recipe=recipe, warnings=tuple(find_warnings(recipe)))


def _set_method(data: dict[str, Any], base: Recipe, variant: Variant) -> None:
    section = data.setdefault("method", {})
    section["name"] = variant.name
    if variant.keep:
        section["keep"] = variant.keep
    elif variant.name != base.method.name:
        section.pop("keep", None)
    if variant.name != "forward-gradient":
        for key in ESTIMATOR_KEYS:
            section.pop(key, None)
    if variant.name not in BLOCK_METHODS:
        data.pop("auxiliary", None)


def _set_schedule(data: dict[str, Any], base: Recipe, variant: Variant) -> None:
    section = data.setdefault("engine", {})
    if variant.schedule:
        section["schedule"] = _schedule_value(variant.schedule)
    elif not _fits(base, variant.name):
        section.pop("schedule", None)
    if not _takes_slack(variant.name, section.get("schedule", "auto")):
        section.pop("slack", None)


def _takes_slack(method: str, schedule: object) -> bool:
    if method in BLOCK_METHODS:
        return schedule == "tight"
    return method not in LOCKED_METHODS and schedule in ("auto", "tight")


def _fits(base: Recipe, method: str) -> bool:
    """Tell whether a method can use the recipe's schedule as the recipe's own method does."""
    blocks = {method, base.method.name} & set(BLOCK_METHODS)
    if blocks or base.engine.schedule in EXACT_SCHEDULE_NAMES:
        return method == base.method.name
    return (method in LOCKED_METHODS) == (base.method.name in LOCKED_METHODS)


def _schedule_value(text: str) -> Any:
    """Read a list of lookaheads; anything else is a name."""
    if not text.startswith("["):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _set_stages(data: dict[str, Any], base: Recipe) -> None:
    """Keep the number of processes where a schedule gives each of them several stages."""
    stages = base.partition.stages
    if isinstance(stages, int) and not base.partition.cuts:
        before = _stages_per_process(base.engine.schedule)
        after = _stages_per_process(data["engine"].get("schedule", "auto"))
        data.setdefault("partition", {})["stages"] = stages * after // before


def _stages_per_process(schedule: object) -> int:
    return STAGES_PER_PROCESS.get(schedule, 1) if isinstance(schedule, str) else 1


def joined(problems: Mapping[str, Sequence[Problem]]) -> list[Problem]:
    """Return the problems of all variants: what all of them share once, the rest with the variant's name."""
    shared = [p for p in next(iter(problems.values()), ()) if all(p in found for found in problems.values())]
    own = [
        dataclasses.replace(p, key=f"{text}: {p.key}" if p.key else text)
        for text, found in problems.items()
        for p in found
        if p not in shared
    ]
    return [*shared, *own]
