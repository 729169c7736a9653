"""What a sweep varies: the settings that `--grid`, `--cell` and `--seeds` spell out.

    --grid method.target=global,local --grid method.guess=local,random-gaussian     every combination
    --grid model.name+model.width=revnet18+16,resnet18+23                           keys that go together
    --cell method.name=backprop,optimizer.lr=0.1                                    one more setting

Values are TOML, and what is not TOML is a string, as with `--set`; lists are parted at the commas that stand
in no bracket and no quotes. Everything wrong with a grid is told at once, before a recipe is read.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from petractl.errors import Problem, RecipeError
from petractl.recipe.overrides import split_overrides
from petractl.recipe.problems import problem_of, unusable_values
from petractl.recipe.schema import SECTIONS

SEED_KEY = "run.seed"
_FORM = "write --grid section.key=value,value, such as --grid optimizer.lr=0.1,0.05"
_CELL_FORM = "write --cell section.key=value, with commas between several"
_INT64 = 2**63
_BRACKETS = {"[": "]", "{": "}"}


class GridError(RecipeError):
    """What is wrong with a grid, all of it together (exit code 2)."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(problems)
        self.what = self.what.replace("in the recipe", "in the grid", 1)


@dataclass(frozen=True, slots=True)
class Assignment:
    """A key and its value, as written and as read."""

    key: str
    text: str
    value: Any

    @property
    def override(self) -> str:
        """The assignment as `--set` takes it."""
        return f"{self.key}={self.text}"


@dataclass(frozen=True, slots=True)
class Axis:
    """Keys that vary together, and their values: one tuple of assignments for each choice."""

    keys: tuple[str, ...]
    choices: tuple[tuple[Assignment, ...], ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """One combination: what it sets, in the order of the grid. Its runs differ only in their seeds."""

    assignments: tuple[Assignment, ...]

    @property
    def overrides(self) -> tuple[str, ...]:
        """What it sets, as `--set` takes it."""
        return tuple(each.override for each in self.assignments)

    @property
    def text(self) -> str:
        """What it sets, for people; "the recipe" where that is nothing."""
        return ", ".join(self.overrides) or "the recipe"

    @property
    def identity(self) -> str:
        """A text that is equal for settings that set the same."""
        values = {e.key: float(e.value) if type(e.value) is int else e.value for e in self.assignments}
        return json.dumps(values, sort_keys=True, default=str)


@dataclass(frozen=True, slots=True)
class Grid:
    """A sweep's settings, in order, and the seeds of each; no seeds: the recipe's own, once."""

    axes: tuple[Axis, ...]
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...] = ()
    num_extra: int = 0
    """How many of the settings, the last ones, are cells of their own."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key that some setting sets, in the order of first mention."""
        given = [key for axis in self.axes for key in axis.keys]
        given += [each.key for setting in self.settings for each in setting.assignments]
        return tuple(dict.fromkeys(given))


def parse_grid(
    grids: Sequence[str], *, cells: Sequence[str] = (), seeds: str = "", overrides: Sequence[str] = ()
) -> Grid:
    """Read what the command line says of a sweep; `overrides` are those of `--set`.

    Raises:
        GridError: everything that is wrong with it by itself.
    """
    problems: list[Problem] = []
    axes = [axis for text in grids if (axis := _axis(text, problems)) is not None]
    extra = [cell for text in cells if (cell := _cell(text, problems)) is not None]
    numbers = _seeds(seeds, problems)
    if not (grids or cells or seeds.strip()):
        problems.append(Problem("", "nothing varies: there is no --grid, no --cell and no --seeds", _FORM))
    problems += _repeated_keys(axes)
    given = {text.partition("=")[0].strip() for text in overrides}
    grid = Grid(tuple(axes), tuple(_settings(axes, extra)), numbers, num_extra=len(extra))
    problems += [
        Problem(key, "is set by --set too, which would have no effect", "leave it out of one of them")
        for key in grid.keys
        if key in given and all(key in [e.key for e in setting.assignments] for setting in grid.settings)
    ]
    if numbers and SEED_KEY in (*grid.keys, *given):
        problems.append(Problem(SEED_KEY, "is given besides --seeds", "leave it out of one of them"))
    problems += _repeated_settings(grid.settings)
    if problems:
        raise GridError(list(dict.fromkeys(problems)))
    return grid


def split_values(text: str, *, separator: str = ",") -> list[str]:
    """Split at the separators that stand in no quotes and no brackets; blanks around a part are dropped."""
    parts, start, closing, quote = [], 0, [], ""
    is_escaped = False
    for place, character in enumerate(text):
        if quote:
            if character == quote and not is_escaped:
                quote = ""
            is_escaped = character == "\\" and quote == '"' and not is_escaped
        elif character in "\"'":
            quote = character
        elif character in _BRACKETS:
            closing.append(_BRACKETS[character])
        elif closing and character == closing[-1]:
            closing.pop()
        elif character == separator and not closing:
            parts.append(text[start:place].strip())
            start = place + 1
    return [*parts, text[start:].strip()]


def _axis(text: str, problems: list[Problem]) -> Axis | None:
    """Read one `--grid`."""
    names, equals, values = text.partition("=")
    keys = tuple(key.strip() for key in names.split("+"))
    before = len(problems)
    if not equals or not all(keys):
        problems.append(Problem(f"--grid {text}", "is not of the form section.key=value,value", _FORM))
        return None
    choices = []
    for entry in split_values(values):
        parts = split_values(entry, separator="+") if len(keys) > 1 else [entry]
        if len(parts) != len(keys):
            what = f'"{entry}" has {len(parts)} values for {len(keys)} keys'
            problems.append(Problem(names, what, f"write {'+'.join('value' for _ in keys)}"))
            continue
        read = [_assignment(key, part, problems) for key, part in zip(keys, parts, strict=True)]
        choices.append(tuple(each for each in read if each is not None))
    if len(problems) > before:
        return None
    twice = _first_repeated([Setting(choice).identity for choice in choices])
    if twice is not None:
        values = "+".join(each.text for each in choices[twice])
        problems.append(Problem(names, f"has {values} twice", "leave one out"))
        return None
    return Axis(keys, tuple(choices))


def _cell(text: str, problems: list[Problem]) -> Setting | None:
    """Read one `--cell`."""
    before, assignments = len(problems), []
    for part in split_values(text):
        key, equals, value = part.partition("=")
        if not equals:
            problems.append(Problem(f"--cell {text}", f'"{part}" is not section.key=value', _CELL_FORM))
            continue
        read = _assignment(key.strip(), value.strip(), problems)
        assignments += [read] if read is not None else []
    if len(problems) > before:
        return None
    twice = _first_repeated([each.key for each in assignments])
    if twice is not None:
        problems.append(Problem(assignments[twice].key, f"stands twice in --cell {text}", "leave one out"))
        return None
    return Setting(tuple(assignments))


def _assignment(key: str, text: str, problems: list[Problem]) -> Assignment | None:
    """Read one value; it must be one that its key can take, whatever the other keys are."""
    if not text:
        problems.append(Problem(key, "has an empty value", 'for an empty string write ""'))
        return None
    read, wrong = split_overrides([f"{key}={text}"])
    if wrong:
        problems += [
            Problem(p.key.replace("--set ", "--grid ", 1), p.what, p.hint.replace("--set", "--grid"))
            for p in wrong
        ]
        return None
    (override,) = read
    found = list(_value_problems(override.path, override.value))
    problems += found
    return None if found else Assignment(key, text, override.value)


def _value_problems(path: tuple[str, ...], value: Any) -> Iterator[Problem]:
    """Check a value against its key alone: its type and its limits."""
    section, key = path[:2]
    unusable = [problem for _, problem in unusable_values({section: {key: value}})]
    yield from unusable
    if unusable or len(path) > 2:
        return
    try:
        SECTIONS[section].model_validate_json(json.dumps({key: value}))
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            if detail["loc"][:1] == (key,):
                detail["loc"] = (section, *detail["loc"])
                yield problem_of(detail, overridden=False)


def _seeds(text: str, problems: list[Problem]) -> tuple[int, ...]:
    """Read `--seeds`."""
    if not text.strip():
        return ()
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not (part.isascii() and part.isdecimal() and int(part) < _INT64)]
    if wrong:
        what = f'"{wrong[0]}" is no whole number from 0 to 2**63 - 1'
        problems.append(Problem("--seeds", what, "write --seeds 0,1,2"))
        return ()
    seeds = tuple(int(part) for part in parts)
    twice = _first_repeated(list(map(str, seeds)))
    if twice is not None:
        problems.append(Problem("--seeds", f"has {seeds[twice]} twice", "leave one out"))
    return seeds


def _settings(axes: Sequence[Axis], extra: Sequence[Setting]) -> Iterator[Setting]:
    """Yield the product of the axes, the last one varying fastest, then the cells of their own."""
    if axes or not extra:
        for choices in itertools.product(*(axis.choices for axis in axes)):
            yield Setting(tuple(each for choice in choices for each in choice))
    yield from extra


def _repeated_keys(axes: Sequence[Axis]) -> list[Problem]:
    keys = [key for axis in axes for key in axis.keys]
    return [
        Problem(key, "is given in two places of the grid", "give all its values in one")
        for key in dict.fromkeys(keys)
        if keys.count(key) > 1
    ]


def _repeated_settings(settings: Sequence[Setting]) -> list[Problem]:
    place = _first_repeated([setting.identity for setting in settings])
    return [] if place is None else [Problem(settings[place].text, "is given twice", "leave one out")]


def _first_repeated(items: Sequence[str]) -> int | None:
    """Return the place of the first item that has come before."""
    seen: set[str] = set()
    for place, item in enumerate(items):
        if item in seen:
            return place
        seen.add(item)
    return None
