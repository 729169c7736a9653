"""What `petractl partition` writes: a table for people, an object for programs."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from petractl.cli.report import write_out
from petractl.cli.table import write_table

if TYPE_CHECKING:
    from petractl.planning.choices import DeviceCount, ReplicaChoice
    from petractl.planning.net import Net
    from petractl.planning.plan import PipelinePlan, StageForecast

_HEADER = ("stage", "device", "parameters", "time", "share", "memory", "staleness", "units")
_GIB = 2**30


def show_plan(
    net: "Net",
    plan: "PipelinePlan",
    choices: "list[ReplicaChoice]",
    counts: "list[DeviceCount]",
    *,
    copies: int,
    rate: float,
) -> None:
    """Write the tables, what to expect, and the section to paste.

    `choices` and `counts` are what was compared with, `rate` is the images/s of all `copies`.
    """
    from petractl.recipe.edit import partition_stanza

    forecast = plan.forecast
    write_table(_HEADER, [_row(stage) for stage in plan.stages])
    write_out("")
    write_out(f"times: {net.clock}; microbatches of {net.batch_size}, k = {plan.setting.accumulation}")
    total = f", {rate:,.1f} with {copies} replicas" if copies > 1 else ""
    write_out(f"predicted: {forecast.images_per_s:,.1f} images/s{total}, idle {forecast.idle_percent:.0f} %")
    write_out(f"  {forecast.speedup_over_model_parallel:.2f} x plain model parallelism (backprop)")
    write_out(
        f"  {forecast.speedup_over_exact:.2f} x the best exact pipeline "
        f"({forecast.exact_schedule}, {forecast.exact_accumulation} microbatches per update)"
    )
    write_out(f"slowest stage / mean: {forecast.slowest_over_mean:.2f}")
    write_out(f'schedule = "least": lookahead {list(plan.least)}')
    if choices and len(choices) > 1:
        write_out("\nreplicas x stages:")
        header = ("replicas", "stages", "images/s", "most memory", "fits")
        write_table(header, [_choice_row(choice) for choice in choices])
    if len(counts) > 1:
        write_out("\nother numbers of devices:")
        rows = [
            (
                str(count.devices) + (" *" if count.devices == plan.setting.num_stages else ""),
                f"{count.slowest_over_mean:.2f}",
                f"{count.images_per_s:,.1f}",
                f"{count.images_per_s / count.devices:,.1f}",
            )
            for count in counts
        ]
        write_table(("devices", "slowest / mean", "images/s at most", "per device"), rows)
    write_out(f"\n{partition_stanza(plan.cuts)}")


def _row(stage: "StageForecast") -> tuple[str, ...]:
    names = stage.units
    units = ", ".join(names) if len(names) <= 2 else f"{names[0]} ... {names[-1]} ({len(names)})"
    limit = f" of {stage.memory_limit_bytes / _GIB:.1f}" if stage.memory_limit_bytes else ""
    return (
        str(stage.index),
        stage.device,
        f"{stage.parameters:,}",
        f"{stage.time_s * 1e3:,.1f} ms",
        f"{100 * stage.share:.0f} %",
        f"{stage.memory.total / _GIB:.2f}{limit} GiB",
        f"{stage.staleness:g}",
        units,
    )


def _choice_row(choice: "ReplicaChoice") -> tuple[str, ...]:
    if choice.plan is None:
        return str(choice.replicas), str(choice.stages), "-", "-", "no"
    memory = f"{choice.plan.most_memory_bytes / _GIB:.2f} GiB"
    return str(choice.replicas), str(choice.stages), f"{choice.images_per_s:,.1f}", memory, "yes"


def plan_as_json(
    net: "Net",
    plan: "PipelinePlan",
    choices: "list[ReplicaChoice]",
    counts: "list[DeviceCount]",
    *,
    model: str,
    copies: int,
    rate: float,
) -> dict[str, Any]:
    """Return the same as values for JSON."""
    forecast, setting = plan.forecast, plan.setting
    return {
        "model": model,
        "times": net.clock,
        "batch_size": net.batch_size,
        "accumulation": setting.accumulation,
        "replicas": copies,
        "cuts": list(plan.cuts),
        "stages": [
            {
                "index": stage.index,
                "device": stage.device,
                "units": list(stage.units),
                "first_unit": stage.first,
                "num_units": stage.end - stage.first,
                "parameters": stage.parameters,
                "time_ms": stage.time_s * 1e3,
                "forward_ms": stage.forward_s * 1e3,
                "backward_ms": stage.backward_s * 1e3,
                "update_ms": stage.update_s * 1e3,
                "memory_bytes": stage.memory.total,
                "memory": asdict(stage.memory),
                "memory_limit_bytes": stage.memory_limit_bytes,
                "lookahead": stage.lookahead,
                "staleness": stage.staleness,
                "share_of_slowest": stage.share,
            }
            for stage in plan.stages
        ],
        "predicted": {
            "images_per_s": rate,
            "speedup_over_model_parallel": forecast.speedup_over_model_parallel,
            "speedup_over_best_exact": forecast.speedup_over_exact,
            "best_exact": forecast.exact_schedule,
            "best_exact_accumulation": forecast.exact_accumulation,
            "idle_percent": forecast.idle_percent,
            "slowest_over_mean": forecast.slowest_over_mean,
        },
        "least_lookahead": list(plan.least),
        "replica_choices": [
            {
                "replicas": c.replicas,
                "stages": c.stages,
                "images_per_s": c.images_per_s if c.plan else None,
                "most_memory_bytes": c.plan.most_memory_bytes if c.plan else None,
                "fits": c.plan is not None,
            }
            for c in choices
        ],
        "other_device_counts": [asdict(count) for count in counts],
    }
