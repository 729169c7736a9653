"""The plot of a sweep: throughput against the number of stages, one curve for each schedule.

Both axes are logarithmic, so that a pipeline whose speed does not depend on its depth is level and plain
model parallelism falls with a slope of one. Curves differ in marker and line, and each is named at its end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#8C6D31", "#7F3C8D")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)))
_GREY = "#555555"
_APART = 0.045  # of the height, from one label to the next


@dataclass(frozen=True, slots=True)
class Curve:
    """Throughput of one schedule at several numbers of stages."""

    label: str
    stages: tuple[int, ...]
    per_s: tuple[float, ...]


def plot_throughput(
    curves: Sequence[Curve], path: Path, *, title: str, unit: str = "microbatches/s", subtitle: str = ""
) -> None:
    """Draw the sweep to a PNG file."""
    assert curves
    _figure(curves, title=title, unit=unit, subtitle=subtitle).savefig(path, dpi=100)


def _figure(curves: Sequence[Curve], *, title: str, unit: str, subtitle: str) -> "Figure":
    # No pyplot, as for the curves of a run: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=15, fontweight="bold")
    axes = figure.add_subplot()
    for n, curve in enumerate(curves):
        axes.plot(
            curve.stages,
            curve.per_s,
            color=_COLOURS[n % len(_COLOURS)],
            marker=_MARKERS[n % len(_MARKERS)],
            linestyle=_LINES[n % len(_LINES)],
            linewidth=1.8,
            markersize=6.5,
            zorder=3,
        )
    _frame(axes, curves, unit=unit)
    _name_ends(axes, curves)
    if subtitle:
        figure.supxlabel(subtitle, fontsize=10.5, color=_GREY)
    return figure


def _frame(axes: "Axes", curves: Sequence[Curve], *, unit: str) -> None:
    from matplotlib.ticker import NullLocator

    places = sorted({stages for curve in curves for stages in curve.stages})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.set_xlabel("stages", fontsize=12)
    axes.set_ylabel(unit, fontsize=12)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.tick_params(labelsize=11)
    axes.grid(color="#DDDDDD", linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _name_ends(axes: "Axes", curves: Sequence[Curve]) -> None:
    """Write each curve's name beside its end, the names pushed apart where ends are close."""
    axes.figure.canvas.draw()
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [float(to_axes.transform((curve.stages[-1], curve.per_s[-1]))[1]) for curve in curves]
    heights = list(ends)
    order = sorted(range(len(curves)), key=lambda n: (-ends[n], n))
    for above, below in pairwise(order):
        heights[below] = min(heights[below], heights[above] - _APART)
    for n, curve in enumerate(curves):
        axes.annotate(
            f"{curve.label}  {curve.per_s[-1]:,.3g}",
            xy=(1.0, ends[n]),
            xycoords="axes fraction",
            xytext=(1.02, heights[n]),
            textcoords="axes fraction",
            va="center",
            fontsize=11.5,
            color=_COLOURS[n % len(_COLOURS)],
        )
