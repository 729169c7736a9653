"""How busy a process is and what it sends, as far as its pipeline tells.

A stage with links of its own tells at any time, so its steady part can be cut out. torch's exact pipelines
tell after a segment; they fill and drain once per update anyway, so the whole segment is their steady part.
What they send has the shapes of the plan, and is counted from those.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from petractl import build
from petractl.engine.exact import ExactPipeline
from petractl.engine.pipeline import Pipeline
from petractl.engine.process_pipeline import ProcessPipeline


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has done since its start: seconds of waiting, bytes sent to its neighbours."""

    waited_s: float = 0.0
    bytes_sent: int = 0


@dataclass(frozen=True, slots=True)
class SegmentUsage:
    """What a process did in its last segment: percent of idling, bytes sent per microbatch."""

    idle_percent: float
    bytes_sent: float


def nothing() -> None:
    """Return None: in one process there is neither idling nor sending."""
    return None


def usage_of(pipeline: Pipeline) -> Callable[[], Usage | None]:
    """Return what tells of a process at any time, or `nothing`."""
    if not isinstance(pipeline, ProcessPipeline):
        return nothing
    links = pipeline

    def usage() -> Usage:
        *waited_s, up, down = links.link_totals()
        return Usage(math.fsum(waited_s), up + down)

    return usage


def segment_usage_of(pipeline: Pipeline, plan: build.CheckedPlan) -> Callable[[], SegmentUsage | None]:
    """Return what tells of a process after a segment, or `nothing`."""
    if not isinstance(pipeline, ExactPipeline):
        return nothing
    exact = pipeline
    sent = exact_bytes(plan, [stage.index for stage in exact.stages])

    def usage() -> SegmentUsage | None:
        if exact.compute_s is None or exact.wait_s is None:
            return None
        return SegmentUsage(100.0 * exact.wait_s / (exact.compute_s + exact.wait_s), sent)

    return usage


def exact_bytes(plan: build.CheckedPlan, stages: Sequence[int]) -> float:
    """Return the bytes that these stages send per microbatch: outputs upwards, input gradients downwards."""
    at_cuts = [
        sum(
            math.prod(shape) * dtype.itemsize
            for shape, dtype in zip(cost.output_shapes, cost.output_dtypes, strict=True)
        )
        for cost in (plan.costs[cut - 1] for cut in plan.cuts)
    ]
    up = sum(at_cuts[j] for j in stages if j < len(at_cuts))
    down = sum(at_cuts[j - 1] for j in stages if j > 0)
    return float(plan.recipe.data.batch_size * (up + down))
