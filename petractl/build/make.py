"""From a checked plan to a run that is ready to begin: net, data, stages, pipeline.

In several processes each one builds the whole net from the seed, so that its weights are those of one
process, and keeps the units of its own stages.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

import petractl
from petractl.build.layout import IN_PROCESS, Layout, device_of, exact_schedule
from petractl.build.parts import (
    autocast_dtype,
    build_units,
    data_places,
    eval_batch_size,
    make_updater,
    memory_format,
    num_threads,
    wire_formats,
)
from petractl.build.plan import CheckedPlan
from petractl.data import DataInfo, TrainLoader, open_data
from petractl.data.loader import EvalLoader
from petractl.engine import wire
from petractl.engine.assembly import assemble_stages, stage_bounds
from petractl.engine.carriers import Carrier, HostCarrier, MessageSize, NcclCarrier, Route, StagedCarrier
from petractl.engine.evaluation import PipelinedEvaluation, Placement, Scores, evaluate
from petractl.engine.links import Inbox, Outbox
from petractl.engine.messages import Activation
from petractl.engine.pipeline import InProcessPipeline, Pipeline
from petractl.engine.process_pipeline import Links, ProcessPipeline
from petractl.engine.replicas import Reducer, average_buffers
from petractl.engine.schedule import num_updates
from petractl.engine.stage import Stage
from petractl.engine.trainer import EpochLength, EvaluationData
from petractl.engine.world import Alone, World, agree
from petractl.events import PlanMade
from petractl.methods.evaluation import Evaluator
from petractl.methods.family import Keep
from petractl.methods.randomness import derive_seed
from petractl.models.units import Network
from petractl.models.weights import load_weights
from petractl.planning.stages import stage_plans
from petractl.recipe.schema import Recipe

if TYPE_CHECKING:
    from petractl.engine.exact import ExactPipeline

_EVALUATION_AHEAD = 4  # batches on their way to a slower stage


@dataclass(frozen=True, slots=True)
class Built:
    """A run ready to begin, as this process sees it.

    `network` has the units that live here, under their names in the whole net. `training_data` is where
    images enter. `plan` is complete on rank 0.
    """

    network: nn.Module
    pipeline: Pipeline
    world: World | Alone
    training_data: TrainLoader | None
    length: EpochLength
    evaluate: Callable[[], Scores]
    placement: Placement
    plan: PlanMade
    left_weights: tuple[str, ...]
    settle: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class _DataHere:
    """The data as far as this process has them, and what all processes know of them."""

    info: DataInfo
    training: TrainLoader | None
    evaluation: EvalLoader | None
    length: EpochLength
    eval_batches: int


def build(plan: CheckedPlan, *, starting_weights: bool = True, world: World | None = None) -> Built:
    """Make the net, the data and the pipeline; in several processes, this process's part of them.

    Raises:
        UserError: the data or the starting weights are not what they should be.
        RunError: the processes of the world do not fit together.
    """
    if plan.layout.mode == IN_PROCESS:
        return _build_alone(plan, starting_weights=starting_weights)
    assert world is not None, "a run in processes needs its world"
    return _build_part(plan, world, starting_weights=starting_weights)


def build_network(plan: CheckedPlan) -> Network:
    """Make the net with its starting weights, a function of the seed alone, on the CPU."""
    torch.manual_seed(derive_seed(plan.recipe.run.seed, "weights"))
    model = build_units(plan.recipe, classes=plan.classes, stem=plan.stem, channels=plan.info.channels)
    network = Network(model.units)
    return network.to(memory_format=memory_format(plan.recipe))


def evaluation_data(plan: CheckedPlan) -> EvaluationData:
    """Open the test data alone."""
    recipe = plan.recipe
    data = open_data(recipe.data.name, seed=recipe.run.seed, test_only=True, **data_places(recipe))
    return data.eval_loader(batch_size=eval_batch_size(recipe), workers=recipe.data.workers)


def evaluation_placement(plan: CheckedPlan) -> Placement:
    """Return where and in which precision the net is evaluated."""
    return _placement(plan.recipe, plan.device)


def _placement(recipe: Recipe, device: torch.device) -> Placement:
    return Placement(device, memory_format(recipe), autocast_dtype(recipe))


def _build_alone(plan: CheckedPlan, *, starting_weights: bool) -> Built:
    recipe = plan.recipe
    world = Alone()
    data = _open_data(plan, world)
    network, left = _weights(plan, starting_weights=starting_weights)
    network.to(plan.device)
    placement = _placement(recipe, plan.device)
    pipeline = InProcessPipeline(
        _stages(plan, network, data, device=plan.device, wanted=None),
        lookahead=plan.lookahead,
        accumulation=recipe.method.accumulation,
        number_formats=wire_formats(recipe),
    )
    assert data.evaluation is not None
    return Built(
        network=network,
        pipeline=pipeline,
        world=world,
        training_data=data.training,
        length=data.length,
        evaluate=partial(evaluate, network, data.evaluation, placement=placement),
        placement=placement,
        plan=_plan_event(plan, data, [str(plan.device)], threads=num_threads(recipe)),
        left_weights=left,
    )


def _build_part(plan: CheckedPlan, world: World, *, starting_weights: bool) -> Built:
    recipe, seat = plan.recipe, world.seat
    network, left = _weights(plan, starting_weights=starting_weights)
    data = _open_data(plan, world)
    wanted = plan.layout.stages_of(seat.place)
    bounds = stage_bounds(plan.cuts, num_units=len(plan.names))
    here = [n for j in wanted for n in range(*bounds[j])]
    part = _NetworkPart({n: network.units[n] for n in here}).to(world.device)
    reducer = _reducer(part, world)
    wiring = Wiring(plan, world)
    wiring.agree()
    pipeline: Pipeline
    if exact_schedule(recipe):
        pipeline = _exact_pipeline(plan, network, data, world, reducer)
    else:
        (stage,) = _stages(plan, network, data, device=world.device, wanted=wanted)
        stage.reducer, stage.replica, stage.replicas = reducer, seat.replica, seat.num_replicas
        pipeline = ProcessPipeline(
            stage,
            links=wiring.training_links(),
            lookahead=plan.lookahead[stage.index],
            accumulation=recipe.method.accumulation,
            stall_timeout_s=recipe.engine.stall_timeout,
        )
    placement = _placement(recipe, world.device)
    devices = world.gather_all(str(world.device))
    return Built(
        network=part,
        pipeline=pipeline,
        world=world,
        training_data=data.training,
        length=data.length,
        evaluate=wiring.evaluation(part, data, placement),
        placement=placement,
        plan=_plan_event(plan, data, devices, threads=torch.get_num_threads(), backend=world.backend),
        left_weights=left,
        settle=partial(_settle, part, world),
    )


class _NetworkPart(nn.Module):
    """Some units of a net under the names that they have in the whole of it (`units.3...`)."""

    def __init__(self, units: dict[int, nn.Module]) -> None:
        super().__init__()
        self.units = nn.ModuleDict({str(n): unit for n, unit in units.items()})

    def range(self, first: int, end: int) -> list[nn.Module]:
        """Return the units `first` ... `end` - 1."""
        return [self.units[str(n)] for n in range(first, end)]


def _settle(part: nn.Module, world: World) -> None:
    """Make the running statistics of all replicas one."""
    if world.replicas is not None:
        average_buffers(part.buffers(), group=world.replicas)


def _reducer(part: _NetworkPart, world: World) -> Reducer | None:
    if world.replicas is None:
        return None
    units = [[p for p in unit.parameters() if p.requires_grad] for unit in part.units.values()]
    return Reducer(units, group=world.replicas)


def _weights(plan: CheckedPlan, *, starting_weights: bool) -> tuple[Network, tuple[str, ...]]:
    network = build_network(plan)
    left: tuple[str, ...] = ()
    if plan.recipe.model.weights and starting_weights:
        left = load_weights(network, Path(plan.recipe.model.weights)).left
    return network, left


def _open_data(plan: CheckedPlan, world: World | Alone) -> _DataHere:
    """Open the data where images enter; everyone learns how long an epoch is."""
    recipe, seat = plan.recipe, world.seat
    training, evaluation, info = None, None, plan.info
    mine: tuple[int, int, int] | None = None
    if seat.is_first:
        data = open_data(recipe.data.name, seed=recipe.run.seed, **data_places(recipe))
        info = data.info
        training = data.train_loader(
            batch_size=recipe.data.batch_size,
            steps_per_epoch=recipe.data.steps_per_epoch,
            augment=recipe.data.augment,
            drop_last=recipe.data.drop_last,
            workers=recipe.data.workers,
            replica=seat.replica,
            replicas=seat.num_replicas,
        )
        evaluation = data.eval_loader(
            batch_size=eval_batch_size(recipe),
            workers=recipe.data.workers,
            replica=seat.replica,
            replicas=seat.num_replicas,
        )
        mine = (training.microbatches, training.steps_per_epoch, len(evaluation))
    told = world.gather_all(mine)[seat.replica * seat.num_places] if isinstance(world, World) else mine
    assert told is not None
    microbatches, rows, batches = told
    return _DataHere(info, training, evaluation, EpochLength(microbatches, rows), batches)


def _stages(
    plan: CheckedPlan, network: Network, data: _DataHere, *, device: torch.device, wanted: range | None
) -> list[Stage]:
    recipe = plan.recipe
    return assemble_stages(
        list(network.units),
        names=plan.names,
        cuts=plan.cuts,
        method=plan.method,
        make_updater=partial(make_updater, recipe, data.length.rows),
        loss=partial(functional.cross_entropy, label_smoothing=recipe.training.label_smoothing),
        seed=derive_seed(recipe.run.seed, "units"),
        device=device,
        statistics_in_forward=recipe.method.bn_statistics == "forward",
        autocast_dtype=autocast_dtype(recipe),
        wanted=wanted,
    )


def _exact_pipeline(
    plan: CheckedPlan, network: Network, data: _DataHere, world: World, reducer: Reducer | None
) -> "ExactPipeline":
    # Here, since torch's pipelining doubles the time of every start, and few runs need it.
    from petractl.engine.exact import ExactPipeline
    from petractl.engine.exact_stage import ExactPart

    recipe, seat = plan.recipe, world.seat
    bounds = stage_bounds(plan.cuts, num_units=len(plan.names))
    parts = []
    for j in plan.layout.stages_of(seat.place):
        units = range(*bounds[j])
        named = [(f"units.{n}.{name}", p) for n in units for name, p in network.units[n].named_parameters()]
        evaluators = [
            Evaluator(
                network.units[n],
                index=n,
                name=plan.names[n],
                seed=derive_seed(recipe.run.seed, "units"),
                device=world.device,
                autocast_dtype=autocast_dtype(recipe),
            )
            for n in units
        ]
        updater = make_updater(recipe, data.length.rows, [(name, p) for name, p in named if p.requires_grad])
        parts.append(ExactPart(index=j, evaluators=evaluators, updater=updater))
    return ExactPipeline(
        parts=parts,
        loss=partial(functional.cross_entropy, label_smoothing=recipe.training.label_smoothing),
        schedule=exact_schedule(recipe),
        accumulation=recipe.method.accumulation,
        seat=seat,
        group=world.pipeline,
        control=world.control,
        ranks=[world.rank_of(place) for place in range(seat.num_places)],
        device=world.device,
        reducer=reducer,
        stall_timeout_s=recipe.engine.stall_timeout,
    )


class Wiring:
    """The links of a process with its neighbours, for training and for evaluation."""

    def __init__(self, plan: CheckedPlan, world: World, *, tag: int = 0) -> None:
        self._plan = plan
        self._world = world
        self._tag = tag
        self._formats = wire_formats(plan.recipe)

    def agree(self) -> None:
        """Check that all processes have the same versions and expect messages of the same sizes."""
        facts = {"torch": torch.__version__, "petractl": petractl.__version__}
        for place in range(1, self._world.seat.num_places):
            for upwards in (True, False):
                way = f"{place - 1} to {place}" if upwards else f"{place} to {place - 1}"
                facts[f"the size of a message from stage {way}"] = str(self._size(place, upwards=upwards))
        agree(self._world, facts)

    def training_links(self) -> Links:
        """Return the links of training."""
        place, last = self._world.seat.place, self._world.seat.num_places - 1
        me, tag = self._world.me, self._tag
        below, above = place - 1, place + 1
        links = Links()
        if place > 0:
            peer = self._world.neighbour(below)
            links = Links(
                from_below=Inbox(self._carrier(below, upwards=True, tag=tag), owner=me, peer=peer),
                to_below=Outbox(self._carrier(below, upwards=False, tag=tag), owner=me, peer=peer),
            )
        if place < last:
            peer = self._world.neighbour(above)
            links = Links(
                from_below=links.from_below,
                to_below=links.to_below,
                to_above=Outbox(self._carrier(above, upwards=True, tag=tag), owner=me, peer=peer),
                from_above=Inbox(self._carrier(above, upwards=False, tag=tag), owner=me, peer=peer),
            )
        return links

    def evaluation(self, part: "_NetworkPart", data: _DataHere, placement: Placement) -> Callable[[], Scores]:
        """Return the evaluation through the stages of this process, of which an interleaved pipeline has two."""
        world = self._world
        bounds = stage_bounds(self._plan.cuts, num_units=len(self._plan.names))
        stages = [
            (self._evaluation_links(j, number), part.range(*bounds[j]))
            for number, j in enumerate(self._plan.layout.stages_of(world.seat.place))
        ]
        return PipelinedEvaluation(
            stages,
            world=world,
            batches=data.evaluation,
            num_batches=data.eval_batches,
            placement=placement,
            timeout_s=self._plan.recipe.engine.stall_timeout,
        )

    def _evaluation_links(
        self, stage: int, number: int
    ) -> tuple[Inbox[Activation] | None, Outbox[Activation] | None]:
        places, me = self._world.seat.num_places, self._world.me
        tag = self._tag + 1 + number
        inbox: Inbox[Activation] | None = None
        outbox: Outbox[Activation] | None = None
        if stage > 0:
            below = (stage - 1) % places
            wrapped = tag - 1 if below > self._world.seat.place else tag
            inbox = Inbox(
                self._evaluation_carrier(below, stage, tag=wrapped),
                owner=me,
                peer=self._world.neighbour(below),
            )
        if stage < self._plan.num_stages - 1:
            above = (stage + 1) % places
            outbox = Outbox(
                self._evaluation_carrier(above, stage + 1, tag=tag),
                owner=me,
                peer=self._world.neighbour(above),
                limit=_EVALUATION_AHEAD,
            )
        return inbox, outbox

    def _evaluation_carrier(self, place: int, stage: int, *, tag: int) -> Carrier:
        # Exact, whatever the recipe's format: an accuracy is that of the net, not of the network.
        size = self._size(
            stage, upwards=True, samples=eval_batch_size(self._plan.recipe), number_format="float32"
        )
        return self._make(place, size, upwards=True, tag=tag)

    def _carrier(self, place: int, *, upwards: bool, tag: int) -> Carrier:
        stage = max(place, self._world.seat.place)
        return self._make(place, self._size(stage, upwards=upwards), upwards=upwards, tag=tag)

    def _make(self, place: int, size: MessageSize, *, upwards: bool, tag: int) -> Carrier:
        world = self._world
        group = world.forward if upwards else world.backward
        device = world.device
        if world.backend == "nccl":
            headers = world.forward_headers if upwards else world.backward_headers
            route = Route(world.rank_of(place), group, tag, headers)
            return NcclCarrier(route, size, upwards=upwards, device=device)
        route = Route(world.rank_of(place), group, tag)
        if device.type == "cuda":
            return StagedCarrier(route, size, upwards=upwards, device=device)
        return HostCarrier(route, size, upwards=upwards)

    def _size(self, stage: int, *, upwards: bool, samples: int = 0, number_format: str = "") -> MessageSize:
        """Return the size of a message over the cut below `stage`."""
        plan = self._plan
        samples = samples or plan.recipe.data.batch_size
        unit = plan.cuts[stage - 1] - 1
        cost = plan.costs[unit]
        streams = [
            ((samples, *shape), dtype)
            for shape, dtype in zip(cost.output_shapes, cost.output_dtypes, strict=True)
        ]
        rebuilt = plan.keepings[unit].keep is Keep.NOTHING
        down = [*streams, *streams] if rebuilt else streams
        tensors = [*streams, ((samples,), torch.int64)] if upwards else down
        number_format = number_format or self._formats[0 if upwards else 1]
        payload = wire.payload_bytes(tensors, number_format=number_format)
        return MessageSize(8 * wire.header_words(len(tensors)), payload, number_format)


def _plan_event(
    plan: CheckedPlan, data: _DataHere, devices: list[str], *, threads: int, backend: str = ""
) -> PlanMade:
    recipe, k, layout = plan.recipe, plan.recipe.method.accumulation, plan.layout
    return PlanMade(
        stages=stage_plans(
            names=plan.names,
            kept=plan.keepings,
            costs=plan.costs,
            cuts=plan.cuts,
            lookahead=plan.lookahead,
            accumulation=k,
            devices=_stage_devices(layout, devices, plan.num_stages),
        ),
        microbatch_size=recipe.data.batch_size,
        accumulation=k,
        samples_per_update=recipe.data.batch_size * k * layout.num_replicas,
        steps_per_epoch=data.length.rows,
        updates_per_epoch=num_updates(num_microbatches=data.length.rows, accumulation=k),
        epochs=recipe.training.epochs,
        train_samples=data.info.train_samples,
        val_samples=data.info.val_samples,
        parameters=sum(cost.parameters for cost in plan.costs),
        schedule=_schedule_words(plan),
        method=plan.method.name + (f" (keep = {plan.method.keep})" if plan.method.keep else ""),
        precision=recipe.engine.precision,
        device=", ".join(dict.fromkeys(devices)),
        threads=threads,
        replicas=layout.num_replicas,
        processes=layout.num_processes,
        backend=backend,
    )


def _stage_devices(layout: Layout, devices: list[str], num_stages: int) -> list[str]:
    places = layout.num_places
    if layout.mode == IN_PROCESS:
        return devices * num_stages
    return [", ".join(dict.fromkeys(devices[j % places :: places])) for j in range(num_stages)]


def _schedule_words(plan: CheckedPlan) -> str:
    schedule, slack = plan.recipe.engine.schedule, plan.recipe.engine.slack
    if schedule == "auto":
        schedule = "sequential" if plan.method.locked else "tight"
    if not isinstance(schedule, str):
        return str(list(schedule))
    return f"tight + slack {slack}" if slack and schedule == "tight" else schedule


def process_device(plan: CheckedPlan, *, rank: int, local_rank: int) -> torch.device:
    """Return the device of a process of a run in processes."""
    return device_of(plan.recipe, plan.layout, rank=rank, local_rank=local_rank)
