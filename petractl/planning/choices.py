"""The choices around a plan: how many replicas, how many devices, and what would fit instead."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from petractl.engine.exact_rules import EXACT_SCHEDULES, runs_as_one
from petractl.errors import UserError
from petractl.planning.devices import GIB, DeviceSpec
from petractl.planning.least import bound_s
from petractl.planning.net import Net, links_of
from petractl.planning.plan import (
    BLIND,
    PipelinePlan,
    Setting,
    StageForecast,
    choose_cuts,
    cuts_fit,
    emptiest_plan,
    plan_pipeline,
)

_MOST_ACCUMULATION = 64
_MOST_COUNTS = 8
_TABLE_UNITS = 200


@dataclass(frozen=True, slots=True)
class ReplicaChoice:
    """N devices as `replicas` copies of a pipeline; `plan` is None where nothing fits."""

    replicas: int
    stages: int
    plan: PipelinePlan | None

    @property
    def images_per_s(self) -> float:
        """Of all copies together; 0 where nothing fits."""
        return self.plan.forecast.images_per_s if self.plan else 0.0


@dataclass(frozen=True, slots=True)
class DeviceCount:
    """What some number of equal devices could do at most, in one pipeline."""

    devices: int
    slowest_over_mean: float
    images_per_s: float


def plan_or_refuse(net: Net, setting: Setting) -> PipelinePlan:
    """Plan a pipeline.

    Raises:
        UserError: nothing fits; with the nearest things that would.
    """
    plan = plan_pipeline(net, setting)
    if plan is not None and (plan.fits or setting.cuts is not None):
        return plan
    if plan is None:
        plan = emptiest_plan(net, setting)
        if plan.fits:
            return plan
    raise _does_not_fit(net, plan)


def choose_replicas(net: Net, setting: Setting, *, replicas: int | None) -> list[ReplicaChoice]:
    """Plan the devices of `setting` as copies of a pipeline, fastest first, those that do not fit last.

    `replicas` None: every number that divides the devices. Devices are dealt in order: the first N / R are
    replica 0's. All replicas have the same cuts, and wait for each other at every update: so each stage is as
    fast as its slowest copy, and has the memory of its smallest.

    Raises:
        UserError: the replicas do not divide the devices, or nothing fits.
    """
    count = setting.num_stages
    if replicas is not None and (replicas < 1 or count % replicas):
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        raise UserError(
            f"{count} GPUs / replicas({replicas}) is no whole number of stages",
            where="--replicas",
            hint=f"give one of {', '.join(map(str, divisors))}",
        )
    numbers = [n for n in range(1, count + 1) if count % n == 0] if replicas is None else [replicas]
    if replicas is None:
        numbers = [n for n in numbers if count // n <= net.num_units and _runs(setting, count // n)]
    if not numbers:
        k = setting.accumulation
        raise UserError(
            f'"{setting.schedule}" runs {k} microbatches per update on none of the numbers of stages',
            where="--accumulation",
            hint=f"give {count}",
        )
    choices = [_choice(net, setting, n) for n in numbers]
    if all(choice.plan is None for choice in choices):
        longest = setting_of_replicas(setting, numbers[0])
        raise _does_not_fit(net, plan_pipeline(net, longest) or emptiest_plan(net, longest))
    return sorted(choices, key=lambda c: (c.plan is None, -c.images_per_s, c.replicas))


def setting_of_replicas(setting: Setting, replicas: int) -> Setting:
    """Return the pipeline of N / R stages whose devices are the least of what the replicas have there."""
    stages = setting.num_stages // replicas
    rows = [range(stage, setting.num_stages, stages) for stage in range(stages)]
    return replace(
        setting,
        devices=tuple(_least_device([setting.devices[n] for n in row]) for row in rows),
        speeds=tuple(min(setting.speeds[n] for n in row) for row in rows),
        replicas=replicas,
    )


def device_counts(net: Net, setting: Setting) -> list[DeviceCount]:
    """Return what other numbers of equal devices would give: those that beat every smaller one, and this.

    Those that fit, cut as `setting` says, if it is not a list for one number of stages. Nothing for unequal
    devices and for nets of very many units.
    """
    if len(set(setting.devices)) != 1 or net.num_units > _TABLE_UNITS:
        return []
    wanted = setting.num_stages
    found: list[DeviceCount] = []
    best = float("inf")
    for count in range(1, min(net.num_units, 2 * wanted + 2) + 1):
        row = _device_count(net, _of_equal(setting, count))
        if row is None:
            continue
        period = 1.0 / row.images_per_s
        if period < best * 0.999 or count == wanted:
            found.append(row)
        best = min(best, period)
    return sorted(
        sorted(found, key=lambda c: abs(c.devices - wanted))[:_MOST_COUNTS], key=lambda c: c.devices
    )


def _device_count(net: Net, setting: Setting) -> DeviceCount | None:
    cuts = choose_cuts(net, setting)
    if cuts is None or not (cuts_fit(net, setting, cuts) or setting.cuts is not None):
        return None
    k = setting.accumulation
    times = net.stage_times(cuts, speeds=setting.speeds, accumulation=k)
    period = bound_s(times, links_of(setting.devices, unknown=net.messages.link), accumulation=k)
    slots = [time.busy_s + time.update_s / k for time in times]
    return DeviceCount(len(times), max(slots) * len(slots) / sum(slots), net.batch_size / period)


def _of_equal(setting: Setting, count: int) -> Setting:
    """Return the setting for another number of the same devices."""
    if count == setting.num_stages:
        return setting
    given = isinstance(setting.schedule, tuple)
    return replace(
        setting,
        devices=setting.devices[:1] * count,
        speeds=setting.speeds[:1] * count,
        schedule="auto" if given else setting.schedule,
        cuts=None,
    )


def _runs(setting: Setting, stages: int) -> bool:
    """Tell whether the schedule runs on so many stages."""
    if not isinstance(setting.schedule, str) or setting.schedule not in EXACT_SCHEDULES:
        return True
    return runs_as_one(setting.schedule, num_places=stages, count=setting.accumulation)


def _choice(net: Net, setting: Setting, replicas: int) -> ReplicaChoice:
    own = setting_of_replicas(setting, replicas)
    plan = plan_pipeline(net, own)
    fits = plan is not None and (plan.fits or setting.cuts is not None)
    return ReplicaChoice(replicas, own.num_stages, plan if fits else None)


def _least_device(devices: Sequence[DeviceSpec]) -> DeviceSpec:
    """Return a device with the least of each; what is not known limits nothing."""
    if len(set(devices)) == 1:
        return devices[0]

    def least(values: Sequence[float | None]) -> float | None:
        return min((value for value in values if value is not None), default=None)

    memory = least([device.memory_bytes for device in devices])
    latencies = [device.link_latency_s for device in devices if device.link_latency_s is not None]
    return DeviceSpec(
        " + ".join(dict.fromkeys(device.name for device in devices)),
        tflops=least([device.tflops for device in devices]),
        memory_bytes=None if memory is None else int(memory),
        link_bytes_per_s=least([device.link_bytes_per_s for device in devices]),
        link_latency_s=max(latencies, default=None),
    )


def _does_not_fit(net: Net, plan: PipelinePlan) -> UserError:
    """Say what is missing in a plan that is too large, and the nearest things that would work."""
    setting, full = plan.setting, plan.fullest
    assert full.memory_limit_bytes is not None, "only what is limited does not fit"
    least = "" if setting.balance in BLIND else "at least "
    need, limit = _gib(full.memory.total, up=True), _gib(full.memory_limit_bytes)
    what = (
        f"stage {full.index} of {setting.num_stages} needs {least}{need}, "
        f"and its device ({full.device}) has {limit}"
    )
    by_time = replace(setting, balance="time")
    if setting.balance in BLIND and _fits(net, by_time):
        return UserError(what, where="--gpus", hint="--balance time fits")
    ways = _ways(net, by_time, full, need=need, limit=limit)
    return UserError(what, where="--gpus", hint=f"needs {', or '.join(ways)}")


def _ways(net: Net, setting: Setting, full: StageForecast, *, need: str, limit: str) -> list[str]:
    """Return what would fit, each by itself."""
    equal = len(set(setting.devices)) == 1
    ways = [f"devices of {need}" if equal else f"a device of {need} for stage {full.index}"]
    more = _devices_that_fit(net, setting)
    if more:
        ways.insert(0, f">= {more * setting.replicas} devices of {limit}")
    k = _accumulation_that_fits(net, setting)
    if k:
        ways.append(f"k = {k} (--accumulation)")
    batch = _batch_that_fits(net, setting)
    if batch:
        ways.append(f"batches of {batch} (--batch)")
    return ways


def _gib(count: float, *, up: bool = False) -> str:
    """Return GiB in words: what is needed is rounded up, what there is down."""
    scale = 10 if count >= GIB else 100
    whole = math.ceil(scale * count / GIB) if up else math.floor(scale * (count + 1) / GIB)
    return f"{whole / scale:g} GiB"


def _devices_that_fit(net: Net, setting: Setting) -> int | None:
    """Return the stages of a pipeline that would fit."""
    if len(set(setting.devices)) != 1 or not isinstance(setting.schedule, str):
        return None
    for count in range(setting.num_stages + 1, min(net.num_units, 4 * setting.num_stages + 8) + 1):
        if _fits(net, _of_equal(setting, count)):
            return count
    return None


def _accumulation_that_fits(net: Net, setting: Setting) -> int | None:
    k = 2 * setting.accumulation
    while k <= _MOST_ACCUMULATION:
        if _fits(net, replace(setting, accumulation=k)):
            return k
        k *= 2
    return None


def _batch_that_fits(net: Net, setting: Setting) -> int | None:
    batch = net.batch_size // 2
    while batch >= 1:
        if _fits(net.with_batch(batch), setting):
            return batch
        batch //= 2
    return None


def _fits(net: Net, setting: Setting) -> bool:
    try:
        cuts = choose_cuts(net, setting)
    except UserError:
        return False
    return cuts is not None and cuts_fit(net, setting, cuts)
