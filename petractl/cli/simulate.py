"""`petractl simulate`: how fast schedules are on given stages, before there is a machine."""

import math
from typing import TYPE_CHECKING

from petractl.cli import simulate_options as given
from petractl.cli.options import JsonOption, SetOption
from petractl.cli.simulate_checks import check_request
from petractl.cli.simulation_report import show
from petractl.cli.simulation_rows import Conditions, Outputs
from petractl.cli.sweep_report import show_sweep

if TYPE_CHECKING:
    from petractl.cli.pipelines import NumbersPipeline
    from petractl.cli.recipe_pipeline import RecipePipeline
    from petractl.planning.times import Link


def command(
    recipe: given.RecipeOrNone = None,
    overrides: SetOption = None,
    stages: given.Stages = None,
    forward_ms: given.ForwardMs = None,
    backward_ms: given.BackwardMs = None,
    plain_backward_ms: given.PlainBackwardMs = None,
    update_ms: given.UpdateMs = 0.0,
    message_kib: given.MessageKib = 0.0,
    accumulation: given.Accumulation = None,
    flops: given.Flops = False,
    device_spec: given.DeviceSpecs = "",
    fresh: given.Fresh = False,
    speeds: given.Speeds = None,
    latency_ms: given.LatencyMs = None,
    bandwidth_gbps: given.BandwidthGbps = None,
    jitter: given.Jitter = 0.0,
    seed: given.Seed = 0,
    microbatches: given.Microbatches = None,
    schedules: given.Schedules = None,
    sweep: given.Sweep = None,
    compare: given.CompareRun = None,
    as_json: JsonOption = False,
    gantt: given.Gantt = None,
    trace: given.Trace = None,
    plot: given.Plot = None,
) -> None:
    """Simulate how fast schedules are on a pipeline.

    Throughput, idle time, staleness and memory, without running anything.

    The pipeline is a recipe's, its stages measured here, or given in numbers: --stages 64 --forward-ms 20
    --backward-ms 60.
    """
    asked = dict(locals())
    check_request(asked)
    from petractl.cli.recipe_pipeline import Source

    link = _link(latency_ms, bandwidth_gbps)
    source = Source(flops, device_spec, _speeds(speeds), fresh)
    if compare is not None:
        from petractl.cli.compared import write_comparison

        write_comparison(
            compare, recipe=recipe, overrides=overrides or [], link=link, source=source, as_json=as_json
        )
        return
    conditions = Conditions(link, microbatches, jitter, seed)
    outputs = Outputs(as_json, gantt, trace, plot)
    if recipe is not None:
        from petractl.cli.recipe_pipeline import recipe_pipeline

        of_recipe = recipe_pipeline(recipe, overrides=overrides or [], source=source)
        _show_recipe(of_recipe, schedules, conditions, outputs)
        return
    from petractl.cli.pipelines import numbers_pipeline

    in_numbers = numbers_pipeline(
        stages=stages,
        forward_ms=forward_ms,
        backward_ms=backward_ms,
        plain_backward_ms=plain_backward_ms,
        update_ms=update_ms,
        message_kib=message_kib,
        accumulation=accumulation or given.ACCUMULATION,
        speeds=speeds,
    )
    _show_numbers(in_numbers, schedules, sweep, conditions, outputs)


def _show_recipe(
    pipeline: "RecipePipeline", schedules: str | None, conditions: Conditions, outputs: Outputs
) -> None:
    from petractl.planning.entries import DEFAULT_ENTRIES, parse_entries

    entries = parse_entries(DEFAULT_ENTRIES if schedules is None else schedules)
    if schedules is None:
        # What is compared with by default is left out where the net cannot do it.
        own = pipeline.own()
        others = (entry for entry in entries if not entry.is_like(own) and not pipeline.problem(entry))
        entries = (own, *others)
    show(pipeline, entries, conditions, outputs)


def _show_numbers(
    pipeline: "NumbersPipeline",
    schedules: str | None,
    sweep: str | None,
    conditions: Conditions,
    outputs: Outputs,
) -> None:
    from petractl.cli.pipelines import parse_sweep
    from petractl.planning.entries import DEFAULT_ENTRIES, parse_entries

    entries = parse_entries(DEFAULT_ENTRIES if schedules is None else schedules)
    if sweep is not None:
        show_sweep(pipeline, entries, parse_sweep(sweep), conditions, outputs)
    else:
        show(pipeline, entries, conditions, outputs)


def _link(latency_ms: float | None, bandwidth_gbps: float | None) -> "Link | None":
    """Return the links that were asked for; None leaves them to the pipeline."""
    from petractl.planning.times import Link

    if latency_ms is None and bandwidth_gbps is None:
        return None
    bandwidth = bandwidth_gbps * 1e9 / 8 if bandwidth_gbps else math.inf
    return Link((latency_ms or 0.0) / 1e3, bandwidth)


def _speeds(text: str | None) -> tuple[float, ...]:
    from petractl.cli.pipelines import parse_speeds

    return () if text is None else parse_speeds(text)
