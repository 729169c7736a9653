"""A pipeline and its copies, planned: where to cut, what each stage then takes and holds, how fast it is.

The cuts are exact optima of what is to be balanced; the predictions are the simulator's, with the schedule's
own waiting. Copies have the same cuts: they average their gradients stage by stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from petractl.engine.assembly import stage_bounds
from petractl.engine.schedule import lookaheads
from petractl.errors import UserError
from petractl.planning.averaging import replica_links, with_averaging
from petractl.planning.devices import DeviceSpec
from petractl.planning.fitting import fitting
from petractl.planning.least import least_lookahead
from petractl.planning.memory import StageMemory, cuts_by_memory
from petractl.planning.net import Net, links_of
from petractl.planning.optimal import optimal_cuts
from petractl.planning.partition import check_stages, partition, partition_uniform
from petractl.planning.simulation import simulate
from petractl.planning.times import StageTimes

BALANCES = ("time", "flops", "memory", "parameters", "uniform")
EXACT_PIPELINES = ("gpipe", "1f1b", "zero-bubble")
BLIND = ("parameters", "uniform")
"""Balances that look at no memory."""
_LEAST_TRIES = 8


@dataclass(frozen=True, slots=True)
class Setting:
    """How a net is to be run: the stages' devices with their speeds, and the schedule.

    `schedule` is a name of `engine.schedule`, "least", or the lookaheads themselves. `cuts` given are taken
    as they are. With `replicas`, each stage's device is the least of its copies'.
    """

    devices: tuple[DeviceSpec, ...]
    speeds: tuple[float, ...]
    schedule: str | tuple[int, ...] = "tight"
    accumulation: int = 1
    balance: str = "time"
    cuts: tuple[int, ...] | None = None
    replicas: int = 1

    @property
    def num_stages(self) -> int:
        """J."""
        return len(self.devices)


@dataclass(frozen=True, slots=True)
class StageForecast:
    """One stage of a plan. Times are of one microbatch, `update_s` of one update with the averaging."""

    index: int
    device: str
    first: int
    end: int
    units: tuple[str, ...]
    parameters: int
    forward_s: float
    backward_s: float
    update_s: float
    memory: StageMemory
    memory_limit_bytes: int | None
    lookahead: int
    staleness: float
    share: float
    """Its time over the slowest stage's."""

    @property
    def time_s(self) -> float:
        """Forward and backward of one microbatch."""
        return self.forward_s + self.backward_s

    @property
    def memory_share(self) -> float:
        """What it holds as a part of its device's memory; 0 where that is not known."""
        return self.memory.total / self.memory_limit_bytes if self.memory_limit_bytes else 0.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """What to expect; speeds are of all replicas together."""

    images_per_s: float
    limit_images_per_s: float
    idle_percent: float
    slowest_over_mean: float


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """The plan of a pipeline and its copies."""

    setting: Setting
    cuts: tuple[int, ...]
    stages: tuple[StageForecast, ...]
    least: tuple[int, ...]
    """The least lookahead that costs no speed."""
    forecast: Forecast

    @property
    def fits(self) -> bool:
        """Whether every stage fits on its device, as far as its memory is known."""
        return self.fullest.memory_share <= 1.0

    @property
    def fullest(self) -> StageForecast:
        """The stage that needs most of its device's memory; where no device's is known, most."""
        return max(self.stages, key=lambda stage: (stage.memory_share, stage.memory.total))

    @property
    def most_memory_bytes(self) -> int:
        """The memory of the stage that needs most."""
        return max(int(stage.memory.total) for stage in self.stages)


def plan_pipeline(net: Net, setting: Setting) -> PipelinePlan | None:
    """Plan a pipeline; None where no cut fits in the devices' memory.

    Raises:
        UserError: as `choose_cuts`.
    """
    cuts = choose_cuts(net, setting)
    return None if cuts is None else _planned(net, setting, cuts)


def emptiest_plan(net: Net, setting: Setting) -> PipelinePlan:
    """Return the plan whose fullest stage has the most room on its device, fitting or not."""
    wanted = replace(setting, balance="memory", cuts=None)
    cuts = _wanted_cuts(net, wanted)
    assert cuts is not None, "balanced by memory there is always a cut"
    return _planned(net, wanted, cuts)


def _planned(net: Net, setting: Setting, cuts: tuple[int, ...]) -> PipelinePlan:
    times = times_of(net, setting, cuts)
    least = _least(net, setting, times)
    wanted = lookahead_of(setting, locked=net.locked, least=least)
    return PipelinePlan(
        setting,
        cuts,
        _stages(net, setting, cuts, times, wanted),
        least,
        _forecast(net, setting, times, wanted),
    )


def choose_cuts(net: Net, setting: Setting) -> tuple[int, ...] | None:
    """Return the first units of stages 1 ... J-1; None where nothing fits.

    Cuts that are given, or chosen by parameters or numbers of units, are returned, fitting or not.

    Raises:
        UserError: more stages than units, or cuts or lookaheads that do not suit the net.
    """
    cuts = _wanted_cuts(net, setting)
    must_fit = setting.cuts is None and setting.balance not in BLIND
    return None if cuts is None or (must_fit and not cuts_fit(net, setting, cuts)) else cuts


def _wanted_cuts(net: Net, setting: Setting) -> tuple[int, ...] | None:
    if setting.schedule == "least":
        return _cuts_for_least(net, setting)
    return cuts_with(net, setting, lookahead_of(setting, locked=net.locked, least=None))


def _cuts_for_least(net: Net, setting: Setting) -> tuple[int, ...] | None:
    """Return the cuts for the least lookahead, which depends on them."""
    by_memory = setting.balance == "memory"
    ahead = lookaheads("tight" if by_memory else "sequential", num_stages=setting.num_stages)
    cuts = cuts_with(net, setting, ahead)
    for _ in range(_LEAST_TRIES):
        if cuts is None:
            return None
        if cuts_fit(net, setting, cuts):
            return cuts
        found = _least(net, setting, times_of(net, setting, cuts))
        if setting.cuts is not None or all(a >= w for a, w in zip(ahead, found, strict=True)):
            return cuts
        ahead = tuple(map(max, ahead, found))
        cuts = cuts_with(net, setting, ahead)
    return None


def cuts_fit(net: Net, setting: Setting, cuts: Sequence[int]) -> bool:
    """Tell whether every stage fits on its device, as far as its memory is known."""
    limits = [device.memory_bytes for device in setting.devices]
    if all(limit is None for limit in limits):
        return True
    least = _least(net, setting, times_of(net, setting, cuts)) if setting.schedule == "least" else None
    wanted = lookahead_of(setting, locked=net.locked, least=least)
    sizes = net.memory(accumulation=setting.accumulation).stages(cuts, lookahead=wanted)
    return all(limit is None or size.total <= limit for size, limit in zip(sizes, limits, strict=True))


def times_of(net: Net, setting: Setting, cuts: Sequence[int]) -> tuple[StageTimes, ...]:
    """Return the stages' times, what updates wait for the average of the replicas' gradients in them."""
    times = net.stage_times(cuts, speeds=setting.speeds, accumulation=setting.accumulation)
    if setting.replicas == 1:
        return times
    links = replica_links(setting.devices, unknown=net.messages.link)
    return with_averaging(times, net, cuts, replicas=setting.replicas, links=links, speeds=setting.speeds)


def _least(net: Net, setting: Setting, times: Sequence[StageTimes]) -> tuple[int, ...]:
    links = links_of(setting.devices, unknown=net.messages.link)
    return least_lookahead(times, link=links, accumulation=setting.accumulation)


def _stages(
    net: Net,
    setting: Setting,
    cuts: Sequence[int],
    times: Sequence[StageTimes],
    lookahead: Sequence[int],
) -> tuple[StageForecast, ...]:
    memory = net.memory(accumulation=setting.accumulation).stages(cuts, lookahead=lookahead)
    slowest = max(t.busy_s for t in times)
    return tuple(
        StageForecast(
            index=j,
            device=setting.devices[j].name,
            first=first,
            end=end,
            units=net.names[first:end],
            parameters=sum(cost.parameters for cost in net.costs[first:end]),
            forward_s=times[j].forward_s,
            backward_s=times[j].backward_s,
            update_s=times[j].update_s,
            memory=memory[j],
            memory_limit_bytes=setting.devices[j].memory_bytes,
            lookahead=lookahead[j],
            staleness=0.0 if net.locked else lookahead[j] / setting.accumulation,
            share=times[j].busy_s / slowest,
        )
        for j, (first, end) in enumerate(stage_bounds(cuts, num_units=net.num_units))
    )


def cuts_with(net: Net, setting: Setting, lookahead: Sequence[int]) -> tuple[int, ...] | None:
    """Return the first units of stages 1 ... J-1; None where nothing fits with so many microbatches ahead.

    Raises:
        UserError: more stages than units, or given cuts that do not suit.
    """
    stages, units = setting.num_stages, net.num_units
    check_stages(units, stages)
    if setting.cuts is not None:
        return _checked_cuts(setting.cuts, num_stages=stages, num_units=units)
    if setting.balance == "uniform":
        return partition_uniform(units, stages)
    if setting.balance == "parameters":
        return partition([cost.parameters for cost in net.costs], stages)
    model = net.memory(accumulation=setting.accumulation)
    limits = [device.memory_bytes for device in setting.devices]
    if setting.balance == "memory":
        return cuts_by_memory(model, lookahead, limits=limits)
    return optimal_cuts(
        net.unit_times_s(accumulation=setting.accumulation, speeds=setting.speeds),
        num_stages=stages,
        crossing_s=net.crossing_s(links_of(setting.devices, unknown=net.messages.link)),
        overlapped=not net.locked,
        fits=fitting(model, lookahead, limits),
    )


def _checked_cuts(cuts: tuple[int, ...], *, num_stages: int, num_units: int) -> tuple[int, ...]:
    made = len(cuts) + 1
    if made == num_stages and (not cuts or cuts[-1] < num_units):
        return cuts
    raise UserError(
        f"{made - 1} cuts make {made} stages, and there are {num_stages} devices"
        if made != num_stages
        else f"{cuts[-1]} is past the last unit, {num_units - 1}",
        where="partition.cuts",
        hint=f"give {num_stages - 1} numbers from 1 to {num_units - 1}, each larger than the one before",
    )


def lookahead_of(setting: Setting, *, locked: bool, least: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return W, for exact pipelines the microbatches in flight but one; `least` is known after the cuts."""
    stages, k, schedule = setting.num_stages, setting.accumulation, setting.schedule
    if schedule == "gpipe":
        return (k - 1,) * stages
    if schedule == "1f1b":
        return tuple(min(k, stages - j) - 1 for j in range(stages))
    if schedule == "zero-bubble":
        # Weight gradients come late, and hold their microbatch until then.
        return (min(k, stages) - 1,) * stages
    if schedule == "least":
        return least or lookaheads("tight", num_stages=stages)
    if schedule == "auto":
        schedule = "sequential" if locked else "tight"
    try:
        return lookaheads(schedule, num_stages=stages)
    except ValueError as error:
        raise UserError(str(error), where="engine.schedule", hint=f"give a list of {stages}") from None


def _forecast(net: Net, setting: Setting, times: Sequence[StageTimes], lookahead: Sequence[int]) -> Forecast:
    exact = setting.schedule in EXACT_PIPELINES
    schedule = setting.schedule if exact else tuple(lookahead)
    links = links_of(setting.devices, unknown=net.messages.link)
    own = simulate(schedule, times, link=links, accumulation=setting.accumulation)
    images = net.batch_size * setting.replicas
    busy = [t.busy_s for t in times]
    return Forecast(
        images_per_s=own.microbatches_per_s * images,
        limit_images_per_s=own.limit_per_s * images,
        idle_percent=own.idle_percent,
        slowest_over_mean=max(busy) / (sum(busy) / len(busy)),
    )
