"""What a plan is compared with: plain model parallelism and the best exact pipeline, on all of its devices.

Both are one pipeline of backprop: one microbatch at a time, or `EXACT_MICROBATCHES` per stage and update.
They have backprop's times, messages and memory, and exact pipelines cuts of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from petractl.planning.devices import DeviceSpec
from petractl.planning.exact_schedules import kept_by_stage
from petractl.planning.exact_simulation import INTERLEAVED
from petractl.planning.footprint import Footprint
from petractl.planning.interleaving import interleaved_cuts
from petractl.planning.memory import cuts_by_memory
from petractl.planning.net import Net, links_of
from petractl.planning.plan import EXACT_PIPELINES, Setting, cuts_with, lookahead_of
from petractl.planning.simulated import Simulated
from petractl.planning.simulation import simulate

EXACT_MICROBATCHES = 4
"""Microbatches per stage and update of the exact pipelines that are compared with."""


@dataclass(frozen=True, slots=True)
class ExactPipeline:
    """The fastest exact pipeline that fits."""

    schedule: str
    accumulation: int
    images_per_s: float


@dataclass(frozen=True, slots=True)
class References:
    """Speeds to compare with, of `num_stages` devices."""

    num_stages: int
    model_parallel_images_per_s: float
    exact: ExactPipeline | None
    """None where none fits."""
    exact_needs_bytes: int | None
    """What a device would need for one, if none fits."""

    def over_model_parallel(self, images_per_s: float) -> float:
        """Return how many times as fast this is as plain model parallelism."""
        return images_per_s / self.model_parallel_images_per_s

    def over_exact(self, images_per_s: float) -> float | None:
        """Return how many times as fast this is as the best exact pipeline; None where none fits."""
        return None if self.exact is None else images_per_s / self.exact.images_per_s


def references_of(
    net: Net,
    setting: Setting,
    *,
    footprints: Sequence[Footprint] | None,
    cuts: tuple[int, ...] | None = None,
) -> References:
    """Return what one pipeline of all devices of `setting` would do under backprop.

    `footprints` are the units' under backprop; None where no memory is limited. `cuts` are those of plain
    model parallelism, by default its best. Devices that are more than the units stand idle, the slowest.
    """
    backprop = _under_backprop(net, footprints)
    setting = _one_pipeline(setting, num_units=net.num_units, limited=footprints is not None)
    links = links_of(setting.devices, unknown=net.messages.link)
    if cuts is None or len(cuts) != setting.num_stages - 1:
        cuts = cuts_with(backprop, _unlimited(setting), (0,) * setting.num_stages)
    assert cuts is not None, "no limit of memory"
    times = backprop.stage_times(cuts, speeds=setting.speeds, backprop=True)
    plain = simulate("sequential", times, link=links)
    best = best_exact(backprop, setting)
    exact = (
        None
        if best is None
        else ExactPipeline(best.schedule, best.accumulation, best.microbatches_per_s * net.batch_size)
    )
    return References(
        num_stages=setting.num_stages,
        model_parallel_images_per_s=plain.microbatches_per_s * net.batch_size,
        exact=exact,
        exact_needs_bytes=None if exact else _needs_bytes(backprop, setting),
    )


def best_exact(backprop: Net, setting: Setting) -> Simulated | None:
    """Return the fastest exact pipeline that fits; `backprop` is the net under backprop."""
    stages, speeds = setting.num_stages, setting.speeds
    links = links_of(setting.devices, unknown=backprop.messages.link)
    k = _microbatches(setting)
    found = []
    for schedule in EXACT_PIPELINES:
        wanted = replace(setting, schedule=schedule, accumulation=k)
        cuts = cuts_with(backprop, wanted, lookahead_of(wanted, locked=True, least=None))
        if cuts is not None:
            times = backprop.stage_times(cuts, speeds=speeds, backprop=True, accumulation=k)
            found.append(simulate(schedule, times, link=links, accumulation=k))
    halves = interleaved_cuts(backprop, accumulation=k, speeds=speeds) if stages > 1 else None
    if halves is not None and _interleaved_fits(backprop, setting, halves, accumulation=k):
        chunks = backprop.stage_times(halves, speeds=speeds * 2, backprop=True, accumulation=k)
        whole = cuts_with(backprop, replace(_unlimited(setting), accumulation=k), (0,) * stages)
        assert whole is not None, "no limit of memory"
        times = backprop.stage_times(whole, speeds=speeds, backprop=True, accumulation=k)
        found.append(simulate(INTERLEAVED, times, link=links, accumulation=k, chunks=chunks))
    return max(found, key=lambda result: result.microbatches_per_s, default=None)


def _under_backprop(net: Net, footprints: Sequence[Footprint] | None) -> Net:
    if footprints is None:
        # Only the messages count: gradients alone go down, as large as what goes up.
        footprints = [replace(item, down_below=item.streams_below) for item in net.footprints]
    return replace(net, times=net.backprop_times, footprints=tuple(footprints), locked=True)


def _one_pipeline(setting: Setting, *, num_units: int, limited: bool) -> Setting:
    """Return the setting of the fastest devices in one pipeline, cut by time."""
    speeds = setting.speeds
    order = sorted(range(len(speeds)), key=lambda n: -speeds[n])
    chosen = sorted(order[:num_units])
    result = replace(
        setting,
        devices=tuple(setting.devices[n] for n in chosen),
        speeds=tuple(speeds[n] for n in chosen),
        balance="time",
        cuts=None,
        schedule="sequential",
        replicas=1,
    )
    return result if limited else _unlimited(result)


def _unlimited(setting: Setting) -> Setting:
    return replace(setting, devices=tuple(_without_limit(device) for device in setting.devices))


def _without_limit(device: DeviceSpec) -> DeviceSpec:
    return replace(device, memory_bytes=None)


def _microbatches(setting: Setting) -> int:
    """Return k; interleaved pipelines take rounds of a microbatch per stage."""
    stages = setting.num_stages
    return -(-max(setting.accumulation, EXACT_MICROBATCHES * stages) // stages) * stages


def _interleaved_fits(backprop: Net, setting: Setting, cuts: Sequence[int], *, accumulation: int) -> bool:
    """Tell whether both stages of every process fit on its device together."""
    limits = [device.memory_bytes for device in setting.devices]
    if all(limit is None for limit in limits):
        return True
    kept = kept_by_stage(INTERLEAVED, num_places=len(limits), accumulation=accumulation)
    sizes = backprop.memory(accumulation=accumulation).stages(cuts, lookahead=[n - 1 for n in kept])
    return all(
        limit is None or sizes[p].total + sizes[p + len(limits)].total <= limit
        for p, limit in enumerate(limits)
    )


def _needs_bytes(backprop: Net, setting: Setting) -> int:
    """Return the fullest stage's bytes of the pipeline that keeps least, 1F1B, cut for memory."""
    wanted = replace(setting, schedule="1f1b", accumulation=_microbatches(setting))
    lookahead = lookahead_of(wanted, locked=True, least=None)
    model = backprop.memory(accumulation=wanted.accumulation)
    cuts = cuts_by_memory(model, lookahead)
    return max(int(stage.total) for stage in model.stages(cuts, lookahead=lookahead))
