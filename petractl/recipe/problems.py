"""What is wrong with a recipe, in words: key, value given, limit and remedy.

Pydantic finds the errors; its messages speak of inputs and validators. Here each becomes a `Problem` in the
words of a recipe, with "did you mean" for a mistyped name and the way to write the value where only its type
is wrong.
"""

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import tomli
from pydantic_core import ErrorDetails

from petractl.errors import Problem
from petractl.recipe.schema import SECTIONS

_MAX_VALUE_LENGTH = 60
_INT64 = 2**63
_MAX_DEPTH = 32

_TYPE_LIMITS = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "tuple_type": "must be a list",
    "dict_type": "must be a table",
}


def closest(name: str, known: Iterable[str]) -> str:
    """Return the known name that `name` most likely stands for, or an empty string."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "did you mean ...?" for a mistyped name, or an empty string."""
    match = closest(name, known)
    return f"did you mean {match}?" if match else ""


def in_toml(value: object) -> str:
    """Write a value that was given as TOML does, shortened to a line."""
    if isinstance(value, (bool, str, int, float, list, tuple, dict)):
        text = json.dumps(value, ensure_ascii=False, default=str)
    else:
        text = str(value)
    return text if len(text) <= _MAX_VALUE_LENGTH else text[: _MAX_VALUE_LENGTH - 3] + "..."


def unusable_values(
    data: object, path: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], Problem]]:
    """Yield path and problem of every value that TOML has but no key takes: dates, nan, inf, huge numbers."""
    if len(path) > _MAX_DEPTH:
        yield path, Problem(dotted(path[:2]), "is nested too deeply")
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from unusable_values(value, (*path, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from unusable_values(value, (*path, index))
    elif isinstance(data, float) and not math.isfinite(data):
        yield path, Problem(dotted(path), f"must be a finite number, not {data}")
    elif isinstance(data, int) and not -_INT64 <= data < _INT64:
        yield path, Problem(dotted(path), f"is too large: whole numbers end at {_INT64 - 1:,}")
    elif not isinstance(data, (str, int, float)):
        what = f"is a date or time ({data}), which no key takes"
        yield path, Problem(dotted(path), what, f'for a string put it in quotes: "{data}"')


def dotted(path: Sequence[str | int]) -> str:
    """Return a path as it is written: `partition.cuts[1]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def problem_of(error: ErrorDetails, *, overridden: bool) -> Problem:
    """Return a pydantic error as a problem; `overridden` tells that the value came from the command line."""
    path, value, kind = error["loc"], error["input"], error["type"]
    key = dotted(path)
    if kind == "extra_forbidden":
        return unknown_key([str(part) for part in path], value)
    if kind == "missing":
        return _missing(path)
    if kind == "model_type":
        return _not_a_table(key, value)
    given = in_toml(value) + (" (from --set)" if overridden else "")
    return Problem(key, f"{_limit(error)}, not {given}", _remedy(error, overridden=overridden))


def unknown_key(path: Sequence[str], value: object = None) -> Problem:
    """Return the problem of a section or key that does not exist."""
    section, key = path[0], path[-1]
    if len(path) == 1:
        return _unknown_section(section, is_table=value is None or isinstance(value, Mapping))
    known = list(SECTIONS[section].model_fields)
    elsewhere = [f"{name}.{key}" for name, model in SECTIONS.items() if key in model.model_fields]
    near = closest(key, known)
    if near:
        hint = f"did you mean {section}.{near}?"
    elif elsewhere:
        hint = f"did you mean {' or '.join(elsewhere)}?"
    else:
        hint = f"the keys of [{section}] are {', '.join(known)}"
    return Problem(f"{section}.{key}", f"there is no such key in [{section}]", hint)


def _unknown_section(name: str, *, is_table: bool) -> Problem:
    if not is_table:
        homes = [f"{section}.{name}" for section, model in SECTIONS.items() if name in model.model_fields]
        where = f"did you mean {' or '.join(homes)}?" if homes else "every key belongs in a section"
        return Problem(name, "stands outside of the sections", where)
    hint = did_you_mean(name, SECTIONS) or f"the sections are {', '.join(SECTIONS)}"
    return Problem(name, "there is no such section", hint)


def _missing(path: Sequence[str | int]) -> Problem:
    section = str(path[0])
    example = {"model": 'name = "revnet18"', "data": 'name = "digits"', "method": 'name = "petra"'}.get(
        section, ""
    )
    if len(path) == 1:
        return Problem(section, "this section is missing", f"add [{section}] with {example}")
    return Problem(dotted(path), "this key is missing", f"add {example} to [{section}]")


def _not_a_table(key: str, value: object) -> Problem:
    many = isinstance(value, list)
    what = "is written twice or as [[...]]" if many else f"must be a section, not {in_toml(value)}"
    return Problem(key, what, f"write [{key}] on a line of its own, with its keys below")


def _limit(error: ErrorDetails) -> str:
    kind, bounds = error["type"], error.get("ctx", {})
    if kind in _TYPE_LIMITS:
        return _TYPE_LIMITS[kind]
    match kind:
        case "recipe_value":
            return str(bounds["limit"])
        case "literal_error":
            return f"must be {str(bounds['expected']).replace(chr(39), chr(34))}"
        case "greater_than_equal":
            return f"must be at least {_bound(bounds['ge'])}"
        case "greater_than":
            return f"must be more than {_bound(bounds['gt'])}"
        case "less_than_equal":
            return f"must be at most {_bound(bounds['le'])}"
        case "less_than":
            return f"must be less than {_bound(bounds['lt'])}"
        case "string_too_short":
            return "must not be empty"
        case "too_short" | "too_long":
            return f"must have {bounds.get('min_length', bounds.get('max_length'))} entries"
    return error["msg"].replace("Input should", "must", 1)


def _bound(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _remedy(error: ErrorDetails, *, overridden: bool) -> str:
    value, kind, bounds = error["input"], error["type"], error.get("ctx", {})
    key = str(error["loc"][-1])
    choices = list(bounds.get("choices", ()))
    if kind == "literal_error":
        choices = str(bounds["expected"]).replace(" or ", ", ").replace("'", "").split(", ")
    if choices and isinstance(value, str):
        return did_you_mean(value, choices)
    if kind == "string_type" and isinstance(value, (bool, int, float)):
        quoted = f'"{in_toml(value)}"'
        return (
            f"put it in quotes: --set '{dotted(error['loc'])}={quoted}'"
            if overridden
            else f"put it in quotes: {quoted}"
        )
    if kind in ("int_type", "float_type", "bool_type") and isinstance(value, str):
        return _without_quotes(key, value, wanted=kind)
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if kind == "bool_type" and value in (0, 1):
        return f"write {'true' if value else 'false'}"
    if kind == "tuple_type":
        return f"write it in brackets: {key} = [{'...' if isinstance(value, Mapping) else in_toml(value)}]"
    return ""


def _without_quotes(key: str, text: str, *, wanted: str) -> str:
    """Return how to write a value that was given as a string by mistake."""
    if wanted == "bool_type":
        meant = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}
        word = meant.get(text.lower(), "")
        return f"write {word}, in lower case and without quotes" if word else ""
    try:
        bare = tomli.loads(f"value = {text}").get("value")
    except ValueError:
        return ""
    is_number = isinstance(bare, int if wanted == "int_type" else (int, float)) and not isinstance(bare, bool)
    return f"write it without quotes: {key} = {text}" if is_number else ""
