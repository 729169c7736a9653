"""What `petractl simulate --sweep` answers: throughput against the number of equal stages."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from petractl.cli.columns import figure, fit_columns
from petractl.cli.places import writing
from petractl.cli.report import write_out
from petractl.cli.simulation_rows import Conditions, Outputs, Row, row_as_json, simulate_rows
from petractl.cli.table import write_table
from petractl.errors import UserError

if TYPE_CHECKING:
    from petractl.cli.pipelines import NumbersPipeline
    from petractl.planning.entries import Entry


def show_sweep(
    pipeline: "NumbersPipeline",
    entries: "Sequence[Entry]",
    counts: Sequence[int],
    conditions: Conditions,
    outputs: Outputs,
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
    results = {count: simulate_rows(pipeline.with_stages(count), entries, conditions) for count in counts}
    if outputs.as_json:
        rows = [
            row_as_json(pipeline, row) | {"stages": count}
            for count, found in results.items()
            for row in found
        ]
        write_out(
            json.dumps({"pipeline": pipeline.title, "accumulation": pipeline.accumulation, "sweep": rows})
        )
    else:
        _write_sweep(entries, results)
    if outputs.plot is not None:
        _plot_sweep(pipeline, entries, results, outputs.plot, facts=conditions.facts(pipeline))


def _write_sweep(entries: "Sequence[Entry]", results: Mapping[int, Sequence[Row]]) -> None:
    """Write microbatches/s: a row for each number of stages or, where that is too wide, each schedule."""
    header = ["stages", *(f"{entry.label}, /s" for entry in entries)]
    rows = [
        [f"{count:,}", *(figure(row.found.microbatches_per_s) for row in found)]
        for count, found in results.items()
    ]
    *_, too_wide = fit_columns(header, rows, spare=("stages",))
    if too_wide:
        # Transposed, with the numbers of stages in the header: as many of them as have room.
        header, *rows = [list(cells) for cells in zip(header, *rows, strict=True)]
        header, rows, left_out = fit_columns(header, rows, spare=_spare_counts(header[1:]))
        if left_out:
            sys.stderr.write(f"not shown for want of room: {', '.join(left_out)} stages (--json has all)\n")
    write_table(header, rows)


def _spare_counts(counts: Sequence[str]) -> list[str]:
    """Return every second number of stages, then every second of the rest, and so on; both ends stay."""
    inner, order = list(counts[1:-1]), []
    while inner:
        order += inner[::2]
        inner = inner[1::2]
    return order


def _plot_sweep(
    pipeline: "NumbersPipeline",
    entries: "Sequence[Entry]",
    results: Mapping[int, Sequence[Row]],
    path: Path,
    *,
    facts: str,
) -> None:
    from petractl.tracking.throughput_plot import Curve, plot_throughput

    curves = [
        Curve(
            entry.label,
            tuple(results),
            tuple(found[n].found.microbatches_per_s for found in results.values()),
        )
        for n, entry in enumerate(entries)
    ]
    one = pipeline.with_stages(1)
    times = f"forward {one.forward_ms[0]:g} ms, backward {one.backward_ms[0]:g} ms"
    with writing(path):
        plot_throughput(
            curves, path, title="Throughput against the number of stages", subtitle=f"{times}, {facts}"
        )
