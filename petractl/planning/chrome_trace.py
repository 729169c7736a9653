"""Write timelines for chrome://tracing and ui.perfetto.dev: the Trace Event Format, one JSON object.

Each timeline is a process of the viewer for each of its replicas, each stage (or process of a pipeline that
holds several) a thread of it, and each operation a complete event ("X"). An operation that stood still for a
message has an event "wait" before it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from petractl.planning.times import Span

_COLOURS = {
    "F": "thread_state_running",
    "B": "thread_state_iowait",
    "FB": "thread_state_runnable",
    "W": "rail_animation",
    "U": "black",
    "wait": "grey",
}
_US = 1e6


def write_trace(timelines: Mapping[str, Sequence[Span]], path: Path) -> None:
    """Write timelines, each under its name; a timeline's spans are in the order of their starts."""
    # One event a line: a trace may be large, and is looked at with other tools too.
    events = ",\n".join(json.dumps(event, separators=(",", ":")) for event in trace_events(timelines))
    path.write_text(f'{{"displayTimeUnit":"ms","traceEvents":[\n{events}\n]}}\n', encoding="utf-8")


def trace_events(timelines: Mapping[str, Sequence[Span]]) -> Iterator[dict[str, Any]]:
    """Yield the events: names of processes and threads first, then operations; times in microseconds."""
    number = 0
    for name, spans in timelines.items():
        replicas = sorted({span.replica for span in spans})
        for replica in replicas:
            title = f"{name}, replica {replica}" if len(replicas) > 1 else name
            own = [span for span in spans if span.replica == replica]
            yield from _named(number, title, own)
            yield from _operations(number, own)
            number += 1


def _named(process: int, title: str, spans: Sequence[Span]) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": title}}
    for row in sorted({span.row for span in spans}):
        several = any(span.place is not None for span in spans)
        thread = {"ph": "M", "pid": process, "tid": row}
        yield {
            **thread,
            "name": "thread_name",
            "args": {"name": f"{'process' if several else 'stage'} {row}"},
        }
        yield {**thread, "name": "thread_sort_index", "args": {"sort_index": row}}


def _operations(process: int, spans: Sequence[Span]) -> Iterator[dict[str, Any]]:
    ended: dict[int, float] = {}
    for span in spans:
        before = ended.get(span.row, 0.0)
        if span.waited_for and span.start_s > before:
            args = {"for": span.waited_for, "before": f"{span.kind} {span.microbatch}"}
            yield _event(process, span.row, "wait", "wait", before, span.start_s, args)
        ended[span.row] = span.end_s
        if span.end_s > span.start_s:
            numbers = {"stage": span.stage, "microbatch": span.microbatch}
            name = f"{span.kind} {span.microbatch}"
            yield _event(process, span.row, name, span.kind, span.start_s, span.end_s, numbers)


def _event(
    process: int, thread: int, name: str, kind: str, start_s: float, end_s: float, args: Mapping[str, object]
) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "cat": kind,
        "pid": process,
        "tid": thread,
        "ts": round(start_s * _US, 3),
        "dur": round((end_s - start_s) * _US, 3),
        "cname": _COLOURS.get(kind, "grey"),
        "args": dict(args),
    }
