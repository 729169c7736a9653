"""The choices around a plan: how many replicas, how many devices, and what would fit instead."""

from dataclasses import dataclass, replace

from petractl.errors import UserError
from petractl.planning.devices import GIB
from petractl.planning.net import Net
from petractl.planning.plan import PipelinePlan, Setting, plan_pipeline, slowest_stage_s

_MOST_ACCUMULATION = 64
_MOST_COUNTS = 8
_TABLE_UNITS = 200


@dataclass(frozen=True, slots=True)
class ReplicaChoice:
    """N devices as `replicas` copies of a pipeline; `plan` is None where nothing fits."""

    replicas: int
    stages: int
    plan: PipelinePlan | None
    images_per_s: float


@dataclass(frozen=True, slots=True)
class DeviceCount:
    """The best cut for some number of equal devices."""

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
    raise _does_not_fit(net, setting)


def choose_replicas(net: Net, setting: Setting, *, replicas: int | None) -> list[ReplicaChoice]:
    """Plan the devices of `setting` as copies of a pipeline, fastest first, those that do not fit last.

    `replicas` None: every number that divides the devices. Devices are dealt in order: the first N / R are
    replica 0's. The slowest replica and the averaging of gradients set the pace.

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
        numbers = [n for n in numbers if count // n <= net.num_units]
    choices = [_choice(net, setting, n) for n in numbers]
    if all(choice.plan is None for choice in choices):
        raise _does_not_fit(net, _first_replica(setting, numbers[0]))
    return sorted(choices, key=lambda c: (c.plan is None, -c.images_per_s, c.replicas))


def device_counts(net: Net, setting: Setting) -> list[DeviceCount]:
    """Return what other numbers of equal devices would give: those that beat every smaller one, and this.

    Nothing for unequal devices and for nets of very many units.
    """
    if len(set(setting.devices)) != 1 or net.num_units > _TABLE_UNITS:
        return []
    total = sum(t.forward_s + t.backward_s + t.update_s for t in net.times) / setting.speeds[0]
    wanted = setting.num_stages
    found: list[DeviceCount] = []
    best = float("inf")
    for count in range(1, min(net.num_units, 2 * wanted + 2) + 1):
        slowest = slowest_stage_s(net, count, speed=setting.speeds[0])
        if slowest < best * 0.999 or count == wanted:
            found.append(DeviceCount(count, slowest * count / total, net.batch_size / slowest))
        best = min(best, slowest)
    return sorted(
        sorted(found, key=lambda c: abs(c.devices - wanted))[:_MOST_COUNTS], key=lambda c: c.devices
    )


def _choice(net: Net, setting: Setting, replicas: int) -> ReplicaChoice:
    own = _first_replica(setting, replicas)
    plans = []
    for r in range(replicas):
        devices = slice(r * own.num_stages, (r + 1) * own.num_stages)
        part = replace(own, devices=setting.devices[devices], speeds=setting.speeds[devices])
        if r and part.devices == own.devices:
            continue
        plans.append(plan_pipeline(net, part))
    if any(plan is None or not (plan.fits or setting.cuts is not None) for plan in plans):
        return ReplicaChoice(replicas, own.num_stages, None, 0.0)
    slowest = min((plan for plan in plans if plan is not None), key=lambda plan: plan.forecast.images_per_s)
    rate = 1.0 / (net.batch_size / slowest.forecast.images_per_s + _averaging_s(slowest, replicas))
    return ReplicaChoice(replicas, own.num_stages, slowest, replicas * rate * net.batch_size)


def _first_replica(setting: Setting, replicas: int) -> Setting:
    stages = setting.num_stages // replicas
    return replace(setting, devices=setting.devices[:stages], speeds=setting.speeds[:stages])


def _averaging_s(plan: PipelinePlan, replicas: int) -> float:
    """Return the seconds per microbatch of averaging gradients in a ring, none of it hidden."""
    if replicas == 1:
        return 0.0
    seconds = 0.0
    for stage, device in zip(plan.stages, plan.setting.devices, strict=True):
        moved = 2 * (replicas - 1) / replicas * 4 * stage.parameters
        if device.link_bytes_per_s is not None:
            seconds = max(seconds, moved / device.link_bytes_per_s)
    return seconds / plan.setting.accumulation


def _does_not_fit(net: Net, setting: Setting) -> UserError:
    """Say what is missing, and the nearest things that would work."""
    free = replace(setting, devices=tuple(replace(d, memory_bytes=None) for d in setting.devices))
    smallest = plan_pipeline(net, replace(free, balance="memory"))
    assert smallest is not None
    need = smallest.most_memory_bytes
    limits = [d.memory_bytes for d in setting.devices if d.memory_bytes is not None]
    count = setting.num_stages
    what = (
        f"{count} {'stage needs' if count == 1 else 'stages need'} at least {need / GIB:.1f} GiB "
        f"on the fullest device, and a device has {min(limits) / GIB:.1f} GiB"
    )
    ways = [f"devices of {need / GIB:.1f} GiB"]
    more = _devices_that_fit(net, setting)
    if more:
        ways.insert(0, f">= {more} devices of {min(limits) / GIB:.1f} GiB")
    k = _accumulation_that_fits(net, setting)
    if k:
        ways.append(f"k = {k} (--accumulation)")
    batch = _batch_that_fits(net, setting)
    if batch:
        ways.append(f"batches of {batch} (--batch)")
    return UserError(what, where="--gpus", hint=f"needs {', or '.join(ways)}")


def _devices_that_fit(net: Net, setting: Setting) -> int | None:
    if len(set(setting.devices)) != 1 or not isinstance(setting.schedule, str):
        return None
    for count in range(setting.num_stages + 1, min(net.num_units, 4 * setting.num_stages + 8) + 1):
        if _fits(
            net, replace(setting, devices=setting.devices[:1] * count, speeds=setting.speeds[:1] * count)
        ):
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
        plan = plan_pipeline(net, setting)
    except UserError:
        return False
    return plan is not None and plan.fits
