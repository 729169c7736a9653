"""A recipe's pipeline for `petractl simulate`: cut as it would be run, its times measured or from FLOPs."""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from petractl.errors import UserError

if TYPE_CHECKING:
    import torch

    from petractl.build import CheckedPlan
    from petractl.cli.machine import Machine
    from petractl.methods.family import MethodSpec
    from petractl.models.registry import BuiltModel
    from petractl.planning.entries import Entry
    from petractl.planning.memory import StageMemory
    from petractl.planning.net import Net
    from petractl.planning.simulated import Simulated
    from petractl.planning.times import Link, StageTimes

_INTERLEAVED = "interleaved-1f1b"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a recipe's times are from: measured here, or by FLOPs, on which devices."""

    flops: bool = False
    device_spec: str = ""
    speeds: tuple[float, ...] = ()
    fresh: bool = False


class RecipePipeline:
    """The pipeline of a recipe. With an interleaved pipeline of its own, two stages are one process."""

    def __init__(
        self,
        plan: "CheckedPlan",
        *,
        name: str,
        machine: "Machine",
        cost: "Callable[[MethodSpec], Net]",
        is_reversible: bool,
    ) -> None:
        self._plan = plan
        self._name = name
        self._is_reversible = is_reversible
        self._machine = machine
        self._net = functools.cache(cost)
        interleaved = plan.recipe.engine.schedule == _INTERLEAVED
        self._cuts = plan.cuts[1::2] if interleaved else plan.cuts
        self._own_chunks = plan.cuts if interleaved else None
        self.num_stages = len(self._cuts) + 1
        self.accumulation = plan.recipe.method.accumulation
        self.batch_size: int | None = plan.recipe.data.batch_size * plan.recipe.engine.replicas

    @property
    def title(self) -> str:
        """What it is."""
        stages = f"{self.num_stages} {'stage' if self.num_stages == 1 else 'stages'}"
        return f"{self._name}: {self._plan.recipe.model.name} in {stages}"

    @property
    def note(self) -> str:
        """Where its times come from."""
        return self._machine.clock(self._net(self._plan.method).clock)

    @property
    def is_nominal(self) -> bool:
        """Whether only proportions are meant."""
        return self._machine.by_flops and not self._machine.knows_tflops

    def own(self) -> "Entry":
        """Return the recipe's own method and schedule."""
        from petractl.planning.entries import make_entry

        engine, method = self._plan.recipe.engine, self._plan.method
        keep = f":{method.keep}" if method.keep else ""
        entry = make_entry("", method=method, schedule=engine.schedule, slack=engine.slack)
        what = entry.schedule if isinstance(entry.schedule, str) else list(entry.schedule)
        slack = f" slack={entry.slack}" if entry.slack else ""
        return replace(entry, label=f"{method.name}{keep}/{what}{slack}".replace(", ", ","))

    def problem(self, entry: "Entry") -> str:
        """Return why an entry cannot be run on this pipeline; "" where it can."""
        if entry.method.needs_reversible and not self._is_reversible:
            return f"{entry.method.name} needs a reversible unit, and {self._plan.recipe.model.name} has none"
        stages, units = 2 * self.num_stages, len(self._plan.names)
        if entry.schedule == _INTERLEAVED and stages > units:
            return f"{self.num_stages} processes of two stages need {stages} units, and there are {units}"
        return ""

    def times(self, entry: "Entry") -> "tuple[StageTimes, ...]":
        """Return the stages' times under a method, with the replicas' average in each update."""
        return self._averaged(entry, self._cuts, rounds=1)

    def chunks(self, entry: "Entry") -> "tuple[StageTimes, ...] | None":
        """Return the times of an interleaved pipeline's stages, two per process; None for all others."""
        cuts = self._chunk_cuts(entry) if entry.schedule == _INTERLEAVED else None
        return None if cuts is None else self._averaged(entry, cuts, rounds=2)

    def links(self, given: "Link | None") -> "Link | tuple[Link, ...]":
        """Return the links between the stages: the one given, else those of the devices."""
        from petractl.planning.net import links_of

        return given or links_of(self._machine.devices, unknown=self._net(self._plan.method).messages.link)

    def memory_bytes(self, entry: "Entry", result: "Simulated") -> tuple[int, ...]:
        """Return the most that each process holds."""
        model = self._net(entry.method).memory(accumulation=self.accumulation)
        if result.lookahead is not None:
            return tuple(int(stage.total) for stage in model.stages(self._cuts, lookahead=result.lookahead))
        if entry.schedule != _INTERLEAVED:
            ahead = [max(0, round(stage.kept) - 1) for stage in result.stages]
            return tuple(int(stage.total) for stage in model.stages(self._cuts, lookahead=ahead))
        from petractl.planning.exact_schedules import kept_by_stage

        cuts = self._chunk_cuts(entry)
        assert cuts is not None, "it was simulated"
        kept = kept_by_stage(_INTERLEAVED, num_places=self.num_stages, accumulation=self.accumulation)
        stages = model.stages(cuts, lookahead=[max(0, count - 1) for count in kept])
        pairs = zip(stages[: self.num_stages], stages[self.num_stages :], strict=True)
        return tuple(_together(*pair) for pair in pairs)

    def limits_bytes(self) -> tuple[int | None, ...]:
        """Return the memory of each device, None where it is not known."""
        return tuple(device.memory_bytes for device in self._machine.devices)

    def _chunk_cuts(self, entry: "Entry") -> tuple[int, ...] | None:
        from petractl.planning.interleaving import interleaved_cuts

        if self._own_chunks is not None:
            return self._own_chunks
        net = self._net(entry.method)
        return interleaved_cuts(net, accumulation=self.accumulation, speeds=self._machine.speeds)

    def _averaged(self, entry: "Entry", cuts: Sequence[int], *, rounds: int) -> "tuple[StageTimes, ...]":
        from petractl.planning.averaging import replica_links, with_averaging

        net, speeds = self._net(entry.method), self._machine.speeds * rounds
        return with_averaging(
            net.stage_times(cuts, speeds=speeds, accumulation=self.accumulation),
            net,
            cuts,
            replicas=self._plan.recipe.engine.replicas,
            links=replica_links(self._machine.devices * rounds, unknown=net.messages.link),
            speeds=speeds,
        )


def recipe_pipeline(
    recipe: str,
    *,
    overrides: Sequence[str],
    source: Source = Source(),
) -> RecipePipeline:
    """Return a recipe's pipeline.

    Raises:
        UserError: what `validate` would say, or devices that do not suit.
    """
    from petractl.planning.planned import refuse_unplanned
    from petractl.recipe import load_recipe

    loaded = load_recipe(recipe, overrides=list(overrides))
    hint = "`petractl bench` measures it"
    refuse_unplanned(loaded.recipe.method.name, where=f"{loaded.path}: method.name", hint=hint)
    from petractl import build

    plan = build.check(loaded)
    per_process = 2 if plan.recipe.engine.schedule == _INTERLEAVED else 1
    machine = _machine(source, -(-plan.num_stages // per_process), device=_device(plan))
    if not machine.by_flops:
        sys.stderr.write("measuring ...\n")
    model = _model(plan)

    def cost(method: "MethodSpec") -> "Net":
        return _cost(plan, model, method=method, machine=machine, fresh=source.fresh)

    from petractl.models.units import is_reversible

    reversible = any(map(is_reversible, model.units[:-1]))
    return RecipePipeline(plan, name=loaded.name, machine=machine, cost=cost, is_reversible=reversible)


def _model(plan: "CheckedPlan") -> "BuiltModel":
    """Return the net on the meta device."""
    import torch

    from petractl.build.parts import build_units

    channels = plan.info.channels
    with torch.device("meta"):
        return build_units(plan.recipe, classes=plan.classes, stem=plan.stem, channels=channels)


def _machine(source: Source, count: int, *, device: "torch.device") -> "Machine":
    from petractl.cli.machine import machine_of

    machine = machine_of(count, device_spec=source.device_spec, flops=source.flops, device=device.type)
    if not source.speeds:
        return machine
    if len(source.speeds) not in (1, count):
        raise UserError(
            f"has {len(source.speeds)} numbers for {count} stages", where="--speeds", hint="give one each"
        )
    given = source.speeds * count if len(source.speeds) == 1 else source.speeds
    return replace(machine, speeds=tuple(a * b for a, b in zip(machine.speeds, given, strict=True)))


def _cost(
    plan: "CheckedPlan", model: "BuiltModel", *, method: "MethodSpec", machine: "Machine", fresh: bool
) -> "Net":
    """Return what each unit costs, measured with the threads, precision and layout of the recipe."""
    import torch

    from petractl import build
    from petractl.build.parts import autocast_dtype
    from petractl.cli.machine import side_by_side
    from petractl.planning.costing import Clock, cost_net

    recipe, info = plan.recipe, plan.info
    clock = Clock()
    if not machine.by_flops:
        processes = len(machine.devices) * recipe.engine.replicas
        threads = build.num_threads(recipe, processes=processes)
        torch.set_num_threads(threads)
        clock = Clock(
            _device(plan),
            autocast_dtype(recipe),
            channels_last=recipe.model.memory_format == "channels-last",
            use_cache=not fresh,
            processes=side_by_side(processes, threads=threads),
        )
    return cost_net(
        model.units,
        model.names,
        method=method,
        input_shape=(info.channels, info.height, info.width),
        batch_size=recipe.data.batch_size,
        clock=clock,
        optimizer=recipe.optimizer.name,
        host_buffers=machine.holds_messages,
        number_formats=build.wire_formats(recipe),
    )


def _device(plan: "CheckedPlan") -> "torch.device":
    """Return where the recipe would run, of several devices the first."""
    import torch

    engine = plan.recipe.engine
    if engine.devices:
        return torch.device(engine.devices[0])
    if engine.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(engine.device)


def _together(first: "StageMemory", second: "StageMemory") -> int:
    """Return what a process with two stages holds: only one of them works at a time."""
    idle = min(first.working - first.parameters, second.working - second.parameters)
    return int(first.total + second.total - max(0, idle))
