"""The picture of a sweep: a heat-map of two keys, bars for anything else; test top-1 in both.

Every cell of the heat-map has its number in it, every bar beside it: nothing is told by colour alone. What is
not there is hatched and says why. The line on a bar is the standard deviation over seeds, the dots are seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petractl.sweep.grid import Axis, Grid
from petractl.sweep.names import short_keys
from petractl.sweep.table import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BAR = "#0072B2"  # Okabe and Ito's blue, and vermilion for cells of their own
_EXTRA = "#D55E00"
_GREY = "#555555"
_NOTHING = "#EEEEEE"
_MAP = "viridis"  # of even lightness, for every kind of sight
_DARK_BELOW = 0.45  # of the map: white letters
_INCHES_PER_BAR = 0.5
_ROOM_FOR_LABELS = 1.3  # of the longest bar
_DOTS: dict[str, Any] = {"markersize": 4.5, "color": "white", "markeredgecolor": "black", "zorder": 5}


@dataclass(frozen=True, slots=True)
class _Scale:
    """The least and the greatest value in the picture."""

    least: float
    greatest: float

    def share(self, value: float) -> float:
        """Return where a value lies between them."""
        return (value - self.least) / (self.greatest - self.least)


def plot_sweep(rows: Sequence[Row], grid: Grid, path: Path, *, title: str, subtitle: str = "") -> None:
    """Draw the rows, in the grid's order, to a PNG file, which is replaced in one step."""
    product = [row for row in rows if not row.is_extra]
    is_map = len(grid.axes) == 2 and len(product) == len(grid.axes[0].choices) * len(grid.axes[1].choices)
    draw = _map_figure if is_map else _bar_figure
    temporary = path.with_name(f".{path.name}")
    draw(rows, grid, title=title, subtitle=subtitle).savefig(temporary, dpi=100, format="png")
    temporary.replace(path)


def _figure(width: float, height: float, *, title: str, subtitle: str) -> "Figure":
    # No pyplot, as for the curves: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)  # type: ignore[union-attr,call-arg]
    figure.suptitle(title, fontsize=15, fontweight="bold")
    if subtitle:
        figure.supxlabel(subtitle, fontsize=10.5, color=_GREY)
    return figure


def _map_figure(rows: Sequence[Row], grid: Grid, *, title: str, subtitle: str) -> "Figure":
    lines, columns = grid.axes
    product = [row for row in rows if not row.is_extra]
    extra = [row for row in rows if row.is_extra]
    scale = _scale(rows)
    wide = max(len(columns.choices), 2, len(extra))
    longest = max(len(line) for label in _labels(lines) for line in label.split("\n"))
    height = 2.2 + 0.75 * len(lines.choices) + (1.6 if extra else 0.0)
    figure = _figure(3.0 + 1.75 * wide + 0.09 * longest, height, title=title, subtitle=subtitle)
    parts = figure.add_gridspec(
        2 if extra else 1, 1, height_ratios=(len(lines.choices), 1)[: 1 + bool(extra)]
    )
    axes = figure.add_subplot(parts[0])
    width = len(columns.choices)
    table = [product[n * width : (n + 1) * width] for n in range(len(lines.choices))]
    _draw_map(axes, table, scale, across=_labels(columns), down=_labels(lines))
    short = short_keys(grid.keys)
    axes.set_xlabel(" + ".join(short[key] for key in columns.keys), fontsize=12)
    axes.set_ylabel(" + ".join(short[key] for key in lines.keys), fontsize=12)
    axes.set_title("Test top-1 after the last epoch, % (± over seeds)", fontsize=12, loc="left")
    if extra:
        _draw_map(figure.add_subplot(parts[1]), [extra], scale, across=_words(extra), down=["besides"])
    return figure


def _draw_map(
    axes: "Axes", table: Sequence[Sequence[Row]], scale: _Scale, *, across: Sequence[str], down: Sequence[str]
) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    for y, line in enumerate(table):
        for x, row in enumerate(line):
            mean = row.mean("top1")
            share = 0.0 if mean is None else scale.share(mean)
            face = _NOTHING if mean is None else colormaps[_MAP](share)
            hatch = "///" if mean is None else None
            box = Rectangle(
                (x - 0.5, y - 0.5), 1, 1, facecolor=face, hatch=hatch, edgecolor="white", linewidth=2
            )
            axes.add_patch(box)
            letters = "black" if mean is None or share > _DARK_BELOW else "white"
            axes.text(x, y, _in_cell(row), ha="center", va="center", fontsize=12, color=letters)
    axes.set_xlim(-0.5, max(map(len, table)) - 0.5)
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set_xticks(range(len(across)), across, fontsize=11)
    axes.set_yticks(range(len(down)), down, fontsize=11)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _in_cell(row: Row) -> str:
    mean, deviation = row.mean("top1"), row.std("top1")
    if mean is None:
        return "not allowed" if row.why else _in_a_word(row)
    return f"{mean:.2f}" + ("" if deviation is None else f"\n± {deviation:.2f}")


def _in_a_word(row: Row) -> str:
    """Return why a row has no number yet."""
    states = [run.state for run in row.runs]
    return next((word for word in ("failed", "running", "interrupted") if word in states), "not yet")


def _bar_figure(rows: Sequence[Row], grid: Grid, *, title: str, subtitle: str) -> "Figure":
    places, labels = _bar_places(rows, grid)
    height = 2.0 + _INCHES_PER_BAR * (max(places, default=0) + 1)
    figure = _figure(8.0 + 0.085 * max(map(len, labels), default=0), height, title=title, subtitle=subtitle)
    axes = figure.add_subplot()
    scale = _scale(rows)
    margin = 0.5 * (scale.greatest - scale.least)
    left = max(0.0, scale.least - margin) if scale.least > 0.4 * scale.greatest else 0.0
    for place, row in zip(places, rows, strict=True):
        _draw_bar(axes, place, row, left=left, width=scale.greatest - left)
    axes.set_yticks(places, labels, fontsize=11)
    axes.invert_yaxis()
    end = max([scale.greatest, *(value for row in rows for value in row.numbers("top1"))])
    axes.set_xlim(left, left + _ROOM_FOR_LABELS * (end - left))
    note = "" if left == 0.0 else "; the axis begins above 0"
    axes.set_title(f"Test top-1 after the last epoch, % (line: ± over seeds{note})", fontsize=12, loc="left")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _draw_bar(axes: "Axes", place: float, row: Row, *, left: float, width: float) -> None:
    mean, deviation, seeds = row.mean("top1"), row.std("top1"), row.numbers("top1")
    if mean is None:
        axes.text(left + 0.01 * width, place, f"({_in_cell(row)})", va="center", fontsize=11, color=_GREY)
        return
    color, hatch = (_EXTRA, "//") if row.is_extra else (_BAR, None)
    edge = "white" if row.is_extra else color
    axes.barh(place, mean - left, left=left, height=0.68, color=color, hatch=hatch, edgecolor=edge, zorder=2)
    if deviation is not None:
        axes.errorbar(mean, place, xerr=deviation, color="black", capsize=4, linewidth=1.6, zorder=4)
        axes.plot(seeds, [place] * len(seeds), linestyle="none", marker="o", **_DOTS)
    text = f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")
    end = max(mean + (deviation or 0.0), *seeds)
    axes.annotate(text, (end, place), xytext=(8, 0), textcoords="offset points", va="center", fontsize=11)


def _bar_places(rows: Sequence[Row], grid: Grid) -> tuple[list[float], list[str]]:
    """Return where each bar stands and its label: a gap where the first of several keys changes."""
    places: list[float] = []
    first_of: list[str] = []
    for row in rows:
        group = "besides" if row.is_extra else ""
        if len(grid.axes) > 1 and not row.is_extra:
            group = "+".join(row.values.get(key, "") for key in grid.axes[0].keys)
        gap = 0.6 if first_of and first_of[-1] != group else 0.0
        places.append(0.0 if not places else places[-1] + 1.0 + gap)
        first_of.append(group)
    return places, _words(rows)


def _labels(axis: Axis) -> list[str]:
    return ["\n".join(_text(each.value, each.text) for each in choice) for choice in axis.choices]


def _words(rows: Sequence[Row]) -> list[str]:
    return [row.name.replace(",", ", ") for row in rows]


def _text(value: object, text: str) -> str:
    return value if isinstance(value, str) else text


def _scale(rows: Sequence[Row]) -> _Scale:
    means = [mean for row in rows if (mean := row.mean("top1")) is not None and math.isfinite(mean)]
    if not means:
        return _Scale(0.0, 1.0)
    least, greatest = min(means), max(means)
    return _Scale(least, greatest) if greatest - least > 1e-9 else _Scale(least - 1.0, greatest + 1e-9)
