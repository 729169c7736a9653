"""What `simulate` compares: a list of entries, each a method with a schedule. No torch.

    name[:keep][/schedule]                     petra   petra/paper   delayed:inputs/least   backprop/gpipe
    a schedule of petra                        tight   paper   slack=2   least   [3,2,1,0]
    a schedule of backprop                     plain (sequential)   gpipe   1f1b   interleaved   zero-bubble

A method counts here for what its backward costs: with the graph kept, two forwards; without it, one more.
"""

import json
import re
from dataclasses import dataclass

from petractl.engine.exact_rules import EXACT_SCHEDULES
from petractl.errors import Problem, RecipeError, UserError
from petractl.methods.family import METHODS, Keep, MethodSpec, method_spec
from petractl.planning.planned import why_unplanned

_FORM = re.compile(r"(?P<name>[^:/\[\]]+)(:(?P<keep>[^:/]+))?(/(?P<schedule>[^:/]+))?")
_COMMA = re.compile(r",(?![^\[]*\])")
_SLACK = re.compile(r"slack=(?P<slack>\d+)")
_METHODS = tuple(dict.fromkeys(spec.name for spec in METHODS if not spec.blocks))
_ALIASES = {"plain": "sequential", "interleaved": "interleaved-1f1b"}
_ASYNCHRONOUS = ("tight", "paper", "least")
_LOCKED = ("sequential", *EXACT_SCHEDULES)
_HINT = "tight, paper, slack=N, least, [W,...], delayed, plain, gpipe, 1f1b, interleaved, zero-bubble"

DEFAULT_ENTRIES = "tight,paper,least,delayed,gpipe,1f1b,interleaved,zero-bubble,plain"


@dataclass(frozen=True, slots=True)
class Entry:
    """A method and its schedule, under the label that was written."""

    label: str
    method: MethodSpec
    schedule: str | tuple[int, ...]
    slack: int = 0

    @property
    def keeps_graph(self) -> bool:
        """Whether no forward is evaluated twice."""
        return self.method.reversible.keep is Keep.GRAPH

    def is_like(self, other: "Entry") -> bool:
        """Tell whether only the labels differ."""
        return (self.method, self.schedule, self.slack) == (other.method, other.schedule, other.slack)


def parse_entries(text: str) -> tuple[Entry, ...]:
    """Read a list of entries, parted by commas; commas in brackets belong to a list of lookaheads.

    Raises:
        RecipeError: everything that is wrong with it.
    """
    problems, entries = [], []
    for part in dict.fromkeys(part.strip() for part in _COMMA.split(text)):
        try:
            entries.append(_entry(part))
        except (ValueError, UserError) as error:
            problems.append(
                Problem(part or "(empty)", str(error), f"known: {_HINT}, or METHOD[:keep]/SCHEDULE")
            )
    if problems:
        raise RecipeError(problems, where="--schedules")
    return tuple(entries)


def make_entry(label: str, *, method: MethodSpec, schedule: str | tuple[int, ...], slack: int = 0) -> Entry:
    """Return the entry of a recipe's own method and schedule; "auto" is what the method is run with."""
    if schedule == "auto":
        schedule = method.default_schedule
    return Entry(label, method, schedule, slack)


def _entry(text: str) -> Entry:
    if text.startswith("["):
        return Entry(text, method_spec("petra"), *_schedule(text))
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError("is not of the form name[:keep][/schedule]")
    name, keep, written = match["name"], match["keep"] or "", match["schedule"] or ""
    if why_unplanned(name):
        raise ValueError(why_unplanned(name))
    if name not in _METHODS:
        if written or keep:
            raise ValueError(f'"{name}" is not a method')
        schedule, slack = _schedule(name)
        of = "backprop" if schedule in _LOCKED else "petra"
        return Entry(text, method_spec(of), schedule, slack)
    spec = method_spec(name, keep=keep)
    if not written:
        return make_entry(text, method=spec, schedule="auto")
    schedule, slack = _schedule(written)
    if spec.locked and schedule not in _LOCKED:
        raise ValueError(f"{name} is locked and runs no forward ahead")
    if not spec.locked and schedule in EXACT_SCHEDULES:
        raise ValueError(f'"{schedule}" is exact and {name} is not: write backprop/{written}')
    return Entry(text, spec, schedule, slack)


def _schedule(text: str) -> tuple[str | tuple[int, ...], int]:
    """Return a schedule and its slack."""
    name = _ALIASES.get(text, text)
    if name in _ASYNCHRONOUS or name in _LOCKED:
        return name, 0
    match = _SLACK.fullmatch(text)
    if match is not None:
        return "tight", int(match["slack"])
    if text.startswith("["):
        try:
            values = json.loads(text)
        except ValueError:
            values = None
        if isinstance(values, list) and values and all(type(value) is int for value in values):
            return tuple(values), 0
        raise ValueError("is not a list of whole numbers")
    raise ValueError("is no schedule")
