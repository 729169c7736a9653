"""The diagnosed gradients of a run as one PNG: heat-maps of stages by updates, drawn from the journal.

Above the cosines, below the ratios of norms. The first two columns compare what the stages learn from with
the end-to-end gradient, at the current parameters and at those of the forwards; the third does the same for a
plain delayed gradient of the same age, to be compared with the first. More where there is something to show:
guesses with their targets, and the error of rebuilt inputs. Light is good everywhere. Many diagnoses are
averaged in columns; one made twice (a resume from an older checkpoint) counts as it was found last.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from petractl.events import Event, GradientsDiagnosed, RunFailed, RunFinished, RunInterrupted, RunStarted
from petractl.tracking.journal import read_journal
from petractl.tracking.terminal import harmless

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

DIAGNOSIS_NAME = "plots/diagnosis.png"
MAX_COLUMNS = 150

_MISSING = "#BBBBBB"
_COLUMNS = (
    ("with end-to-end, current parameters", ("cosine", "norm_ratio")),
    ("with end-to-end, forwards' parameters", ("cosine_forward", "norm_ratio_forward")),
    ("of delayed with end-to-end, current", ("delayed_cosine", "delayed_norm_ratio")),
    ("of guess with target", ("guess_cosine", "guess_norm_ratio")),
)
_COSINES, _RATIOS = zip(*(keys for _, keys in _COLUMNS[:3]), strict=True)
_REBUILT = "reconstruction_error"
_KEYS = (*(key for _, keys in _COLUMNS for key in keys), _REBUILT)
_LEAST_FACTOR = 1.25  # of norms: a smaller range is not worth all of the colours
_LEAST_COSINE = 0.95  # the darkest colour is for this, or less
_LEAST_DECADES = 1.0  # of errors

Grid = list[list[float]]
"""A value for each stage and column; not-a-number where there is none."""


@dataclass(frozen=True, slots=True)
class Diagnoses:
    """What is drawn: the update of every column, and the values of every key by stage and column."""

    title: str
    updates: tuple[int, ...]
    stages: tuple[int, ...]
    values: dict[str, Grid]

    def has(self, key: str) -> bool:
        """Tell whether there is anything to draw."""
        return any(math.isfinite(value) for row in self.values[key] for value in row)


class DiagnosisPlotter:
    """The listener that draws the diagnoses when a run ends, however it ends."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def handle(self, event: Event, record: dict[str, object]) -> None:
        """Draw, if this is the end."""
        if isinstance(event, RunFinished | RunInterrupted | RunFailed):
            plot_diagnoses(self._run_dir)

    def close(self) -> None:
        """Do nothing: all is drawn at the end of the run, before the listeners close."""


def plot_diagnoses(run_dir: Path) -> Path | None:
    """Draw the diagnoses of a run to `plots/diagnosis.png` in its folder and return that path.

    Returns None if there are none. Raises `DataError` if there is no journal.
    """
    diagnoses = diagnoses_of(read_journal(run_dir))
    if not diagnoses.updates:
        return None
    path = run_dir / DIAGNOSIS_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    _figure(diagnoses).savefig(path, dpi=100)
    return path


def diagnoses_of(records: Iterable[dict[str, object]]) -> Diagnoses:
    """Return the diagnoses in a journal's records, averaged into at most `MAX_COLUMNS` columns."""
    title = ""
    found: dict[int, dict[int, dict[str, object]]] = {}
    for record in records:
        if record["event"] == RunStarted.name:
            title = f"{record['recipe_name']}: {record['model']} on {record['dataset']} by {record['method']}"
            title = harmless(title)
        elif record["event"] == GradientsDiagnosed.name:
            found.setdefault(_whole(record["microbatch"]), {})[_whole(record["stage"])] = record
    places = sorted(found)
    stages = tuple(sorted({stage for row in found.values() for stage in row}))
    columns = _columns(places)
    return Diagnoses(
        title=title,
        updates=tuple(_whole(next(iter(found[column[-1]].values()))["update"]) for column in columns),
        stages=stages,
        values={
            key: [
                [_mean(_number(found[i].get(stage, {}).get(key)) for i in column) for column in columns]
                for stage in stages
            ]
            for key in _KEYS
        },
    )


def _columns(places: Sequence[int]) -> list[Sequence[int]]:
    """Return the microbatches of each column, as even as whole numbers allow."""
    count = min(len(places), MAX_COLUMNS)
    edges = [round(n * len(places) / count) for n in range(count + 1)] if count else []
    return [places[a:b] for a, b in pairwise(edges)]


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _whole(value: object) -> int:
    return int(_number(value))


def _number(value: object) -> float:
    return float(value) if isinstance(value, str | int | float) else math.nan


def _figure(diagnoses: Diagnoses) -> "Figure":
    # No pyplot, as for the curves: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = [column for column in _COLUMNS if any(map(diagnoses.has, column[1]))]
    is_rebuilt = diagnoses.has(_REBUILT)
    count = max(1, len(columns)) + is_rebuilt
    height = min(9.0, 2.6 + 0.34 * len(diagnoses.stages)) * (2 if columns else 1)
    figure = Figure(figsize=(1.0 + 5.0 * count, max(5.0, min(12.0, height))), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)  # type: ignore[union-attr,call-arg]
    figure.suptitle(diagnoses.title, fontsize=14, fontweight="bold")
    panels = figure.subplots(2, count, squeeze=False)
    for n, (title, (cosine, ratio)) in enumerate(columns):
        _draw_cosine(panels[0, n], diagnoses, cosine, title=title)
        _draw_ratio(panels[1, n], diagnoses, ratio, title=title)
    if is_rebuilt:
        _draw_error(panels[0, -1], diagnoses)
    for panel in panels.flat:
        if not panel.has_data():
            panel.set_axis_off()
    return figure


def _draw_cosine(axes: "Axes", diagnoses: Diagnoses, key: str, *, title: str) -> None:
    from matplotlib.colors import Normalize

    low = min([_LEAST_COSINE, *_finite(diagnoses, (*_COSINES, key))])
    _draw(axes, diagnoses, key, norm=Normalize(low, 1.0), colours="viridis")
    axes.set_title(f"Cosine {title}", fontsize=11, loc="left")


def _draw_ratio(axes: "Axes", diagnoses: Diagnoses, key: str, *, title: str) -> None:
    from matplotlib.colors import LogNorm

    values = [value for value in _finite(diagnoses, (*_RATIOS, key)) if value > 0]
    factor = max([_LEAST_FACTOR, *(max(value, 1.0 / value) for value in values)])
    bar = _draw(axes, diagnoses, key, norm=LogNorm(1.0 / factor, factor), colours="RdBu_r")
    middle = factor**0.5
    ticks = [1.0 / factor, 1.0 / middle, 1.0, middle, factor]
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    bar.ax.minorticks_off()
    axes.set_title(f"Norm ratio {title}", fontsize=11, loc="left")


def _draw_error(axes: "Axes", diagnoses: Diagnoses) -> None:
    from matplotlib.colors import LogNorm

    values = [value for value in _finite(diagnoses, (_REBUILT,)) if value > 0] or [1e-7]
    high = max(values)
    norm = LogNorm(min(*values, high / 10**_LEAST_DECADES), high)
    _draw(axes, diagnoses, _REBUILT, norm=norm, colours="viridis_r")
    axes.set_title("Relative error of rebuilt inputs, worst unit", fontsize=11, loc="left")


def _draw(axes: "Axes", diagnoses: Diagnoses, key: str, *, norm: "Normalize", colours: str) -> "Colorbar":
    from matplotlib import colormaps

    stages, updates = diagnoses.stages, diagnoses.updates
    image = axes.imshow(
        diagnoses.values[key],
        aspect="auto",
        interpolation="nearest",
        cmap=colormaps[colours].with_extremes(bad=_MISSING),
        norm=norm,
    )
    every = max(1, math.ceil(len(stages) / 16))
    axes.set_yticks(range(0, len(stages), every), [str(stage) for stage in stages[::every]])
    axes.set_ylabel("stage", fontsize=11)
    step = max(1, math.ceil(len(updates) / 6))
    axes.set_xticks(range(0, len(updates), step), [f"{update:,}" for update in updates[::step]])
    axes.set_xlabel("update", fontsize=11)
    axes.tick_params(labelsize=10)
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure.colorbar(image, ax=axes, pad=0.02, aspect=30)


def _finite(diagnoses: Diagnoses, keys: Sequence[str]) -> list[float]:
    return [value for key in keys for row in diagnoses.values[key] for value in row if math.isfinite(value)]
