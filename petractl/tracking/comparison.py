"""What differs between runs: keys of their recipes first of all, and the words that tell the runs apart.

A key counts by its value, defaults filled in, so a recipe that writes a default out equals one that leaves it
out, and 1 equals 1.0. Where a run keeps its files and is logged is no difference between two trainings. The
cuts stand in place of the rule that chose them, which is how resolved.toml has them.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from petractl.tracking.comparison_run import RunRecord
from petractl.tracking.masking import mask_credentials

UNKNOWN = "?"

CUTS, LOOKAHEAD = "cuts", "lookahead"
_RENAMED = {"partition.cuts": CUTS, "engine.lookahead": LOOKAHEAD}
_RULES = ("partition.stages", "partition.balance")  # what chose the cuts
_ELSEWHERE = ("run.directory", "diagnostics.", "tracking.")
_LONGEST = 24  # characters of a value in a label


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs with names of their own, and their keys: one value per run where they differ, else the value.

    A run whose keys are not known has None there, and has no say in what is equal.
    """

    runs: tuple[RunRecord, ...]
    differing: Mapping[str, tuple[Any, ...]]
    equal: Mapping[str, Any]
    at_default: tuple[str, ...]  # of the equal ones


def compare_runs(
    runs: Sequence[RunRecord], *, defaults: Mapping[str, Any], all_keys: bool = False
) -> Comparison:
    """Compare runs; `all_keys` has in where files lie, where runs are logged and how cuts were chosen."""
    usual = _compared_keys(defaults, all_keys=all_keys) or {}
    tables = [_compared_keys(run.keys, all_keys=all_keys) for run in runs]
    known = [table for table in tables if table is not None]
    names = list(dict.fromkeys(name for table in known for name in table))
    differing, equal = {}, {}
    for name in names:
        values = [table.get(name) for table in known]
        if len({_identity(value) for value in values}) == 1:
            equal[name] = values[0]
        else:
            differing[name] = tuple(None if table is None else table.get(name) for table in tables)
    at_default = [
        key for key, value in equal.items() if key in usual and _identity(value) == _identity(usual[key])
    ]
    return Comparison(_named_apart(runs), differing, equal, tuple(at_default))


def value_text(value: object) -> str:
    """Return a value as TOML has it, but for words, which need no quotes; what is not known as "?"."""
    if value is None:
        return UNKNOWN
    if isinstance(value, str):
        hidden = mask_credentials(value)
        return hidden if hidden and hidden.isprintable() else json.dumps(hidden)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key} = {value_text(item)}' for key, item in value.items())}}}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def masked(value: object) -> Any:
    """Return a value, whatever it holds, without credentials."""
    if isinstance(value, str):
        return mask_credentials(value)
    if isinstance(value, Mapping):
        return {str(key): masked(item) for key, item in value.items()}
    return [masked(item) for item in value] if isinstance(value, list | tuple) else value


def short_texts(key: str, values: Sequence[object]) -> list[str]:
    """Return a key's values in few characters each, as far as those tell the same values apart."""
    full = [value_text(value) for value in values]
    shorter = [
        [text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..." for text in full],
        [text if len(text) <= _LONGEST else f"...{text[3 - _LONGEST :]}" for text in full],
    ]
    if key == CUTS:
        shorter.insert(0, [_num_stages(value) for value in values])
    return next((texts for texts in shorter if len(set(texts)) == len(set(full))), full)


def _num_stages(cuts: object) -> str:
    if not isinstance(cuts, list | tuple):
        return value_text(cuts)
    return f"{len(cuts) + 1} stages" if cuts else "1 stage"


def labels(comparison: Comparison, *, room: int) -> tuple[list[str], list[list[str]]]:
    """Return a header and a row per run that tell the runs apart within about `room` characters.

    They are the values of the first keys that differ; the runs' names follow where those are alike.
    """
    header: list[str] = []
    columns: list[list[str]] = []
    short = short_keys(comparison.differing)
    for key, values in comparison.differing.items():
        column = short_texts(key, values)
        width = max(len(short[key]), *map(len, column)) + 2
        if columns and width > room:
            continue
        header.append(short[key])
        columns.append(column)
        room -= width
    left_out = len(comparison.differing) - len(columns)
    if len(set(zip(*columns, strict=True))) < len(comparison.runs):
        header.append("run")
        columns.append(short_texts("run", [run.name for run in comparison.runs]))
    if left_out:
        header.append(f"(and {left_out} more)")
        columns.append([""] * len(comparison.runs))
    return header, [list(row) for row in zip(*columns, strict=True)]


def short_keys(keys: Iterable[str], *, taken: Iterable[str] = ()) -> dict[str, str]:
    """Return a short name for each key: "method" of "method.name", "lr" of "optimizer.lr".

    Keys that would have the same one, or one that is taken, keep their section.
    """
    short = {key: _short_key(key) for key in keys}
    count = Counter([*short.values(), *taken])
    return {key: name if count[name] == 1 else key for key, name in short.items()}


def _short_key(key: str) -> str:
    section, _, name = key.rpartition(".")
    return section if name == "name" else name


def _compared_keys(keys: Mapping[str, Any] | None, *, all_keys: bool) -> dict[str, Any] | None:
    if keys is None:
        return None
    found = {_RENAMED.get(key, key): value for key, value in keys.items()}
    stages = found.get("partition.stages")
    if not found.get(CUTS) and stages not in (None, 1):
        found[CUTS] = stages  # the run ended before they were chosen
    if all_keys:
        return found
    return {
        key: value for key, value in found.items() if key not in _RULES and not key.startswith(_ELSEWHERE)
    }


def _identity(value: object) -> str:
    return json.dumps(_plain(value), sort_keys=True, default=str)


def _plain(value: object) -> object:
    """Return a value in which 1.0 is 1."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _named_apart(runs: Sequence[RunRecord]) -> tuple[RunRecord, ...]:
    """Name runs by their folder, those in folders of one name by as much of the path as tells them apart."""
    paths = [run.path.resolve().parts for run in runs]
    names = []
    for path in paths:
        same = [other for other in paths if other != path and other[-1] == path[-1]]
        length = 1
        while any(other[-length:] == path[-length:] for other in same):
            length += 1
        names.append("/".join(path[-length:]))
    return tuple(replace(run, name=name) for run, name in zip(runs, names, strict=True))
