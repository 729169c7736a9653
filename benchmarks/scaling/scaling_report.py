"""The table and the plot of a measurement: medians over the repeats, and how far these lie apart."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emulated import Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BARS = {
    "paper": {2: 0.95, 4: 0.95, 8: 0.95, 16: 0.95, 32: 0.95},
    "tight": {2: 0.95, 4: 0.95, 8: 0.95, 16: 0.92},
}
"""The least efficiency that counts as success; of `tight` without added latency only."""

_STYLES = {  # Okabe and Ito's colours; markers and lines say the same again
    "paper": {"color": "#0072B2", "marker": "o"},
    "tight": {"color": "#D55E00", "marker": "s"},
    "sequential": {"color": "#555555", "marker": "^"},
}
_OTHER_STYLE = {"color": "#009E73", "marker": "D"}
_LINES = ("-", "--", ":", "-.")


@dataclass(frozen=True, slots=True)
class Row:
    """One number of stages, schedule and latency. Efficiency 1 is a microbatch per forward + backward.

    `efficiency` is of the last stage, `slowest` of the slowest stage, `speedup` over plain model parallelism
    (`sequential`) of the same repeat, each for every repeat. `overshoot_s` is what sleeps took too long, and
    `engine_s` what the training thread did beside sleeping and waiting: per microbatch, the mean over stages,
    the median over repeats. `cpu_s`: of all threads of a process.
    """

    stages: int
    schedule: str
    latency_s: float
    efficiency: tuple[float, ...]
    slowest: tuple[float, ...]
    speedup: tuple[float, ...]
    overshoot_s: float
    engine_s: float
    cpu_s: float


def summarise(records: Sequence[dict[str, Any]], settings: Settings) -> list[Row]:
    """Return a row for each (stages, latency, schedule), in the order of first appearance."""
    groups: dict[tuple[int, float, str], list[dict[str, Any]]] = {}
    for record in records:
        key = (record["stages"], record["latency_s"], record["schedule"])
        groups.setdefault(key, []).append(record)
    rows = []
    for (stages, latency, schedule), runs in groups.items():
        plain = groups.get((stages, latency, "sequential"), [])
        times = [_times(run) for run in runs]
        rows.append(
            Row(
                stages=stages,
                schedule=schedule,
                latency_s=latency,
                efficiency=tuple(settings.slot_s / time[-1] for time in times),
                slowest=tuple(settings.slot_s / max(time) for time in times),
                speedup=tuple(_times(p)[-1] / time[-1] for p, time in zip(plain, times, strict=False)),
                overshoot_s=_median(runs, lambda one: one["slept_s"] - one["asked_s"]),
                engine_s=_median(runs, _engine),
                cpu_s=_median(runs, lambda one: one["cpu_s"]),
            )
        )
    return rows


def _times(record: dict[str, Any]) -> list[float]:
    return [one["time_s"] for one in record["per_microbatch"]]


def _engine(one: dict[str, float]) -> float:
    return one["time_s"] - one["slept_s"] - one["wait_forward_s"] - one["wait_backward_s"]


def _median(runs: Sequence[dict[str, Any]], value: Callable[[dict[str, float]], float]) -> float:
    return statistics.median(statistics.mean(map(value, run["per_microbatch"])) for run in runs)


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    titles = (
        "stages",
        "latency",
        "schedule",
        "efficiency",
        "min - max",
        "slowest stage",
        "bar",
        "speedup",
        "sleep too long",
        "engine",
        "CPU",
    )
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in rows:
        median = statistics.median(row.efficiency)
        cells = (
            str(row.stages),
            f"{1e3 * row.latency_s:g} ms",
            row.schedule,
            f"{median:.3f}",
            f"{min(row.efficiency):.3f} - {max(row.efficiency):.3f}",
            f"{statistics.median(row.slowest):.3f}",
            _against_bar(row, median),
            f"{statistics.median(row.speedup):.2f}" if row.speedup else "",
            f"{1e3 * row.overshoot_s:.2f} ms",
            f"{1e3 * row.engine_s:.2f} ms",
            f"{1e3 * row.cpu_s:.2f} ms",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _against_bar(row: Row, efficiency: float) -> str:
    bar = BARS.get(row.schedule, {}).get(row.stages)
    if bar is None or (row.schedule == "tight" and row.latency_s):
        return ""
    return f"{bar} met" if efficiency >= bar else f"{bar} **missed**"


def plot(rows: Sequence[Row], path: Path, *, settings: Settings) -> None:
    """Draw efficiency and speedup by the number of stages to a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr,call-arg]
    figure.suptitle("J equal stages of emulated devices", fontsize=14, fontweight="bold")
    left, right = figure.subplots(1, 2)
    asynchronous = [row for row in rows if row.schedule != "sequential"]
    stages = sorted({row.stages for row in rows})
    _draw_efficiency(left, asynchronous, stages, slot_s=settings.slot_s)
    _draw_speedup(right, [row for row in asynchronous if row.speedup], stages)
    handles, labels = left.get_legend_handles_labels()
    right.legend(handles, labels, frameon=False, fontsize=10.5, loc="upper left")
    figure.supxlabel(
        f"stages J     ({1e3 * settings.forward_s:g} ms forward, {1e3 * settings.backward_s:g} ms backward, "
        f"messages of {settings.message_bytes // 1024} KiB through gloo; median and range of "
        f"{settings.repeats} repeats)",
        fontsize=10.5,
        color="#555555",
    )
    figure.savefig(path, dpi=110)


def _draw_efficiency(axes: "Axes", rows: Sequence[Row], stages: Sequence[int], *, slot_s: float) -> None:
    axes.set_title("Efficiency: 1 is a microbatch per forward + backward", fontsize=11.5, loc="left")
    axes.axhline(1.0, color="black", linewidth=1.0)
    axes.axhline(0.95, color="#999999", linewidth=1.0, linestyle=(0, (1, 2)))
    for latency in sorted({row.latency_s for row in rows if row.latency_s and row.schedule == "tight"}):
        limits = [1 / (1 + 2 * latency / slot_s * (n - 1) / n) for n in stages]
        axes.plot(stages, limits, color="#BBBBBB", linewidth=5, zorder=1, label=_limit_label(latency))
    for (schedule, latency), line in _lines(rows).items():
        medians = [statistics.median(row.efficiency) for row in line]
        errors = (
            [m - min(row.efficiency) for m, row in zip(medians, line, strict=True)],
            [max(row.efficiency) - m for m, row in zip(medians, line, strict=True)],
        )
        style = _style(rows, schedule, latency)
        axes.errorbar([row.stages for row in line], medians, yerr=errors, capsize=3, zorder=3, **style)
    lowest = min(min(row.efficiency) for row in rows)
    axes.set_ylim(min(0.75, lowest - 0.03), 1.015)
    axes.set_yticks([tick / 20 for tick in range(20, 0, -1) if tick / 20 > axes.get_ylim()[0]])
    _frame(axes, stages)


def _limit_label(latency_s: float) -> str:
    return f"the most that tight can reach at {1e3 * latency_s:g} ms"


def _draw_speedup(axes: "Axes", rows: Sequence[Row], stages: Sequence[int]) -> None:
    axes.set_title("Speedup over plain model parallelism", fontsize=11.5, loc="left")
    axes.plot(stages, stages, color="black", linewidth=1.0, zorder=4)
    for (schedule, latency), line in _lines(rows).items():
        medians = [statistics.median(row.speedup) for row in line]
        axes.plot([row.stages for row in line], medians, **_style(rows, schedule, latency))
    axes.set_yscale("log", base=2)
    axes.set_yticks(stages, [str(n) for n in stages])
    axes.annotate(
        "black line: J times\n(latency slows plain model parallelism too)",
        (0.97, 0.05),
        xycoords="axes fraction",
        ha="right",
        fontsize=10,
        color="#555555",
    )
    _frame(axes, stages)


def _lines(rows: Sequence[Row]) -> dict[tuple[str, float], list[Row]]:
    lines: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.schedule, row.latency_s), []).append(row)
    return lines


def _style(rows: Sequence[Row], schedule: str, latency_s: float) -> dict[str, Any]:
    latencies = sorted({row.latency_s for row in rows})
    place = latencies.index(latency_s)
    return {
        **_STYLES.get(schedule, _OTHER_STYLE),
        "linestyle": _LINES[place % len(_LINES)],
        "markerfacecolor": "white" if place else None,
        "linewidth": 1.8,
        "markersize": 6,
        "label": schedule + (f", {1e3 * latency_s:g} ms latency" if latency_s else ""),
    }


def _frame(axes: "Axes", stages: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(stages, [str(n) for n in stages])
    axes.minorticks_off()
    axes.grid(color="#E3E3E3", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10.5)
