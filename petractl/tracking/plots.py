"""The curves of a run as one PNG, drawn from its journal: loss, top-1 and the learning rate by epoch.

The journal is the only source, so curves can be drawn again at any time, also for a run that was cut short.
An epoch trained twice (a resume from an older checkpoint) counts as it was trained last. Colours are Okabe
and Ito's, which colour-blind readers can tell apart; line style and marker say the same once more.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petractl.events import EpochTrained, Evaluated, Event, RunFailed, RunFinished, RunInterrupted, RunStarted
from petractl.tracking.journal import read_journal
from petractl.tracking.terminal import harmless

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES_NAME = "plots/curves.png"

_STYLES = (
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},  # blue: training
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},  # vermilion
    {"color": "#009E73", "marker": "^", "linestyle": "-."},  # green
    {"color": "#CC79A7", "marker": "D", "linestyle": ":"},  # purple
)
_GREY = "#555555"
_LOG_RANGE = 20.0  # a loss that falls by more than this factor is drawn on a logarithmic axis
_MARKERS_UP_TO = 40  # epochs
_LABEL_PIXELS = 19.0  # the height of a label


@dataclass(frozen=True, slots=True)
class Curve:
    """One quantity by epoch: epochs ascending, a value for each."""

    label: str
    epochs: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Curves:
    """What is drawn: training first, then each split that was evaluated."""

    title: str
    loss: tuple[Curve, ...]
    top1: tuple[Curve, ...]  # percent
    lr: Curve


class CurvePlotter:
    """The listener that draws the curves when a run ends, however it ends."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def handle(self, event: Event, record: dict[str, object]) -> None:
        """Draw, if this is the end."""
        if isinstance(event, RunFinished | RunInterrupted | RunFailed):
            plot_curves(self._run_dir)

    def close(self) -> None:
        """Do nothing: the curves are drawn at the end of the run, before the listeners close."""


def plot_curves(run_dir: Path) -> Path | None:
    """Draw the curves of a run to `plots/curves.png` in its folder and return that path.

    Returns None if no epoch was trained. Raises `DataError` if there is no journal.
    """
    curves = curves_of(read_journal(run_dir))
    if not curves.lr.epochs:
        return None
    path = run_dir / CURVES_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    _figure(curves).savefig(path, dpi=100)
    return path


def curves_of(records: Iterable[dict[str, object]]) -> Curves:
    """Return the curves in a journal's records."""
    title = ""
    trained: dict[int, dict[str, object]] = {}
    evaluated: dict[str, dict[int, dict[str, object]]] = {}
    for record in records:
        if record["event"] == RunStarted.name:
            title = f"{record['recipe_name']}: {record['model']} on {record['dataset']} by {record['method']}"
            title = harmless(title)
        elif record["event"] == EpochTrained.name:
            trained[_epoch(record)] = record
        elif record["event"] == Evaluated.name:
            evaluated.setdefault(str(record["split"]), {})[_epoch(record)] = record
    sources = {"train": trained, **evaluated}
    return Curves(
        title=title,
        loss=tuple(_curve(label, rows, "loss") for label, rows in sources.items()),
        top1=tuple(_curve(label, rows, "top1") for label, rows in sources.items()),
        lr=_curve("learning rate", trained, "lr"),
    )


def _curve(label: str, rows: dict[int, dict[str, object]], key: str) -> Curve:
    epochs = tuple(sorted(rows))
    return Curve(label, epochs, tuple(_number(rows[epoch][key]) for epoch in epochs))


def _epoch(record: dict[str, object]) -> int:
    return int(_number(record["epoch"]))


def _number(value: object) -> float:
    return float(value) if isinstance(value, str | int | float) else math.nan


def _figure(curves: Curves) -> "Figure":
    # No pyplot: its global state and its choice of a display have no place in a training process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)  # type: ignore[union-attr,call-arg]
    grid = figure.add_gridspec(2, 2, height_ratios=(4, 1))
    loss, top1, lr = (figure.add_subplot(place) for place in (grid[0, 0], grid[0, 1], grid[1, :]))
    figure.suptitle(curves.title, fontsize=15, fontweight="bold")
    _draw_loss(loss, curves.loss)
    _draw_top1(top1, curves.top1)
    _draw_lr(lr, curves.lr)
    figure.draw_without_rendering()  # the labels need to know where the ends of the lines lie
    _label_ends(loss, curves.loss, "{:.3g}")
    _label_ends(top1, curves.top1, "{:.1f} %")
    return figure


def _draw_loss(axes: "Axes", curves: tuple[Curve, ...]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    _frame(axes, title="Loss (mean cross-entropy)", unit="nats per sample", curves=curves)
    finite = [value for curve in curves for value in curve.values if math.isfinite(value) and value > 0]
    if finite and max(finite) > _LOG_RANGE * min(finite):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    _draw(axes, curves)
    axes.legend(loc="upper right", frameon=False, fontsize=11)


def _draw_top1(axes: "Axes", curves: tuple[Curve, ...]) -> None:
    _frame(axes, title="Top-1 accuracy", unit="percent of samples", curves=curves)
    _draw(axes, curves)
    if axes.get_ylim()[1] > 99.0:
        axes.set_ylim(top=101.0)
    for curve in curves[1:2]:
        epoch, best = max(_finite_points(curve), key=lambda point: point[1], default=(0, math.nan))
        if epoch:
            label = f"best {curve.label}: {best:.2f} % in epoch {epoch}"
            star: dict[str, Any] = {
                "marker": "*",
                "markersize": 16,
                "color": "black",
                "markeredgecolor": "white",
            }
            axes.plot(epoch, best, linestyle="none", zorder=5, label=label, **star)
    axes.legend(loc="lower right", frameon=False, fontsize=11)


def _draw_lr(axes: "Axes", curve: Curve) -> None:
    _frame(axes, title="Learning rate at the end of the epoch", unit="", curves=(curve,))
    axes.plot(curve.epochs, curve.values, color=_GREY, linewidth=1.8, clip_on=False, **_markers(curve, "o"))
    axes.set_ylim(bottom=0)


def _frame(axes: "Axes", *, title: str, unit: str, curves: tuple[Curve, ...]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=13, loc="left")
    axes.set_ylabel(unit, fontsize=12)
    axes.set_xlabel("epoch", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    epochs = [epoch for curve in curves for epoch in curve.epochs]
    margin = 0.5 if min(epochs) == max(epochs) else 0.02 * (max(epochs) - min(epochs))
    axes.set_xlim(min(epochs) - margin, max(epochs) + margin)


def _draw(axes: "Axes", curves: tuple[Curve, ...]) -> None:
    for curve, style in zip(curves, _STYLES, strict=False):
        line: dict[str, Any] = {"color": style["color"], "linestyle": style["linestyle"], "linewidth": 2.0}
        axes.plot(curve.epochs, curve.values, label=curve.label, **line, **_markers(curve, style["marker"]))


def _label_ends(axes: "Axes", curves: tuple[Curve, ...], number: str) -> None:
    """Write each curve's name and last value beside its end, moved apart where the ends are close."""
    ends = []
    for curve, style in zip(curves, _STYLES, strict=False):
        points = _finite_points(curve)
        if points:
            pixel = float(axes.transData.transform(points[-1])[1])
            ends.append((pixel, points[-1], f"{curve.label} {number.format(points[-1][1])}", style["color"]))
    ends.sort()
    apart = spread([pixel for pixel, *_ in ends], least=_LABEL_PIXELS)
    points_per_pixel = 72.0 / axes.get_figure(root=True).dpi  # type: ignore[union-attr]
    for (pixel, point, text, color), place in zip(ends, apart, strict=True):
        offset = (8.0, (place - pixel) * points_per_pixel)
        axes.annotate(
            text, point, xytext=offset, textcoords="offset points", va="center", color=color, fontsize=11
        )


def spread(places: Sequence[float], *, least: float) -> list[float]:
    """Move ascending places apart until neighbours are `least` from each other, keeping the mean of all."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + least) if moved else place)
    shift = (sum(places) - sum(moved)) / len(moved) if moved else 0.0
    return [place + shift for place in moved]


def _finite_points(curve: Curve) -> list[tuple[int, float]]:
    return [point for point in zip(curve.epochs, curve.values, strict=True) if math.isfinite(point[1])]


def _markers(curve: Curve, marker: str) -> dict[str, Any]:
    return {"marker": marker if len(curve.epochs) <= _MARKERS_UP_TO else "", "markersize": 4.5}
