"""What `petractl simulate` answers: a table, JSON and timelines; `sweep_report` has the sweeps."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from petractl.cli.columns import figure, fit_columns
from petractl.cli.machine import bytes_in_words
from petractl.cli.places import writing
from petractl.cli.report import show_warning, write_out
from petractl.cli.simulation_rows import (
    MAX_SPANS,
    Conditions,
    Outputs,
    Row,
    chart_length,
    row_as_json,
    simulate_rows,
)
from petractl.cli.table import write_table
from petractl.errors import Problem, UserError

if TYPE_CHECKING:
    from petractl.cli.pipelines import Pipeline
    from petractl.planning.entries import Entry

_HEADER = ("x plain", "of limit", "idle", "stale", "most", "kept")
_SPARE = ("kept", "of limit", "most", "x plain", "idle", "stale")
_MAX_CHARTS = 6


def show(pipeline: "Pipeline", entries: "Sequence[Entry]", conditions: Conditions, outputs: Outputs) -> None:
    """Simulate the entries, write a table or JSON, and draw what is asked for."""
    for entry in entries:
        problem = pipeline.problem(entry)
        if problem:
            raise UserError(problem, where=entry.label, hint="leave it out of --schedules")
    if outputs.gantt or outputs.trace:
        _check_length(pipeline, conditions)
    rows = simulate_rows(pipeline, entries, conditions)
    _warn_of_memory(pipeline, rows)
    if outputs.as_json:
        _write_json(pipeline, rows)
    else:
        _write_table(pipeline, rows)
    draw(pipeline, entries, conditions, gantt=outputs.gantt, trace=outputs.trace)


def _write_json(pipeline: "Pipeline", rows: Sequence[Row]) -> None:
    document = {
        "pipeline": pipeline.title,
        "times": pipeline.note or "as given",
        "stages": pipeline.num_stages,
        "accumulation": pipeline.accumulation,
        "schedules": [row_as_json(pipeline, row) for row in rows],
    }
    write_out(json.dumps(document))


def _write_table(pipeline: "Pipeline", rows: Sequence[Row]) -> None:
    with_memory = rows[0].memory is not None
    unit = "images/s" if pipeline.batch_size else "microbatches/s"
    header = ("schedule", unit, *_HEADER, *(("memory",) if with_memory else ()))
    cells = [_cells(pipeline, row) for row in rows]
    shown, cells, left_out = fit_columns(header, cells, spare=_SPARE)
    write_table(shown, cells)
    if left_out:
        sys.stderr.write(f"not shown for want of room: {', '.join(left_out)} (--json has all)\n")
    if pipeline.is_nominal:
        show_warning(Problem("", f"times: {pipeline.note}: proportions hold, seconds do not"))
    elif pipeline.note:
        sys.stderr.write(f"times: {pipeline.note}\n")


def _cells(pipeline: "Pipeline", row: Row) -> list[str]:
    found = row.found
    cells = [
        row.entry.label,
        figure(found.microbatches_per_s * (pipeline.batch_size or 1)),
        f"{found.microbatches_per_s / row.plain:,.2f}",
        f"{found.share_of_limit:.3f}",
        f"{found.idle_percent:.1f} %",
        figure(found.staleness_updates),
        figure(max(stage.staleness_updates for stage in found.stages)),
        f"{max(stage.kept for stage in found.stages):,g}",
    ]
    return cells if row.memory is None else [*cells, bytes_in_words(max(row.memory))]


def _warn_of_memory(pipeline: "Pipeline", rows: Sequence[Row]) -> None:
    """Name the schedules that do not fit on the devices."""
    limits = pipeline.limits_bytes()
    for row in rows:
        over = [
            (need, limit)
            for need, limit in zip(row.memory or (), limits, strict=False)
            if limit is not None and need > limit
        ]
        if over:
            need, limit = max(over)
            what = f"needs {bytes_in_words(need)} on a device of {bytes_in_words(limit)}"
            show_warning(Problem(row.entry.label, what))


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

    chosen = entries[:_MAX_CHARTS]
    length = conditions.microbatches or chart_length(pipeline, chosen)
    drawn = [(entry.label, conditions.timeline(pipeline, entry, length=length)) for entry in chosen]
    if len(entries) > _MAX_CHARTS:
        left = ", ".join(entry.label for entry in entries[_MAX_CHARTS:])
        show_warning(
            Problem("", f"of {left} no timeline is made", f"give at most {_MAX_CHARTS} in --schedules")
        )
    if gantt is not None:
        timelines = [Timeline(label, spans) for label, spans in drawn]
        with writing(gantt):
            facts = "; ".join(filter(None, (pipeline.note, conditions.facts(pipeline))))
            plot_gantt(timelines, gantt, title=pipeline.title, subtitle=facts)
    if trace is not None:
        with writing(trace):
            write_trace(dict(drawn), trace)


def _check_length(pipeline: "Pipeline", conditions: Conditions) -> None:
    """Refuse timelines that nobody could draw or open."""
    most = MAX_SPANS // pipeline.num_stages
    if (conditions.microbatches or 0) > most:
        raise UserError(
            f"{conditions.microbatches:,} microbatches on {pipeline.num_stages} stages are too many to draw",
            where="--microbatches",
            hint=f"give at most {most:,} with --gantt or --trace",
        )
