"""The table of `petractl compare`, and its JSON.

What all runs have alike is told in a line below the table. On a terminal, up to four runs that have room are
columns and each quantity is a line; more are lines themselves, and columns without room are left out, which
is said. Anywhere else every run is a line, with all columns.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING

from petractl.cli.columns import figure, fit_columns
from petractl.cli.report import write_out
from petractl.cli.table import write_table
from petractl.tracking.report import duration, many, size

if TYPE_CHECKING:
    from petractl.tracking.comparison import Comparison
    from petractl.tracking.comparison_run import RunRecord

NOT_KNOWN = "N/A"

_SIDE_BY_SIDE = 4  # runs
_ALWAYS_TOLD = ("model.name", "data.name", "method.name")
_LIKE_STATE = ("epochs", "state")  # left out where all runs have the same
_MEASURED = ("run", "time", "loss", "epochs", "memory", "state")  # names that a key's short one must not be
_SPARE = ("best epoch", "top-5", "time", "last top-1", "loss", "epochs", "memory", "images/s")

Columns = Mapping[str, Sequence[str]]
"""The cells of each column, one per run."""


def write_comparison(comparison: "Comparison", *, all_keys: bool) -> None:
    """Write the table to stdout, and what is equal below it."""
    from petractl.tracking.comparison import short_texts, value_text

    measured = _measured(comparison.runs)
    alike = [name for name, cells in measured.items() if _is_left_out(name, cells)]
    names = [run.name for run in comparison.runs]
    shown = short_texts("run", names) if sys.stdout.isatty() else list(map(value_text, names))
    _write_columns({"run": shown}, _keys(comparison), {n: c for n, c in measured.items() if n not in alike})
    _write_equal(comparison, [f"{name} {measured[name][0]}" for name in alike], all_keys=all_keys)


def as_document(comparison: "Comparison", *, metric: str) -> str:
    """Return the comparison as one JSON object, with the curve of one metric of every run."""
    from petractl.tracking.comparison import masked
    from petractl.tracking.journal import encode_record

    runs = []
    for n, run in enumerate(comparison.runs):
        told = asdict(run)
        told["path"] = str(run.path)
        told["keys"] = {key: values[n] for key, values in comparison.differing.items()}
        told["curve"] = told.pop("curves")[metric]
        runs.append(told)
    document = {"metric": metric, "runs": runs, "equal": dict(comparison.equal)}
    return encode_record(masked(document))


def _keys(comparison: "Comparison") -> Columns:
    """Return the keys that differ: on a terminal in few characters."""
    from petractl.tracking.comparison import short_keys, short_texts, value_text

    if not sys.stdout.isatty():
        return {key: list(map(value_text, values)) for key, values in comparison.differing.items()}
    short = short_keys(comparison.differing, taken=_MEASURED)
    return {short[key]: short_texts(key, values) for key, values in comparison.differing.items()}


def _measured(runs: "Sequence[RunRecord]") -> Columns:
    cells: Mapping[str, Callable[[RunRecord], str]] = {
        "best top-1": lambda run: _percent(run.best_top1),
        "best epoch": lambda run: NOT_KNOWN if run.best_epoch is None else str(run.best_epoch),
        "last top-1": lambda run: _percent(run.last_top1),
        "top-5": lambda run: _percent(run.last_top5),
        "loss": lambda run: _loss(run.last_loss),
        "images/s": lambda run: NOT_KNOWN if run.images_per_s is None else figure(run.images_per_s),
        "memory": lambda run: _memory(run.peak_memory_bytes, run.device_kind),
        "time": lambda run: _time(run.seconds),
        "epochs": lambda run: f"{run.epochs_done}/{'?' if run.epochs is None else run.epochs}",
        "state": lambda run: run.state,
    }
    return {name: [cell(run) for run in runs] for name, cell in cells.items()}


def _is_left_out(name: str, cells: Sequence[str]) -> bool:
    return len(set(cells)) == 1 and (name in _LIKE_STATE or cells[0] == NOT_KNOWN)


def _percent(percent: float | None) -> str:
    return NOT_KNOWN if percent is None else f"{percent:.2f} %" if isfinite(percent) else str(percent)


def _loss(loss: float | None) -> str:
    return NOT_KNOWN if loss is None else f"{loss:.4f}" if abs(loss) < 1e4 else f"{loss:.4g}"


def _memory(num_bytes: int | None, kind: str | None) -> str:
    return NOT_KNOWN if num_bytes is None else f"{size(num_bytes)} ({kind or '?'})"


def _time(seconds: float | None) -> str:
    return NOT_KNOWN if seconds is None else duration(seconds)


def _write_columns(names: Columns, keys: Columns, measured: Columns) -> None:
    """Write one table if it has room, else the keys and what was measured one below the other."""
    header, rows = _lines({**names, **keys, **measured})
    if not sys.stdout.isatty():
        write_table(header, rows)
        return
    turned = [list(line) for line in zip(header, *rows, strict=True)]
    if len(rows) <= _SIDE_BY_SIDE and _has_room(turned[0], turned[1:]):
        write_table(turned[0], turned[1:])
    elif _has_room(header, rows):
        write_table(header, rows)
    else:
        left_out = _write_fitting({**names, **keys}, spare=list(reversed(list(keys)))) if keys else ()
        write_out("\n" if keys else "")
        left_out += _write_fitting({**names, **measured}, spare=_SPARE)
        if left_out:
            sys.stderr.write(f"not shown for want of room: {', '.join(left_out)} (--json has all)\n")


def _write_fitting(columns: Columns, *, spare: Sequence[str]) -> tuple[str, ...]:
    """Write the columns that have room; return those that have not."""
    header, rows, left_out = fit_columns(*_lines(columns), spare=spare)
    write_table(header, rows)
    return left_out


def _lines(columns: Columns) -> tuple[list[str], list[list[str]]]:
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _has_room(header: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    # Whether one column would have to go tells whether all of them have room.
    return not fit_columns(header, rows, spare=header[-1:])[2]


def _write_equal(comparison: "Comparison", told: Sequence[str], *, all_keys: bool) -> None:
    """Write what all runs have alike, but for defaults that say little; with `all_keys` those too."""
    from petractl.tracking.comparison import short_texts, value_text

    silent = () if all_keys else set(comparison.at_default) - set(_ALWAYS_TOLD)
    shown = {key: value for key, value in comparison.equal.items() if key not in silent}
    is_short = sys.stdout.isatty() and not all_keys
    keys = (
        f"{key} = {short_texts(key, [value])[0] if is_short else value_text(value)}"
        for key, value in shown.items()
    )
    parts = [*told, *keys]
    if silent:
        parts.append(many(len(silent), "key") + " at the default")
    # A run whose keys are not known has no say in what is equal.
    known = "" if all(run.keys for run in comparison.runs) else " where known"
    if parts:
        write_out(f"equal{known}: {', '.join(parts)}")
