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

from petractl.build.blocks import AuxiliaryPart, make_auxiliaries
from petractl.build.layout import IN_PROCESS, Layout, device_of, exact_schedule
from petractl.build.parts import (
    autocast_dtype,
    build_units,
    data_request,
    eval_batch_size,
    make_updater,
    memory_format,
    num_threads,
    num_workers,
    wire_formats,
)
from petractl.build.plan import CheckedPlan
from petractl.build.wiring import Wiring
from petractl.data import DataInfo, TrainLoader, open_data
from petractl.data.loader import EvalLoader
from petractl.engine.assembly import assemble_stages, stage_bounds
from petractl.engine.block_assembly import Auxiliaries, assemble_blocks
from petractl.engine.block_stage import BlockStage
from petractl.engine.evaluation import Evaluation, PipelinedEvaluation, Placement, evaluate
from petractl.engine.pipeline import InProcessPipeline, Pipeline
from petractl.engine.process_pipeline import ProcessPipeline
from petractl.engine.replicas import Reducer, average_buffers
from petractl.engine.schedule import num_updates
from petractl.engine.stage import Stage
from petractl.engine.trainer import EpochLength, EvaluationData
from petractl.engine.world import Alone, Launch, World
from petractl.estimator import LOCAL
from petractl.events import PlanMade
from petractl.methods.block import Loss
from petractl.methods.evaluation import Evaluator
from petractl.methods.randomness import derive_seed
from petractl.models.units import Network
from petractl.models.weights import load_weights
from petractl.planning.stages import stage_plans
from petractl.recipe.schema import Recipe

if TYPE_CHECKING:
    from petractl.engine.exact import ExactPipeline


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
    evaluate: Evaluation
    placement: Placement
    plan: PlanMade
    left_weights: tuple[str, ...]
    auxiliary: nn.Module | None = None
    """The auxiliary nets that learn here, under their names in checkpoints."""
    settle: Callable[[], None] = lambda: None

    def tensor_names(self) -> frozenset[str]:
        """Return the names of all parameters and buffers that live here, as checkpoints have them."""
        modules = [self.network] if self.auxiliary is None else [self.network, self.auxiliary]
        shared = {name for module in modules for name, _ in module.named_parameters()}
        return frozenset(shared.union(*(module.state_dict() for module in modules)))


@dataclass(frozen=True, slots=True)
class DataHere:
    """The data as far as this process has them, and what all processes know of them."""

    info: DataInfo
    training: TrainLoader | None
    evaluation: EvalLoader | None
    length: EpochLength
    eval_batches: int


def build(
    plan: CheckedPlan,
    *,
    starting_weights: bool = True,
    world: World | None = None,
    data: DataHere | None = None,
) -> Built:
    """Make the net, the data and the pipeline; in several processes, this process's part of them.

    `data` are those of another build of the same data, which are then not opened again.

    Raises:
        UserError: the data or the starting weights are not what they should be.
        RunError: the processes of the world do not fit together.
    """
    if plan.layout.mode == IN_PROCESS:
        data = data or open_data_here(plan, Alone())
        return _build_alone(plan, data, starting_weights=starting_weights)
    assert world is not None, "a run in processes needs its world"
    data = data or open_data_here(plan, world)
    return _build_part(plan, data, world, starting_weights=starting_weights)


def build_network(plan: CheckedPlan) -> Network:
    """Make the net with its starting weights, a function of the seed alone, on the CPU."""
    torch.manual_seed(derive_seed(plan.recipe.run.seed, "weights"))
    model = build_units(plan.recipe, classes=plan.classes, stem=plan.stem, channels=plan.info.channels)
    network = Network(model.units)
    return network.to(memory_format=memory_format(plan.recipe))


def evaluation_data(plan: CheckedPlan) -> EvaluationData:
    """Open the test data alone."""
    recipe = plan.recipe
    data = open_data(recipe.data.name, seed=recipe.run.seed, test_only=True, **data_request(recipe))
    workers = num_workers(recipe, decodes=data.decodes, device=plan.device)
    return data.eval_loader(batch_size=eval_batch_size(recipe), workers=workers, device=plan.device)


def evaluation_placement(plan: CheckedPlan) -> Placement:
    """Return where and in which precision the net is evaluated."""
    return _placement(plan.recipe, plan.device)


def _placement(recipe: Recipe, device: torch.device) -> Placement:
    return Placement(device, memory_format(recipe), autocast_dtype(recipe))


def _build_alone(plan: CheckedPlan, data: DataHere, *, starting_weights: bool) -> Built:
    recipe = plan.recipe
    network, left = _weights(plan, starting_weights=starting_weights)
    network.to(plan.device)
    placement = _placement(recipe, plan.device)
    auxiliaries = _auxiliaries(plan, network, device=plan.device, wanted=range(plan.num_stages))
    pipeline = InProcessPipeline(
        _stages(plan, network, data, auxiliaries, device=plan.device, wanted=None),
        lookahead=plan.lookahead,
        accumulation=recipe.method.accumulation,
        number_formats=wire_formats(recipe),
    )
    assert data.evaluation is not None
    return Built(
        network=network,
        pipeline=pipeline,
        world=Alone(),
        training_data=data.training,
        length=data.length,
        evaluate=partial(evaluate, network, data.evaluation, placement=placement),
        placement=placement,
        plan=_plan_event(plan, data, [str(plan.device)], threads=num_threads(recipe)),
        left_weights=left,
        auxiliary=_auxiliary_part(plan, auxiliaries),
    )


def _build_part(plan: CheckedPlan, data: DataHere, world: World, *, starting_weights: bool) -> Built:
    recipe, seat = plan.recipe, world.seat
    network, left = _weights(plan, starting_weights=starting_weights)
    wanted = plan.layout.stages_of(seat.place)
    bounds = stage_bounds(plan.cuts, num_units=len(plan.names))
    here = [n for j in wanted for n in range(*bounds[j])]
    part = _NetworkPart({n: network.units[n] for n in here}).to(world.device)
    auxiliaries = _auxiliaries(plan, network, device=world.device, wanted=wanted)
    auxiliary = _auxiliary_part(plan, auxiliaries)
    reducer = _reducer(part, auxiliary, world)
    wiring = Wiring(plan, world)
    wiring.agree()
    pipeline: Pipeline
    if exact_schedule(recipe):
        pipeline = _exact_pipeline(plan, network, data, world, reducer)
    else:
        (stage,) = _stages(plan, network, data, auxiliaries, device=world.device, wanted=wanted)
        stage.reducer, stage.replica, stage.replicas = reducer, seat.replica, seat.num_replicas
        pipeline = ProcessPipeline(
            stage,
            links=wiring.training_links(),
            lookahead=plan.lookahead[stage.index],
            lookahead_above=None if seat.is_last else plan.lookahead[stage.index + 1],
            accumulation=recipe.method.accumulation,
            stall_timeout_s=recipe.engine.stall_timeout,
            device=world.device,
            name=str(world.me),
        )
    placement = _placement(recipe, world.device)
    devices = world.gather_all(str(world.device))
    return Built(
        network=part,
        pipeline=pipeline,
        world=world,
        training_data=data.training,
        length=data.length,
        evaluate=_evaluation(plan, part, wiring, data, placement, world),
        placement=placement,
        plan=_plan_event(plan, data, devices, threads=torch.get_num_threads(), backend=world.backend),
        left_weights=left,
        auxiliary=auxiliary,
        settle=partial(_settle, part, auxiliary, world),
    )


def _evaluation(
    plan: CheckedPlan,
    part: "_NetworkPart",
    wiring: Wiring,
    data: DataHere,
    placement: Placement,
    world: World,
) -> PipelinedEvaluation:
    bounds = stage_bounds(plan.cuts, num_units=len(plan.names))
    return PipelinedEvaluation(
        [
            (wiring.evaluation_links(j, number), part.range(*bounds[j]))
            for number, j in enumerate(plan.layout.stages_of(world.seat.place))
        ],
        world=world,
        batches=data.evaluation,
        num_batches=data.eval_batches,
        placement=placement,
        timeout_s=plan.recipe.engine.stall_timeout,
    )


class _NetworkPart(nn.Module):
    """Some units of a net under the names that they have in the whole of it (`units.3...`)."""

    def __init__(self, units: dict[int, nn.Module]) -> None:
        super().__init__()
        self.units = nn.ModuleDict({str(n): unit for n, unit in units.items()})

    def range(self, first: int, end: int) -> list[nn.Module]:
        """Return the units `first` ... `end` - 1."""
        return [self.units[str(n)] for n in range(first, end)]


def _settle(part: nn.Module, auxiliary: nn.Module | None, world: World) -> None:
    """Make the running statistics of all replicas one."""
    if world.replicas is not None:
        buffers = [*part.buffers(), *([] if auxiliary is None else auxiliary.buffers())]
        average_buffers(buffers, group=world.replicas)


def _reducer(part: _NetworkPart, auxiliary: nn.Module | None, world: World) -> Reducer | None:
    if world.replicas is None:
        return None
    modules = [*part.units.values(), *([auxiliary] if auxiliary is not None else [])]
    units = [[p for p in module.parameters() if p.requires_grad] for module in modules]
    return Reducer(units, group=world.replicas)


def _weights(plan: CheckedPlan, *, starting_weights: bool) -> tuple[Network, tuple[str, ...]]:
    network = build_network(plan)
    left: tuple[str, ...] = ()
    if plan.recipe.model.weights and starting_weights:
        left = load_weights(network, Path(plan.recipe.model.weights)).left
    return network, left


def open_data_here(plan: CheckedPlan, world: World | Alone) -> DataHere:
    """Open the data where images enter; everyone learns how long an epoch is."""
    recipe, seat = plan.recipe, world.seat
    training, evaluation, info = None, None, plan.info
    mine: tuple[int, int, int] | None = None
    if seat.is_first:
        data = open_data(recipe.data.name, seed=recipe.run.seed, **data_request(recipe))
        info = data.info
        device = world.device if isinstance(world, World) else plan.device
        workers = num_workers(recipe, decodes=data.decodes, device=device, processes=_processes_here())
        training = data.train_loader(
            batch_size=recipe.data.batch_size,
            steps_per_epoch=recipe.data.steps_per_epoch,
            augment=recipe.data.augment,
            drop_last=recipe.data.drop_last,
            workers=workers,
            replica=seat.replica,
            replicas=seat.num_replicas,
            device=device,
        )
        evaluation = data.eval_loader(
            batch_size=eval_batch_size(recipe),
            workers=workers,
            replica=seat.replica,
            replicas=seat.num_replicas,
            device=device,
        )
        mine = (training.microbatches, training.steps_per_epoch, len(evaluation))
    told = world.gather_all(mine)[seat.replica * seat.num_places] if isinstance(world, World) else mine
    assert told is not None
    microbatches, rows, batches = told
    return DataHere(info, training, evaluation, EpochLength(microbatches, rows), batches)


def _processes_here() -> int:
    launch = Launch.from_environment()
    return launch.local_world_size if launch else 1


def _auxiliaries(
    plan: CheckedPlan, network: Network, *, device: torch.device, wanted: range
) -> list[Auxiliaries]:
    """Build the auxiliary nets, where blocks have any."""
    if plan.choice is None:
        return []
    return make_auxiliaries(
        plan.recipe,
        list(network.units),
        plan.costs,
        cuts=plan.cuts,
        classes=plan.classes,
        device=device,
        wanted=wanted,
    )


def _auxiliary_part(plan: CheckedPlan, auxiliaries: list[Auxiliaries]) -> nn.Module | None:
    if not any(nets.learning for nets in auxiliaries):
        return None
    return AuxiliaryPart(auxiliaries, cuts=plan.cuts, num_units=len(plan.names))


def _stages(
    plan: CheckedPlan,
    network: Network,
    data: DataHere,
    auxiliaries: list[Auxiliaries],
    *,
    device: torch.device,
    wanted: range | None,
) -> list[Stage] | list[BlockStage]:
    recipe = plan.recipe
    if plan.choice is not None:
        return assemble_blocks(
            list(network.units),
            names=plan.names,
            cuts=plan.cuts,
            choice=plan.choice,
            auxiliaries=auxiliaries,
            num_streams=[1, *(len(cost.output_shapes) for cost in plan.costs)],
            make_updater=partial(make_updater, recipe, data.length.rows),
            loss=_loss(recipe),
            seed=derive_seed(recipe.run.seed, "units"),
            device=device,
            autocast_dtype=autocast_dtype(recipe),
            wanted=wanted,
        )
    return assemble_stages(
        list(network.units),
        names=plan.names,
        cuts=plan.cuts,
        method=plan.method,
        make_updater=partial(make_updater, recipe, data.length.rows),
        loss=_loss(recipe).mean,
        seed=derive_seed(recipe.run.seed, "units"),
        device=device,
        statistics_in_forward=recipe.method.bn_statistics == "forward",
        autocast_dtype=autocast_dtype(recipe),
        wanted=wanted,
    )


def _loss(recipe: Recipe) -> Loss:
    smoothed = partial(functional.cross_entropy, label_smoothing=recipe.training.label_smoothing)
    return Loss(smoothed, partial(smoothed, reduction="none"))


def _exact_pipeline(
    plan: CheckedPlan, network: Network, data: DataHere, world: World, reducer: Reducer | None
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
        parts.append(ExactPart(j, evaluators, updater, replica=seat.replica, replicas=seat.num_replicas))
    return ExactPipeline(
        parts=parts,
        loss=_loss(recipe).mean,
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


def _plan_event(
    plan: CheckedPlan, data: DataHere, devices: list[str], *, threads: int, backend: str = ""
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
            alone=plan.choice is not None and not plan.choice.sends_down,
            auxiliary=plan.auxiliary_costs,
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
        method=_method_words(plan),
        precision=recipe.engine.precision,
        device=", ".join(dict.fromkeys(devices)),
        threads=threads,
        replicas=layout.num_replicas,
        processes=layout.num_processes,
        backend=backend,
    )


def _method_words(plan: CheckedPlan) -> str:
    if plan.method.keep:
        return f"{plan.method.name} (keep = {plan.method.keep})"
    if plan.choice is None or plan.choice == LOCAL:
        return plan.method.name
    return f"{plan.method.name} ({plan.choice})"


def _stage_devices(layout: Layout, devices: list[str], num_stages: int) -> list[str]:
    places = layout.num_places
    if layout.mode == IN_PROCESS:
        return devices * num_stages
    return [", ".join(dict.fromkeys(devices[j % places :: places])) for j in range(num_stages)]


def _schedule_words(plan: CheckedPlan) -> str:
    schedule, slack = plan.recipe.engine.schedule, plan.recipe.engine.slack
    if plan.choice is not None and not plan.choice.sends_down:
        return "every block on its own: nothing comes down"
    if schedule == "auto":
        schedule = plan.method.default_schedule
    if not isinstance(schedule, str):
        return str(list(schedule))
    if schedule == "least":
        return f"least: {list(plan.lookahead)}"
    return f"tight + slack {slack}" if slack and schedule == "tight" else schedule


def process_device(plan: CheckedPlan, launch: Launch) -> torch.device:
    """Return the device of a process of a run in processes."""
    return device_of(
        plan.recipe,
        plan.layout,
        rank=launch.rank,
        local_rank=launch.local_rank,
        local_world_size=launch.local_world_size,
    )
