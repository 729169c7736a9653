"""What `petractl simulate` asks of the simulator, and what it says of one schedule."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petractl.engine.exact_rules import EXACT_SCHEDULES
from petractl.errors import UserError
from petractl.planning.times import Link

if TYPE_CHECKING:
    from petractl.cli.pipelines import Pipeline
    from petractl.planning.entries import Entry
    from petractl.planning.simulated import Simulated
    from petractl.planning.times import Span

MAX_SPANS = 400_000


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where answers go, besides the table or in its place."""

    as_json: bool = False
    gantt: Path | None = None
    trace: Path | None = None
    plot: Path | None = None


@dataclass(frozen=True, slots=True)
class Conditions:
    """What holds for every schedule; without a link, the pipeline has its own."""

    link: Link | None
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
                link=pipeline.links(self.link),
                accumulation=pipeline.accumulation,
                num_microbatches=self.microbatches,
                slack=entry.slack,
                jitter=self.jitter,
                seed=self.seed,
                chunks=pipeline.chunks(entry),
            )
        except ValueError as error:
            raise UserError(str(error), where=entry.label, hint="change --schedules") from None

    def plain_rate(self, pipeline: "Pipeline") -> float:
        """Return the steady rate of plain model parallelism: one microbatch at a time, the graph kept."""
        from petractl.planning.entries import parse_entries

        (entry,) = parse_entries("plain")
        return replace(self, microbatches=None).simulate(pipeline, entry).microbatches_per_s

    def facts(self, pipeline: "Pipeline") -> str:
        """Return in words what a chart must say besides the stages."""
        link, words = pipeline.links(self.link), []
        links = (link,) if isinstance(link, Link) else tuple(dict.fromkeys(link))
        if len(links) == 1 and links[0].latency_s:
            words.append(f"latency {1e3 * links[0].latency_s:.3g} ms")
        if len(links) == 1 and links[0].bytes_per_s < math.inf:
            words.append(f"{links[0].bytes_per_s * 8 / 1e9:.3g} Gbit/s")
        if self.jitter:
            words.append(f"jitter {100 * self.jitter:g} %")
        k = pipeline.accumulation
        words.append(f"{k} {'microbatch' if k == 1 else 'microbatches'} per update")
        return ", ".join(words)

    def timeline(self, pipeline: "Pipeline", entry: "Entry", *, length: int) -> "tuple[Span, ...]":
        """Return what happens in an epoch of `length` microbatches."""
        from petractl.planning.simulation import timeline

        return timeline(
            entry.schedule,
            pipeline.times(entry),
            num_microbatches=length,
            link=pipeline.links(self.link),
            accumulation=pipeline.accumulation,
            slack=entry.slack,
            jitter=self.jitter,
            seed=self.seed,
            chunks=pipeline.chunks(entry),
        )


@dataclass(frozen=True, slots=True)
class Row:
    """How one entry fares, beside plain model parallelism."""

    entry: "Entry"
    found: "Simulated"
    plain: float
    memory: tuple[int, ...] | None


def simulate_rows(pipeline: "Pipeline", entries: "Sequence[Entry]", conditions: Conditions) -> list[Row]:
    """Return how the entries fare."""
    plain = conditions.plain_rate(pipeline)
    rows = []
    for entry in entries:
        found = conditions.simulate(pipeline, entry)
        rows.append(Row(entry, found, plain, pipeline.memory_bytes(entry, found)))
    return rows


def row_as_json(pipeline: "Pipeline", row: Row) -> dict[str, Any]:
    entry, found = row.entry, row.found
    record: dict[str, Any] = {"entry": entry.label, "method": entry.method.name, "keep": entry.method.keep}
    record |= asdict(found)
    for j, stage in enumerate(record["stages"]):
        stage["memory_bytes"] = None if row.memory is None else row.memory[j]
    if pipeline.batch_size:
        record["images_per_s"] = found.microbatches_per_s * pipeline.batch_size
    record["speedup_over_model_parallel"] = found.microbatches_per_s / row.plain
    record["share_of_limit"] = found.share_of_limit
    record["idle_percent"] = found.idle_percent
    record["staleness_updates"] = found.staleness_updates
    record["most_memory_bytes"] = None if row.memory is None else max(row.memory)
    return record


def chart_length(pipeline: "Pipeline", entries: "Sequence[Entry]") -> int:
    """Return how many microbatches fill the pipe and show its stride, as far as a chart has room.

    Exact pipelines run whole updates; beside them, all others run as many.
    """
    most = MAX_SPANS // pipeline.num_stages
    length = max(4, min(2 * pipeline.num_stages + 6, most))
    k = pipeline.accumulation
    whole = -(-length // k) * k
    has_exact = any(entry.schedule in EXACT_SCHEDULES for entry in entries)
    return whole if has_exact and whole <= most else length
