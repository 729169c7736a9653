"""Tables that fit on narrow terminals: the columns that matter least are left out, and it is said."""

import sys
from collections.abc import Sequence

_GAP = 2


def fit_columns(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, spare: Sequence[str], last_below: bool = False
) -> tuple[list[str], list[list[str]], tuple[str, ...]]:
    """Leave out columns of `spare`, in that order, until a row fits on the terminal; return which.

    Off a terminal nothing is left out. With `last_below` the last column has lines of its own there.
    """
    kept, left_out = list(range(len(header))), []
    width = _terminal_width()
    for name in spare:
        if width is None or _needed(header, rows, kept, last_below=last_below) <= width:
            break
        if name in header:
            kept.remove(header.index(name))
            left_out.append(name)
    return [header[n] for n in kept], [[row[n] for n in kept] for row in rows], tuple(left_out)


def _needed(
    header: Sequence[str], rows: Sequence[Sequence[str]], kept: Sequence[int], *, last_below: bool
) -> int:
    shown = kept[:-1] if last_below else kept
    # The gap after the last column is drawn too.
    return sum(max(len(row[n]) for row in [header, *rows]) + _GAP for n in shown)


def figure(value: float) -> str:
    """Return a number with four digits, never as a power of ten above 1."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.4g}"


def _terminal_width() -> int | None:
    if not sys.stdout.isatty():
        return None
    from rich.console import Console

    return Console().width
