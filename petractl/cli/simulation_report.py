"""What `petractl simulate` answers: tables, JSON, timelines and sweeps."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petractl.cli.report import show_warning, write_out
from petractl.cli.table import write_table
from petractl.errors import Problem, UserError

if TYPE_CHECKING:
    from petractl.cli.pipelines import NumbersPipeline, Pipeline
    from petractl.planning.entries import Entry
    from petractl.planning.simulated import Simulated
    from petractl.planning.times import Link, Span

_HEADER = ("schedule", "vs plain", "of limit", "idle", "least - most", "staleness", "most", "kept")
_MAX_CHARTS = 6
_MAX_SPANS = 400_000


@dataclass(frozen=True, slots=True)
class Conditions:
    """What holds for every schedule."""

    link: "Link"
    microbatches: int | None
    jitter: float
    seed: int

    def simulate(self, pipeline: "Pipeline", entry: "Entry") -> "Simulated":
        """Return how an entry fares."""
        from petractl.planning.simulation import simulate

        try:
            return simulate(
                entry.schedule,
                pipeline.times(entry),
                link=self.link,
                accumulation=pipeline.accumulation,
                num_microbatches=self.microbatches,
                slack=entry.slack,
                jitter=self.jitter,
                seed=self.seed,
            )
        except ValueError as error:
            raise UserError(str(error), where=entry.label, hint="change --schedules") from None

    def plain_rate(self, pipeline: "Pipeline") -> float:
        """Return the steady rate of plain model parallelism: one microbatch at a time, the graph kept."""
        from petractl.planning.entries import parse_entries

        (entry,) = parse_entries("plain")
        return replace(self, microbatches=None).simulate(pipeline, entry).microbatches_per_s

    def timeline(self, pipeline: "Pipeline", entry: "Entry") -> "tuple[Span, ...]":
        """Return what happens in an epoch; by default a short one, long enough to fill the pipe."""
        from petractl.planning.simulation import timeline

        return timeline(
            entry.schedule,
            pipeline.times(entry),
            num_microbatches=self.microbatches or _chart_length(pipeline),
            link=self.link,
            accumulation=pipeline.accumulation,
            slack=entry.slack,
            jitter=self.jitter,
            seed=self.seed,
        )


def show(pipeline: "Pipeline", entries: "Sequence[Entry]", conditions: Conditions, *, as_json: bool) -> None:
    results = [(entry, conditions.simulate(pipeline, entry)) for entry in entries]
    plain = conditions.plain_rate(pipeline)
    if as_json:
        document = {
            "pipeline": pipeline.title,
            "times": pipeline.note or "as given",
            "stages": pipeline.num_stages,
            "accumulation": pipeline.accumulation,
            "schedules": [_object(pipeline, entry, result, plain) for entry, result in results],
        }
        write_out(json.dumps(document))
        return
    unit = "images/s" if pipeline.batch_size else "microbatches/s"
    rows = [_row(pipeline, entry, result, plain) for entry, result in results]
    write_table((_HEADER[0], unit, *_HEADER[1:]), rows)
    if pipeline.note:
        show_warning(Problem("", f"{pipeline.note}: proportions hold, seconds do not"))


def _row(pipeline: "Pipeline", entry: "Entry", result: "Simulated", plain: float) -> tuple[str, ...]:
    idle = [stage.idle_percent for stage in result.stages]
    return (
        entry.label,
        f"{result.microbatches_per_s * (pipeline.batch_size or 1):,.4g}",
        f"{result.microbatches_per_s / plain:,.2f} x",
        f"{result.share_of_limit:.3f}",
        f"{result.idle_percent:.1f} %",
        f"{min(idle):.1f} - {max(idle):.1f} %",
        f"{result.staleness_updates:,.4g}",
        f"{max(stage.staleness_updates for stage in result.stages):,.4g}",
        f"{max(stage.kept for stage in result.stages):,g}",
    )


def _object(pipeline: "Pipeline", entry: "Entry", result: "Simulated", plain: float) -> dict[str, Any]:
    record: dict[str, Any] = {"entry": entry.label, "method": entry.method.name, "keep": entry.method.keep}
    record |= asdict(result)
    if pipeline.batch_size:
        record["images_per_s"] = result.microbatches_per_s * pipeline.batch_size
    record["speedup_over_model_parallel"] = result.microbatches_per_s / plain
    record["share_of_limit"] = result.share_of_limit
    record["idle_percent"] = result.idle_percent
    record["staleness_updates"] = result.staleness_updates
    return record


def draw(
    pipeline: "Pipeline",
    entries: "Sequence[Entry]",
    conditions: Conditions,
    *,
    gantt: Path | None,
    trace: Path | None,
) -> None:
    """Draw the timelines of the schedules, and write them."""
    if gantt is None and trace is None:
        return
    from petractl.planning.chrome_trace import write_trace
    from petractl.tracking.gantt_plot import Timeline, plot_gantt

    drawn = [(entry.label, conditions.timeline(pipeline, entry)) for entry in entries[:_MAX_CHARTS]]
    if len(entries) > _MAX_CHARTS:
        left = ", ".join(entry.label for entry in entries[_MAX_CHARTS:])
        show_warning(
            Problem("", f"of {left} no timeline is made", f"give at most {_MAX_CHARTS} in --schedules")
        )
    if gantt is not None:
        timelines = [Timeline(label, spans) for label, spans in drawn]
        plot_gantt(timelines, gantt, title=pipeline.title, subtitle=pipeline.note)
    if trace is not None:
        write_trace(dict(drawn), trace)


def show_sweep(
    pipeline: "NumbersPipeline",
    entries: "Sequence[Entry]",
    counts: Sequence[int],
    conditions: Conditions,
    *,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Simulate as many equal stages as each of `counts` says."""
    if len(set(pipeline.forward_ms)) > 1 or len(set(pipeline.backward_ms)) > 1:
        raise UserError(
            "is of equal stages", where="--sweep", hint="give one number in --forward-ms and the like"
        )
    for entry in entries:
        if not isinstance(entry.schedule, str):
            raise UserError(
                f"{entry.label} is for {len(entry.schedule)} stages", where="--sweep", hint="leave it out"
            )
    results = {
        count: [conditions.simulate(pipeline.with_stages(count), entry) for entry in entries]
        for count in counts
    }
    if as_json:
        rows = [
            _object(pipeline, entry, result, conditions.plain_rate(pipeline.with_stages(count)))
            | {"stages": count}
            for count, found in results.items()
            for entry, result in zip(entries, found, strict=True)
        ]
        write_out(
            json.dumps({"pipeline": pipeline.title, "accumulation": pipeline.accumulation, "sweep": rows})
        )
    else:
        table = [
            (f"{count:,}", *(f"{result.microbatches_per_s:,.4g}" for result in found))
            for count, found in results.items()
        ]
        write_table(("stages", *(f"{entry.label}, /s" for entry in entries)), table)
    if plot is not None:
        from petractl.tracking.throughput_plot import Curve, plot_throughput

        curves = [
            Curve(
                entry.label, tuple(results), tuple(found[n].microbatches_per_s for found in results.values())
            )
            for n, entry in enumerate(entries)
        ]
        one = pipeline.with_stages(1)
        times = f"forward {one.forward_ms[0]:g} ms, backward {one.backward_ms[0]:g} ms"
        facts = f"{times}, {pipeline.accumulation} microbatches per update"
        plot_throughput(curves, plot, title="Throughput against the number of stages", subtitle=facts)


def _chart_length(pipeline: "Pipeline") -> int:
    """Return how many microbatches fill the pipe and show its stride, as far as a chart has room."""
    return max(4, min(2 * pipeline.num_stages + 6, _MAX_SPANS // pipeline.num_stages))
