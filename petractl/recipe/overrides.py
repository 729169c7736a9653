"""Overrides from the command line: `--set section.key=value`.

The value is read as TOML; what is not TOML is a string, so `--set method.name=backprop` needs no quotes. The
command line wins over the recipe also where two keys say the same thing: `--set partition.stages=4` takes the
recipe's cuts out.
"""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import tomli

from petractl.errors import Problem, RecipeError
from petractl.recipe.problems import unknown_key
from petractl.recipe.schema import SECTIONS

_FORM = "write --set section.key=value, such as --set training.epochs=3"
_RIVALS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("partition", "stages"): ("partition", "cuts"),
    ("partition", "cuts"): ("partition", "stages"),
}


@dataclass(frozen=True, slots=True)
class Override:
    """One key to set: its path (section, key, and deeper only in `arguments` tables) and its value."""

    path: tuple[str, ...]
    value: Any


def parse_overrides(texts: Sequence[str]) -> tuple[Override, ...]:
    """Read `section.key=value` texts, in order.

    Raises:
        RecipeError: texts that do not have this form, or name no key of a recipe; all of them together.
    """
    overrides, problems = split_overrides(texts)
    if problems:
        raise RecipeError(problems, where="--set")
    return overrides


def split_overrides(texts: Sequence[str]) -> tuple[tuple[Override, ...], tuple[Problem, ...]]:
    """Read `section.key=value` texts; return the good ones, and the problems of the others."""
    overrides: list[Override] = []
    problems: list[Problem] = []
    for text in texts:
        read = _read(text)
        (overrides if isinstance(read, Override) else problems).append(read)  # type: ignore[arg-type]
    return tuple(overrides), tuple(problems)


def apply_overrides(data: MutableMapping[str, Any], overrides: Sequence[Override]) -> None:
    """Set the values in a recipe's tables, in order; the last one of a key wins."""
    given = {override.path for override in overrides}
    for override in overrides:
        rival = _RIVALS.get(override.path)
        section = data.get(override.path[0])
        if rival and rival not in given and isinstance(section, MutableMapping):
            section.pop(rival[1], None)
        _set(data, override)


def _set(data: MutableMapping[str, Any], override: Override) -> None:
    table: Any = data
    for part in override.path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, MutableMapping):
            return  # the recipe has no table here, which the schema reports
    table[override.path[-1]] = override.value


def _read(text: str) -> Override | Problem:
    name, equals, value = text.partition("=")
    path = tuple(part.strip() for part in name.split("."))
    if not equals or len(path) < 2 or not all(path):
        return Problem(f"--set {_printable(text)}", "is not of the form section.key=value", _FORM)
    if not _is_text(text):
        return Problem(f"--set {_printable(name)}", "the value is not UTF-8 text")
    section, key = path[:2]
    if section not in SECTIONS:
        return unknown_key([section])
    if key not in SECTIONS[section].model_fields:
        return unknown_key([section, key])
    if len(path) > 2 and key != "arguments":
        return Problem(name.strip(), f"{section}.{key} is not a table", f"write --set {section}.{key}=value")
    return Override(path, _value(value))


def _value(text: str) -> Any:
    """Read a TOML value; anything else is a string."""
    try:
        tables = tomli.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    # "1\nother = 2" parses too, but as more than a value
    return tables["value"] if list(tables) == ["value"] else text


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(text: str) -> str:
    return text.encode(errors="replace").decode()
