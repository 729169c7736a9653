"""Tables for people on a terminal, plain lines with tabs anywhere else."""

import sys
from collections.abc import Sequence

from petractl.cli.report import write_out

_GAP = 2
_MIN_LAST_WIDTH = 40


def write_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table to stdout; off a terminal one unwrapped line per row, its cells parted by tabs."""
    if sys.stdout.isatty():
        _write_aligned(header, rows)
    else:
        write_out("\n".join("\t".join(row) for row in [header, *rows]))


def _write_aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Draw the table; where the last column would be squeezed, it gets lines of its own below each row."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    taken = sum(widths[:-1]) + _GAP * (len(header) - 1)
    is_stacked = taken + min(widths[-1], _MIN_LAST_WIDTH) > console.width
    if not is_stacked:
        table = Table(box=None, padding=(0, _GAP, 0, 0), header_style="bold")
        for index, column in enumerate(header):
            table.add_column(column, no_wrap=index < len(header) - 1)
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        return
    console.print(Text(_aligned(header[:-1], widths), style="bold"), soft_wrap=True)
    for row in rows:
        console.print(Text(_aligned(row[:-1], widths)), soft_wrap=True)
        console.print(Padding(Text(row[-1], style="dim"), (0, 0, 0, 2 * _GAP)))


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    return (" " * _GAP).join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)).rstrip()
