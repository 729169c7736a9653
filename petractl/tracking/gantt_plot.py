"""The Gantt chart of one or more timelines: what every stage does when, simulated or measured.

Stages are rows, the first on top, operations boxes in their colour and hatching, so that the chart reads in
grey too; what is not covered is idle. Boxes that are wide enough carry their microbatch. Of more than 16 rows
16 are drawn, evenly spread, the first and the last among them, and the title says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from petractl.planning.times import Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ROWS = 16


@dataclass(frozen=True, slots=True)
class _Look:
    """How an operation is drawn."""

    name: str
    colour: str
    hatch: str
    ink: str


# Okabe and Ito's colours; the hatching tells them apart without.
_LOOKS = {
    "F": _Look("forward", "#56B4E9", "", "black"),
    "B": _Look("backward", "#E69F00", "///", "black"),
    "FB": _Look("forward and backward", "#009E73", "...", "black"),
    "W": _Look("weight gradient", "#CC79A7", "\\\\\\", "black"),
    "U": _Look("update", "#222222", "", "white"),
}
_WIDTH_IN, _ROW_IN, _PANEL_IN, _HEAD_IN = 15.0, 0.36, 0.95, 1.0
_AXES_PART = 0.88  # of the width
_MIN_BOX_PT, _DIGIT_PT, _MIN_EDGED_PT = 11.0, 6.5, 4.0


@dataclass(frozen=True, slots=True)
class Timeline:
    """The operations of one pipeline (one replica), under a title."""

    title: str
    spans: Sequence[Span]


def plot_gantt(timelines: Sequence[Timeline], path: Path, *, title: str, subtitle: str = "") -> None:
    """Draw timelines one below the other, on one scale of time, to a PNG file."""
    assert timelines
    _figure(timelines, title=title, subtitle=subtitle).savefig(path, dpi=100)


def _figure(timelines: Sequence[Timeline], *, title: str, subtitle: str) -> "Figure":
    # No pyplot, as for the curves: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [shown_rows(timeline.spans) for timeline in timelines]
    heights = [len(own) * _ROW_IN + _PANEL_IN for own in rows]
    figure = Figure(figsize=(_WIDTH_IN, sum(heights) + _HEAD_IN), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n{subtitle}" if subtitle else title, fontsize=14)
    start = min(span.start_s for timeline in timelines for span in timeline.spans)
    end = max(span.end_s for timeline in timelines for span in timeline.spans)
    unit, name = _unit(end - start)
    panels = figure.subplots(len(timelines), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, timeline, own in zip(panels, timelines, rows, strict=True):
        _draw(axes, timeline, own, start_s=start, unit=unit, points_per_unit=_points(end - start) * unit)
        axes.set_xlim(0, (end - start) / unit)
    panels[-1].set_xlabel(f"time, {name}", fontsize=12)
    _legend(
        figure, {span.kind for timeline in timelines for span in timeline.spans if span.end_s > span.start_s}
    )
    return figure


def shown_rows(spans: Sequence[Span]) -> list[int]:
    """Return the rows that are drawn: all of them, or an even sample with both ends."""
    rows = sorted({span.row for span in spans})
    if len(rows) <= MAX_ROWS:
        return rows
    last = len(rows) - 1
    return [rows[round(n * last / (MAX_ROWS - 1))] for n in range(MAX_ROWS)]


def _points(seconds: float) -> float:
    """Return the points of paper per second."""
    return _WIDTH_IN * _AXES_PART * 72.0 / max(seconds, 1e-12)


def _draw(
    axes: "Axes",
    timeline: Timeline,
    rows: Sequence[int],
    *,
    start_s: float,
    unit: float,
    points_per_unit: float,
) -> None:
    place = {row: n for n, row in enumerate(rows)}
    every = len({span.row for span in timeline.spans})
    sampled = f"   ({len(rows)} of {every} shown)" if every > len(rows) else ""
    axes.set_title(timeline.title + sampled, fontsize=12, loc="left")
    shown = [span for span in timeline.spans if span.row in place and span.end_s > span.start_s]
    least = _MIN_EDGED_PT / points_per_unit
    for kind, look in _LOOKS.items():
        for row in rows:
            boxes = [
                ((span.start_s - start_s) / unit, (span.end_s - span.start_s) / unit)
                for span in shown
                if span.kind == kind and span.row == row
            ]
            _bars(axes, boxes, place[row], look, least=least)
    digits = len(str(max((span.microbatch for span in shown), default=0)))
    least_width = max(_MIN_BOX_PT, _DIGIT_PT * digits) / points_per_unit
    for span in shown:
        _number(axes, span, place[span.row], start_s=start_s, unit=unit, least_width=least_width)
    several = any(span.place is not None for span in timeline.spans)
    axes.set_yticks(range(len(rows)), [str(row) for row in rows])
    axes.set_ylabel("process" if several else "stage", fontsize=11)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0, labelsize=10)
    axes.tick_params(axis="x", labelbottom=True, labelsize=10)
    axes.grid(axis="x", color="#E2E2E2", linewidth=0.7, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _bars(axes: "Axes", boxes: Sequence[tuple[float, float]], y: int, look: _Look, *, least: float) -> None:
    """Draw (start, width) boxes; those narrower than `least` without what would drown them."""
    if boxes and min(width for _, width in boxes) < least:
        boxes = _joined(boxes)
    for is_wide in (True, False):
        axes.broken_barh(
            [box for box in boxes if (box[1] >= least) == is_wide],
            (y - 0.42, 0.84),
            facecolor=look.colour,
            edgecolor="white",
            hatch=look.hatch if is_wide else "",
            linewidth=0.6 if is_wide else 0.0,
            zorder=2,
        )


def _joined(boxes: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return (start, width) of what narrow boxes make where they touch."""
    result: list[tuple[float, float]] = []
    for start, width in boxes:
        if result and start <= sum(result[-1]) + 1e-6 * width:
            begin = result[-1][0]
            result[-1] = (begin, start + width - begin)
        else:
            result.append((start, width))
    return result


def _number(axes: "Axes", span: Span, y: int, *, start_s: float, unit: float, least_width: float) -> None:
    """Write the microbatch into a box that has room for every one of them."""
    width = (span.end_s - span.start_s) / unit
    text = str(span.microbatch)
    look = _LOOKS.get(span.kind)
    if look is None or span.kind == "U" or width < least_width:
        return
    middle = (span.start_s - start_s) / unit + width / 2
    back = {"boxstyle": "square,pad=0.12", "facecolor": look.colour, "edgecolor": "none"}
    axes.text(
        middle,
        y,
        text,
        ha="center",
        va="center",
        fontsize=8.5,
        color=look.ink,
        bbox=back if look.hatch else None,
        zorder=3,
        clip_on=True,
    )


def _legend(figure: "Figure", kinds: set[str]) -> None:
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=look.colour, edgecolor="white", hatch=look.hatch, label=f"{kind}  {look.name}")
        for kind, look in _LOOKS.items()
        if kind in kinds
    ]
    patches.append(Patch(facecolor="white", edgecolor="#BBBBBB", label="idle"))
    figure.legend(
        handles=patches,
        loc="outside lower right",
        ncols=len(patches),
        fontsize=11,
        frameon=False,
        handlelength=2.6,
    )


def _unit(seconds: float) -> tuple[float, str]:
    return (1.0, "s") if seconds >= 10.0 else (1e-3, "ms") if seconds >= 1e-2 else (1e-6, "us")
