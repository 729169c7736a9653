"""One pipeline, planned: where to cut, what each stage then takes and holds, and what to expect of it.

The cuts are exact optima of what is to be balanced; the predictions are the simulator's, with the schedule's
own waiting. Compared with are plain model parallelism (backprop, one microbatch at a time, the same cuts)
and the best exact pipeline (backprop, `EXACT_MICROBATCHES` per stage and update, its own best cuts).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from petractl.engine.assembly import stage_bounds
from petractl.engine.schedule import lookaheads
from petractl.errors import UserError
from petractl.planning.devices import DeviceSpec
from petractl.planning.least import least_lookahead
from petractl.planning.memory import MemoryModel, StageMemory, cuts_by_memory
from petractl.planning.net import Net, links_of
from petractl.planning.optimal import Mask, optimal_cuts, stage_times
from petractl.planning.partition import check_stages, partition, partition_uniform
from petractl.planning.simulated import Simulated
from petractl.planning.simulation import simulate
from petractl.planning.times import Link

BALANCES = ("time", "flops", "memory", "parameters", "uniform")
EXACT_PIPELINES = ("gpipe", "1f1b", "zero-bubble")
EXACT_MICROBATCHES = 4
"""Microbatches per stage and update of the exact pipelines that are compared with."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How a net is to be run: the stages' devices with their speeds, and the schedule.

    `schedule` is a name of `engine.schedule`, "least", or the lookaheads themselves. `cuts` given are taken
    as they are.
    """

    devices: tuple[DeviceSpec, ...]
    speeds: tuple[float, ...]
    schedule: str | tuple[int, ...] = "tight"
    accumulation: int = 1
    balance: str = "time"
    cuts: tuple[int, ...] | None = None

    @property
    def num_stages(self) -> int:
        """J."""
        return len(self.devices)


@dataclass(frozen=True, slots=True)
class StageForecast:
    """One stage of a plan. Times are of one microbatch, `update_s` of one update."""

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


@dataclass(frozen=True, slots=True)
class Forecast:
    """What to expect of a pipeline; speeds are of one replica."""

    images_per_s: float
    limit_images_per_s: float
    idle_percent: float
    slowest_over_mean: float
    model_parallel_images_per_s: float
    exact_images_per_s: float
    exact_schedule: str
    exact_accumulation: int

    @property
    def speedup_over_model_parallel(self) -> float:
        """Over plain model parallelism with backprop."""
        return self.images_per_s / self.model_parallel_images_per_s

    @property
    def speedup_over_exact(self) -> float:
        """Over the fastest exact pipeline."""
        return self.images_per_s / self.exact_images_per_s


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """The plan of one pipeline."""

    setting: Setting
    cuts: tuple[int, ...]
    stages: tuple[StageForecast, ...]
    least: tuple[int, ...]
    """The least lookahead that costs no speed."""
    forecast: Forecast

    @property
    def fits(self) -> bool:
        """Whether every stage fits on its device, as far as its memory is known."""
        return all(
            s.memory_limit_bytes is None or s.memory.total <= s.memory_limit_bytes for s in self.stages
        )

    @property
    def most_memory_bytes(self) -> int:
        """The memory of the stage that needs most."""
        return max(int(stage.memory.total) for stage in self.stages)


def plan_pipeline(net: Net, setting: Setting) -> PipelinePlan | None:
    """Plan a pipeline; None where no cut fits in the devices' memory. Given cuts are taken, fitting or not.

    Raises:
        UserError: more stages than units, or cuts or lookaheads that do not suit the net.
    """
    cuts = choose_cuts(net, setting)
    if cuts is None:
        return None
    links = links_of(setting.devices)
    times = net.stage_times(cuts, speeds=setting.speeds)
    k = setting.accumulation
    least = least_lookahead(times, link=links, accumulation=k)
    wanted = lookahead_of(setting, locked=net.locked, least=least)
    memory = net.memory(accumulation=k).stages(cuts, lookahead=wanted)
    slowest = max(t.busy_s for t in times)
    stages = tuple(
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
            lookahead=wanted[j],
            staleness=0.0 if net.locked else wanted[j] / k,
            share=times[j].busy_s / slowest,
        )
        for j, (first, end) in enumerate(stage_bounds(cuts, num_units=net.num_units))
    )
    return PipelinePlan(setting, cuts, stages, least, _forecast(net, setting, cuts, links, wanted))


def choose_cuts(net: Net, setting: Setting) -> tuple[int, ...] | None:
    """Return the first units of stages 1 ... J-1; None where nothing fits.

    Raises:
        UserError: more stages than units, or given cuts that do not suit.
    """
    stages, units = setting.num_stages, net.num_units
    check_stages(units, stages)
    if setting.cuts is not None:
        if len(setting.cuts) != stages - 1 or (setting.cuts and setting.cuts[-1] >= units):
            made = len(setting.cuts) + 1
            raise UserError(
                f"{made - 1} cuts make {made} stages, and there are {stages} devices"
                if made != stages
                else f"{setting.cuts[-1]} is past the last unit, {units - 1}",
                where="partition.cuts",
                hint=f"give {stages - 1} numbers from 1 to {units - 1}, each larger than the one before",
            )
        return setting.cuts
    if setting.balance == "uniform":
        return partition_uniform(units, stages)
    if setting.balance == "parameters":
        return partition([cost.parameters for cost in net.costs], stages)
    # The least lookahead is known when the cuts are; without latency it is at most the tight one.
    wanted = lookahead_of(setting, locked=net.locked, least=None)
    model = net.memory(accumulation=setting.accumulation)
    if setting.balance == "memory":
        return cuts_by_memory(model, wanted)
    return optimal_cuts(
        net.unit_times_s(accumulation=setting.accumulation, speeds=setting.speeds),
        num_stages=stages,
        crossing_s=net.crossing_s(links_of(setting.devices)),
        overlapped=not net.locked,
        fits=_fitting(model, wanted, [device.memory_bytes for device in setting.devices]),
    )


def lookahead_of(setting: Setting, *, locked: bool, least: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return W, for exact pipelines the microbatches in flight but one; `least` is known after the cuts."""
    stages, k, schedule = setting.num_stages, setting.accumulation, setting.schedule
    if schedule == "gpipe":
        return (k - 1,) * stages
    if schedule in ("1f1b", "zero-bubble"):
        return tuple(min(k, stages - j) - 1 for j in range(stages))
    if schedule == "least":
        return least or lookaheads("tight", num_stages=stages)
    if schedule == "auto":
        schedule = "sequential" if locked else "tight"
    try:
        return lookaheads(schedule, num_stages=stages)
    except ValueError as error:
        raise UserError(str(error), where="engine.schedule", hint=f"give a list of {stages}") from None


def _fitting(
    model: MemoryModel, lookahead: Sequence[int], limits: Sequence[int | None]
) -> Callable[[int], Mask] | None:
    """Return what tells which stages fit, None where no device's memory is known."""
    if all(limit is None for limit in limits):
        return None

    def fits(stage: int) -> Mask:
        limit = limits[stage]
        return model.bytes_of(lookahead, stage) <= (float("inf") if limit is None else limit)

    return fits


def _forecast(
    net: Net, setting: Setting, cuts: Sequence[int], links: Sequence[Link], lookahead: Sequence[int]
) -> Forecast:
    batch, k = net.batch_size, setting.accumulation
    times = net.stage_times(cuts, speeds=setting.speeds)
    exact = setting.schedule in EXACT_PIPELINES
    schedule = setting.schedule if exact else "sequential" if net.locked else tuple(lookahead)
    own = simulate(schedule, times, link=links, accumulation=k)
    plain = simulate("sequential", net.stage_times(cuts, speeds=setting.speeds, backprop=True), link=links)
    best = best_exact(net, setting, links)
    busy = [t.busy_s for t in times]
    return Forecast(
        images_per_s=own.microbatches_per_s * batch,
        limit_images_per_s=own.limit_per_s * batch,
        idle_percent=own.idle_percent,
        slowest_over_mean=max(busy) / (sum(busy) / len(busy)),
        model_parallel_images_per_s=plain.microbatches_per_s * batch,
        exact_images_per_s=best.microbatches_per_s * batch,
        exact_schedule=best.schedule,
        exact_accumulation=best.accumulation,
    )


def best_exact(net: Net, setting: Setting, links: Sequence[Link]) -> Simulated:
    """Return the fastest exact pipeline on the same devices, cut for backprop's times."""
    stages = setting.num_stages
    backprop = replace(net, times=net.backprop_times)
    cuts = optimal_cuts(
        backprop.unit_times_s(accumulation=setting.accumulation, speeds=setting.speeds),
        num_stages=stages,
        crossing_s=net.crossing_s(links),
        overlapped=False,
    )
    assert cuts is not None, "no limit of memory"
    times = net.stage_times(cuts, speeds=setting.speeds, backprop=True)
    accumulation = max(setting.accumulation, EXACT_MICROBATCHES * stages)
    found = [simulate(name, times, link=links, accumulation=accumulation) for name in EXACT_PIPELINES]
    return max(found, key=lambda result: result.microbatches_per_s)


def slowest_stage_s(net: Net, num_stages: int, *, speed: float) -> float:
    """Return the time of the slowest stage of the best cut of so many equal devices."""
    times = net.unit_times_s(accumulation=1, speeds=(speed,))
    cuts = optimal_cuts(times, num_stages=num_stages)
    assert cuts is not None, "no limit of memory"
    return max(stage_times(times, cuts))
