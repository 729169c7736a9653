"""What `petractl partition` writes: a table for people, an object for programs."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from petractl.cli.columns import fit_columns
from petractl.cli.machine import bytes_in_words
from petractl.cli.report import write_out
from petractl.cli.table import write_table

if TYPE_CHECKING:
    from petractl.planning.choices import DeviceCount, ReplicaChoice
    from petractl.planning.net import Net
    from petractl.planning.plan import PipelinePlan, StageForecast
    from petractl.planning.references import References

_HEADER = ("stage", "device", "parameters", "time", "share", "memory", "staleness", "units")
_SPARE = ("parameters", "device", "staleness", "share")
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Answer:
    """A plan of `num_devices`, all replicas together, and what it is compared with."""

    model: str
    net: "Net"
    plan: "PipelinePlan"
    choices: "list[ReplicaChoice]"
    counts: "list[DeviceCount]"
    references: "References"
    num_devices: int

    @property
    def copies(self) -> int:
        """Replicas."""
        return self.plan.setting.replicas


def show_plan(answer: Answer) -> None:
    """Write the tables, what to expect, and the section to paste."""
    from petractl.recipe.edit import partition_stanza

    _write_fitting(_HEADER, [_row(stage) for stage in answer.plan.stages])
    write_out("")
    _write_forecast(answer)
    _write_choices(answer)
    _write_counts(answer)
    write_out(f"\n{partition_stanza(answer.plan.cuts, replicas=answer.copies)}")


def _write_fitting(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown, cells, left_out = fit_columns(header, rows, spare=_SPARE, last_below=True)
    write_table(shown, cells)
    if left_out:
        sys.stderr.write(f"not shown for want of room: {', '.join(left_out)} (--json has all)\n")


def _write_forecast(answer: Answer) -> None:
    from petractl.planning.averaging import replica_links
    from petractl.planning.times import Link

    net, plan = answer.net, answer.plan
    forecast = plan.forecast
    write_out(f"times: {net.clock}; microbatches of {net.batch_size}, k = {plan.setting.accumulation}")
    copies = answer.copies
    all_of_them = f" with {copies} replicas" if copies > 1 else ""
    write_out(
        f"predicted: {forecast.images_per_s:,.1f} images/s{all_of_them}, idle {forecast.idle_percent:.0f} %"
    )
    if copies > 1 and Link() in replica_links(plan.setting.devices, unknown=net.messages.link):
        write_out("  the averaging of gradients is not in it: the speed of the links is not known")
    _write_references(answer)
    write_out(f"slowest stage / mean: {forecast.slowest_over_mean:.2f}")
    write_out(f'schedule = "least": lookahead {list(plan.least)}')


def _write_references(answer: Answer) -> None:
    references, rate = answer.references, answer.plan.forecast.images_per_s
    one = f" of {references.num_stages} stages" if answer.copies > 1 else ""
    write_out(f"  {references.over_model_parallel(rate):.2f} x plain model parallelism{one} (backprop)")
    exact, ratio = references.exact, references.over_exact(rate)
    if exact is None or ratio is None:
        needed = bytes_in_words(references.exact_needs_bytes or 0)
        write_out(f"  no exact pipeline{one} fits to compare with: it needs devices of {needed}")
    else:
        said = f"({exact.schedule}, {exact.accumulation} microbatches per update)"
        write_out(f"  {ratio:.2f} x the best exact pipeline{one} {said}")


def _write_choices(answer: Answer) -> None:
    if len(answer.choices) > 1:
        write_out("\nreplicas x stages:")
        header = ("replicas", "stages", "images/s", "most memory", "fits")
        write_table(header, [_choice_row(choice) for choice in answer.choices])


def _write_counts(answer: Answer) -> None:
    if len(answer.counts) < 2:
        return
    write_out("\nother numbers of devices, in one pipeline:")
    rows = [
        (
            str(count.devices) + (" *" if count.devices == answer.num_devices else ""),
            f"{count.slowest_over_mean:.2f}",
            f"{count.images_per_s:,.1f}",
            f"{count.images_per_s / count.devices:,.1f}",
        )
        for count in answer.counts
    ]
    write_table(("devices", "slowest / mean", "images/s at most", "per device"), rows)


def _row(stage: "StageForecast") -> tuple[str, ...]:
    names = stage.units
    units = ", ".join(names) if len(names) <= 2 else f"{names[0]} ... {names[-1]} ({len(names)})"
    memory = bytes_in_words(stage.memory.total)
    if stage.memory_limit_bytes is not None:
        memory = f"{stage.memory.total / _GIB:.2f} of {stage.memory_limit_bytes / _GIB:.1f} GiB"
    return (
        str(stage.index),
        stage.device.partition(" ")[0] if stage.device.startswith("nominal") else stage.device,
        f"{stage.parameters:,}",
        f"{stage.time_s * 1e3:,.1f} ms",
        f"{100 * stage.share:.0f} %",
        memory,
        f"{stage.staleness:g}",
        units,
    )


def _choice_row(choice: "ReplicaChoice") -> tuple[str, ...]:
    if choice.plan is None:
        return str(choice.replicas), str(choice.stages), "-", "-", "no"
    memory = bytes_in_words(choice.plan.most_memory_bytes)
    return str(choice.replicas), str(choice.stages), f"{choice.images_per_s:,.1f}", memory, "yes"


def plan_as_json(answer: Answer) -> dict[str, Any]:
    """Return the same as values for JSON."""
    net, plan = answer.net, answer.plan
    setting = plan.setting
    return {
        "model": answer.model,
        "times": net.clock,
        "batch_size": net.batch_size,
        "accumulation": setting.accumulation,
        "replicas": answer.copies,
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
        "predicted": _predicted_as_json(answer),
        "least_lookahead": list(plan.least),
        "replica_choices": [
            {
                "replicas": c.replicas,
                "stages": c.stages,
                "images_per_s": c.images_per_s if c.plan else None,
                "most_memory_bytes": c.plan.most_memory_bytes if c.plan else None,
                "fits": c.plan is not None,
            }
            for c in answer.choices
        ],
        "other_device_counts": [asdict(count) for count in answer.counts],
    }


def _predicted_as_json(answer: Answer) -> dict[str, Any]:
    forecast, references = answer.plan.forecast, answer.references
    exact = references.exact
    return {
        "images_per_s": forecast.images_per_s,
        "speedup_over_model_parallel": references.over_model_parallel(forecast.images_per_s),
        "speedup_over_best_exact": references.over_exact(forecast.images_per_s),
        "best_exact": exact.schedule if exact else None,
        "best_exact_accumulation": exact.accumulation if exact else None,
        "best_exact_needs_bytes": references.exact_needs_bytes,
        "compared_stages": references.num_stages,
        "idle_percent": forecast.idle_percent,
        "slowest_over_mean": forecast.slowest_over_mean,
    }
