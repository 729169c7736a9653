"""Curves of several runs over each other: a metric by epoch, and by the time that the run had taken.

The legend is a table of what differs between the runs, below the curves, where many of them have room. Runs
that differ in their seed alone share colour and line style and have markers of their own, so that a sweep
with seeds falls into groups; otherwise each run has another colour, marker and line style.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petractl.tracking.comparison import Comparison, labels, value_text
from petractl.tracking.comparison_run import METRICS, Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#8C6D31", "#7F3C8D")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)))
_SEED = "run.seed"
_MARKERS_UP_TO, _MARKERS_IF_CROWDED = 20, 8  # per curve; of more epochs, some have a marker
_LOG_RANGE = 20.0  # a loss that spans more than this factor is drawn on a logarithmic axis
_CHARACTERS = 118  # of a legend as wide as the figure
_LEGEND_UP_TO = 12  # runs in one column of the legend
_INCHES_PER_ENTRY = 0.19
_TIME_UNITS = ((7200.0, 3600.0, "h"), (180.0, 60.0, "min"), (0.0, 1.0, "s"))  # from, seconds, name


@dataclass(frozen=True, slots=True)
class _Line:
    """A run's curve, its style, and its row of the legend."""

    curve: Curve
    style: dict[str, Any]
    label: str


def drawable(comparison: Comparison, *, metric: str) -> tuple[int, ...]:
    """Return which runs have a value of the metric that can be drawn."""
    curves = [run.curves[metric] for run in comparison.runs]
    return tuple(n for n, curve in enumerate(curves) if any(map(math.isfinite, curve.values)))


def plot_comparison(comparison: Comparison, path: Path, *, metric: str) -> None:
    """Draw the curves of the runs that have the metric, at least one, to a PNG file."""
    _figure(comparison, metric=metric).savefig(path, dpi=100)


def _figure(comparison: Comparison, *, metric: str) -> "Figure":
    # No pyplot, as for the curves of one run: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    header, lines = _lines(comparison, metric=metric)
    assert lines
    columns = _legend_columns(lines)
    rows = math.ceil(len(lines) / columns) + 1
    figure = Figure(figsize=(12, 5.6 + _INCHES_PER_ENTRY * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)  # type: ignore[union-attr,call-arg]
    figure.suptitle(_title(comparison, metric=metric), fontsize=15, fontweight="bold", parse_math=False)
    by_epoch, by_time = figure.subplots(1, 2, sharey=True)
    _draw_by_epoch(by_epoch, lines)
    _draw_by_time(by_time, lines)
    _scale(by_epoch, lines, metric=metric)
    _draw_legend(figure, lines, header=header, columns=columns)
    return figure


def _lines(comparison: Comparison, *, metric: str) -> tuple[str, list[_Line]]:
    """Return the legend's header and the lines of the runs that can be drawn."""
    cells, rows = labels(comparison, room=_CHARACTERS)
    styles = _styles(comparison)
    shown = drawable(comparison, metric=metric)
    curves = [comparison.runs[n].curves[metric] for n in shown]
    ends = [_four_digits(curve.values[-1]) for curve in curves]
    texts = _aligned([[*cells, "last"], *([*rows[n], end] for n, end in zip(shown, ends, strict=True))])
    lines = zip(curves, shown, texts[1:], strict=True)
    return texts[0], [_Line(curve, styles[n], text) for curve, n, text in lines]


def _four_digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def _styles(comparison: Comparison) -> list[dict[str, Any]]:
    """Return each run's style; the seeds of one setting differ in the marker alone."""
    groups = _settings(comparison)
    is_crowded = len(groups) > _LEGEND_UP_TO
    styles, seen = [], Counter[int]()
    for group in groups:
        marker = seen[group] if groups.count(group) > 1 else group
        seen[group] += 1
        styles.append(
            {
                "color": _COLOURS[group % len(_COLOURS)],
                "linestyle": _LINES[group % len(_LINES)],
                "marker": _MARKERS[marker % len(_MARKERS)],
                "linewidth": 1.3 if is_crowded else 1.8,
                "markersize": 5.0 if is_crowded else 6.0,
            }
        )
    return styles


def _settings(comparison: Comparison) -> list[int]:
    """Return a number for each run, the same for those that differ in the seed alone."""
    runs = list(range(len(comparison.runs)))
    if _SEED not in comparison.differing:
        return runs
    others = [map(value_text, values) for key, values in comparison.differing.items() if key != _SEED]
    settings = list(zip(*others, strict=True)) if others else [() for _ in runs]
    numbers = {setting: n for n, setting in enumerate(dict.fromkeys(settings))}
    return [numbers[setting] for setting in settings]


def _title(comparison: Comparison, *, metric: str) -> str:
    words = METRICS[metric].title
    model, data = (comparison.equal.get(f"{section}.name") for section in ("model", "data"))
    words += f", {value_text(model)}" if model else ""
    return words + (f" on {value_text(data)}" if data else "")


def _draw_by_epoch(axes: "Axes", lines: Sequence[_Line]) -> None:
    from matplotlib.ticker import MaxNLocator

    _frame(axes, label="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for n, line in enumerate(lines):
        axes.plot(line.curve.epochs, line.curve.values, **line.style, markevery=_marked(lines, n))
    epochs = [epoch for line in lines for epoch in line.curve.epochs]
    margin = max(0.5, 0.03 * (max(epochs) - min(epochs)))
    axes.set_xlim(min(epochs) - margin, max(epochs) + margin)


def _draw_by_time(axes: "Axes", lines: Sequence[_Line]) -> None:
    longest = max(line.curve.seconds[-1] for line in lines)
    seconds, unit = next((size, name) for least, size, name in _TIME_UNITS if longest >= least)
    _frame(axes, label=f"time that the run had taken, {unit}")
    for n, line in enumerate(lines):
        times = [time / seconds for time in line.curve.seconds]
        axes.plot(times, line.curve.values, **line.style, markevery=_marked(lines, n))
    axes.set_xlim(left=0)


def _marked(lines: Sequence[_Line], n: int) -> list[int]:
    """Return the points of a run that have a marker: the last, and of many some, other ones in each run."""
    points = len(lines[n].curve.epochs)
    step = math.ceil(points / (_MARKERS_UP_TO if len(lines) <= _LEGEND_UP_TO else _MARKERS_IF_CROWDED))
    return sorted({*range(n % step, points, step), points - 1})


def _frame(axes: "Axes", *, label: str) -> None:
    axes.set_xlabel(label, fontsize=12)
    axes.tick_params(labelsize=11, labelleft=True)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _scale(axes: "Axes", lines: Sequence[_Line], *, metric: str) -> None:
    """Set the scale of the values, which both panels share."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_ylabel(METRICS[metric].unit, fontsize=12)
    values = [value for line in lines for value in line.curve.values if math.isfinite(value)]
    if metric.endswith("loss") and 0 < min(values) * _LOG_RANGE < max(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif metric in ("images_per_s", "seconds"):
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:,g}")
    elif METRICS[metric].unit.startswith("percent") and max(values) > 99.0:
        axes.set_ylim(top=101.0)


def _legend_columns(lines: Sequence[_Line]) -> int:
    """Return how many columns the legend has: one, or as many as there is room for where runs are many."""
    width = max(len(line.label) for line in lines) + 10  # and the line itself
    return max(1, min(_CHARACTERS // width, math.ceil(len(lines) / _LEGEND_UP_TO)))


def _draw_legend(figure: "Figure", lines: Sequence[_Line], *, header: str, columns: int) -> None:
    """Draw the legend below the panels, every column of it under a header of its own."""
    from matplotlib.lines import Line2D

    rows = math.ceil(len(lines) / columns)
    handles = []
    for start in range(0, len(lines), rows):
        entries = [
            Line2D([], [], **line.style, label=_told(line.label)) for line in lines[start : start + rows]
        ]
        blanks = [_blank("")] * (rows - len(entries) if start else 0)
        handles += [_blank(header), *entries, *blanks]
    legend = figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=math.ceil(len(lines) / rows),
        frameon=False,
        prop={"family": "monospace", "size": 10},
        handlelength=3.6,
        labelspacing=0.3,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a value may hold a dollar


def _blank(label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none", label=_told(label))


def _told(label: str) -> str:
    # matplotlib leaves out what starts with an underscore.
    return f" {label}" if label.startswith("_") else label
