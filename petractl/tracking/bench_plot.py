"""The bar chart of a comparison: images per second of each variant, and the memory that it took.

A bar ends at the median; a line spans the slowest and the fastest repeat, and a dot is one repeat, so that a
difference can be weighed against the noise. The first variant, to which the others are compared, has a colour
of its own and a vertical line.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FIRST = "#D55E00"  # Okabe and Ito's vermilion and blue, and a green for memory
_OTHERS = "#0072B2"
_MEMORY = "#009E73"
_GREY = "#555555"
_DOTS: dict[str, Any] = {"markersize": 4.5, "color": "white", "markeredgecolor": "black", "zorder": 5}
_ROOM_FOR_LABELS = 1.32  # of the longest bar
_INCHES_PER_BAR = 0.62


@dataclass(frozen=True, slots=True)
class Bar:
    """One variant: images/s of every repeat, ratio to the first, peak memory in bytes of every process."""

    label: str
    images_per_s: tuple[float, ...]
    ratio: float
    peak_memory_bytes: tuple[int, ...]


def plot_bench(bars: Sequence[Bar], path: Path, *, title: str, subtitle: str = "") -> None:
    """Draw the comparison to a PNG file."""
    assert bars
    _figure(bars, title=title, subtitle=subtitle).savefig(path, dpi=100)


def _figure(bars: Sequence[Bar], *, title: str, subtitle: str) -> "Figure":
    # No pyplot, as for the curves: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.0 + _INCHES_PER_BAR * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)  # type: ignore[union-attr,call-arg]
    figure.suptitle(title, fontsize=15, fontweight="bold")
    grid = figure.add_gridspec(1, 2, width_ratios=(3, 2))
    speed = figure.add_subplot(grid[0])
    _draw_speed(speed, bars)
    _draw_memory(figure.add_subplot(grid[1], sharey=speed), bars)
    if subtitle:
        figure.supxlabel(subtitle, fontsize=10.5, color=_GREY)
    return figure


def _draw_speed(axes: "Axes", bars: Sequence[Bar]) -> None:
    repeats = len(bars[0].images_per_s)
    _frame(axes, title="Images per second" + (f" (median, and all {repeats} repeats)" if repeats > 1 else ""))
    medians = [statistics.median(bar.images_per_s) for bar in bars]
    places = range(len(bars))
    colors = [_FIRST if place == 0 else _OTHERS for place in places]
    axes.barh(places, medians, height=0.62, color=colors, zorder=2)
    axes.axvline(medians[0], color=_FIRST, linewidth=1.2, linestyle="--", zorder=3)
    for place, bar in enumerate(bars):
        ends = (min(bar.images_per_s), max(bar.images_per_s))
        axes.plot(ends, (place, place), color="black", linewidth=1.6, zorder=4)
        axes.plot(bar.images_per_s, [place] * repeats, linestyle="none", marker="o", **_DOTS)
        ratio = "" if place == 0 else f"  ({bar.ratio:.2f}x)"
        _label(axes, max(ends), place, f"{medians[place]:,.{_digits(medians[place])}f}{ratio}")
    axes.set_yticks(places, [bar.label for bar in bars])
    axes.tick_params(axis="y", length=0, labelsize=12)
    axes.invert_yaxis()
    axes.set_xlim(0, _ROOM_FOR_LABELS * max(max(bar.images_per_s) for bar in bars))


def _draw_memory(axes: "Axes", bars: Sequence[Bar]) -> None:
    several = any(len(bar.peak_memory_bytes) > 1 for bar in bars)
    unit, name = _unit(max(max(bar.peak_memory_bytes) for bar in bars))
    _frame(axes, title=f"Peak memory, {name}" + (" (largest process, and all)" if several else ""))
    largest = [max(bar.peak_memory_bytes) / unit for bar in bars]
    axes.barh(range(len(bars)), largest, height=0.62, color=_MEMORY, zorder=2)
    for place, bar in enumerate(bars):
        if several:
            held = [value / unit for value in bar.peak_memory_bytes]
            axes.plot(held, [place] * len(held), linestyle="none", marker="o", **_DOTS)
        _label(axes, largest[place], place, f"{largest[place]:,.{_digits(largest[place])}f}")
    axes.tick_params(axis="y", length=0, labelleft=False)
    axes.set_xlim(0, _ROOM_FOR_LABELS * max(*largest, 1e-9))


def _unit(largest: int) -> tuple[int, str]:
    return (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")


def _digits(value: float) -> int:
    return 0 if value >= 100 else 1 if value >= 10 else 2


def _label(axes: "Axes", x: float, place: int, text: str) -> None:
    axes.annotate(text, (x, place), xytext=(7, 0), textcoords="offset points", va="center", fontsize=11)


def _frame(axes: "Axes", *, title: str) -> None:
    axes.set_title(title, fontsize=12, loc="left")
    axes.tick_params(labelsize=11)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
