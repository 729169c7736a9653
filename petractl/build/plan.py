"""From a recipe to everything that trains it: the only module that sees both a recipe and the parts.

`check` finds out all that can be known before the first step, without memory for the weights, and reports
every problem at once. `build` then makes the net, the data, the stages and the pipeline from what `check`
found.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from petractl.data import DataInfo, TrainLoader, describe_data, open_data
from petractl.data.order import TrainOrder
from petractl.engine.assembly import assemble_stages
from petractl.engine.evaluation import Placement
from petractl.engine.pipeline import InProcessPipeline
from petractl.engine.schedule import lookaheads, num_updates
from petractl.engine.trainer import EvaluationData
from petractl.engine.update import Updater
from petractl.errors import Problem, RecipeError, UserError
from petractl.events import PlanMade
from petractl.methods.family import Keeping, MethodSpec, keepings, method_spec
from petractl.methods.randomness import derive_seed
from petractl.models.registry import BuiltModel, build_model
from petractl.models.units import Network, is_reversible
from petractl.models.weights import load_weights
from petractl.optim import LearningRate, build_optimizer, clip_norm_
from petractl.planning.flops import UnitCost, unit_costs
from petractl.planning.stages import balanced_cuts, stage_plans
from petractl.recipe.load import LoadedRecipe
from petractl.recipe.schema import Recipe

IMAGENET_STEM_FROM_SIDE = 96
MIN_EVAL_BATCH = 256


@dataclass(frozen=True, slots=True)
class CheckedPlan:
    """What will be run: the recipe with the cuts chosen, and all that follows from it without weights."""

    recipe: Recipe
    info: DataInfo
    classes: int
    stem: str
    method: MethodSpec
    names: tuple[str, ...]
    keepings: tuple[Keeping, ...]
    costs: tuple[UnitCost, ...]
    cuts: tuple[int, ...]
    lookahead: tuple[int, ...]
    device: torch.device
    warnings: tuple[Problem, ...]

    @property
    def summary(self) -> str:
        """One line: model, data, method, stages."""
        stages = len(self.lookahead)
        size = sum(cost.parameters for cost in self.costs)
        keep = f" (keep = {self.method.keep})" if self.method.keep else ""
        return (
            f"{self.recipe.model.name} ({size:,} parameters) on {self.recipe.data.name} "
            f"by {self.method.name}{keep}, {stages} {'stage' if stages == 1 else 'stages'}"
        )


@dataclass(frozen=True, slots=True)
class Built:
    """A run ready to begin."""

    network: Network
    pipeline: InProcessPipeline
    training_data: TrainLoader
    evaluation_data: EvaluationData
    placement: Placement
    plan: PlanMade
    left_weights: tuple[str, ...]


class _Problems:
    """Collects problems, so that all are told at once."""

    def __init__(self) -> None:
        self.found: list[Problem] = []

    def add(self, key: str, what: str, hint: str = "") -> None:
        self.found.append(Problem(key, what, hint))

    @contextmanager
    def collect(self, key: str) -> Iterator[None]:
        """Turn a user's error into a problem; what the block would have given is then missing."""
        try:
            yield
        except UserError as error:
            self.add(error.where or key, error.what, error.hint)


def check(loaded: LoadedRecipe, *, starting_weights: bool = True, test_only: bool = False) -> CheckedPlan:
    """Find out everything that can be known before the first step; the net is built on the meta device.

    `starting_weights` is false where a checkpoint takes their place: their file may be gone by then.
    `test_only` is for evaluation, which needs no training data.

    Raises:
        RecipeError: every problem that was found.
    """
    recipe = loaded.recipe
    problems = _Problems()
    device = _check_device(recipe, problems)
    info: DataInfo | None = None
    with problems.collect("data"):
        info = describe_data(recipe.data.name, test_only=test_only, **_data_places(recipe))
    if info is not None and not test_only:
        _check_batches(recipe, info, problems)
    # A wrong place of the data must not hide what is wrong with the net.
    weights = recipe.model.weights if starting_weights else ""
    plan = _check_model(recipe, info or _stand_in(recipe), device, weights, problems)
    if problems.found:
        raise RecipeError(problems.found, where=str(loaded.path))
    assert plan is not None, "no problem was found"
    return plan


def _check_model(
    recipe: Recipe, info: DataInfo, device: torch.device, weights: str, problems: _Problems
) -> CheckedPlan | None:
    classes = recipe.model.classes or info.classes
    stem = _stem(recipe, info)
    if classes < info.classes:
        problems.add(
            "model.classes",
            f"{classes} are too few: {recipe.data.name} has {info.classes}",
            f"give at least {info.classes}, or 0 for as many as the data have",
        )
    with problems.collect("model.name"), torch.device("meta"):
        model = _build_units(recipe, classes=classes, stem=stem, channels=info.channels)
        costs = unit_costs(model.units, input_shape=(info.channels, info.height, info.width))
        _check_output(costs[-1], info.classes)
        if weights:
            load_weights(Network(model.units), Path(weights))
        _check_single_samples(recipe, info, model, problems)
        _make_optimizer(recipe, list(model.units[-1].named_parameters()))
        spec = method_spec(recipe.method.name, keep=recipe.method.keep)
        reversible = [is_reversible(unit) for unit in model.units]
        warnings = _check_method(recipe, spec, reversible, problems)
        kept = keepings(spec, reversible)
        cuts = _choose_cuts(recipe, spec, costs, kept, problems)
        lookahead = _choose_lookahead(recipe, spec, len(cuts) + 1, problems)
        if 0 < info.train_samples < recipe.data.batch_size:
            what = f"{recipe.data.batch_size} is more than the {info.train_samples} samples"
            warnings.append(Problem("data.batch_size", what, "every microbatch will hold all of them"))
        return CheckedPlan(
            recipe=recipe.with_cuts(cuts),
            info=info,
            classes=classes,
            stem=stem,
            method=spec,
            names=model.names,
            keepings=kept,
            costs=tuple(costs),
            cuts=cuts,
            lookahead=lookahead,
            device=device,
            warnings=tuple(warnings),
        )
    return None


def build(plan: CheckedPlan, *, starting_weights: bool = True) -> Built:
    """Make the net, the data and the pipeline.

    Raises:
        UserError: the data or the starting weights are not what they should be.
    """
    recipe = plan.recipe
    data = open_data(recipe.data.name, seed=recipe.run.seed, **_data_places(recipe))
    training_data = data.train_loader(
        batch_size=recipe.data.batch_size,
        steps_per_epoch=recipe.data.steps_per_epoch,
        augment=recipe.data.augment,
        drop_last=recipe.data.drop_last,
        workers=recipe.data.workers,
    )
    evaluation_data = data.eval_loader(batch_size=_eval_batch_size(recipe), workers=recipe.data.workers)
    placement = Placement(plan.device, _memory_format(recipe), _autocast_dtype(recipe))
    network = build_network(plan)
    left: tuple[str, ...] = ()
    if recipe.model.weights and starting_weights:
        left = load_weights(network, Path(recipe.model.weights)).left
    network.to(plan.device)
    steps = training_data.steps_per_epoch
    stages = assemble_stages(
        list(network.units),
        names=plan.names,
        cuts=plan.cuts,
        method=plan.method,
        make_updater=partial(_make_updater, recipe, steps),
        loss=partial(functional.cross_entropy, label_smoothing=recipe.training.label_smoothing),
        seed=derive_seed(recipe.run.seed, "units"),
        device=plan.device,
        statistics_in_forward=recipe.method.bn_statistics == "forward",
        autocast_dtype=placement.autocast_dtype,
    )
    pipeline = InProcessPipeline(stages, lookahead=plan.lookahead, accumulation=recipe.method.accumulation)
    return Built(
        network=network,
        pipeline=pipeline,
        training_data=training_data,
        evaluation_data=evaluation_data,
        placement=placement,
        plan=_plan_event(plan, data.info, steps),
        left_weights=left,
    )


def build_network(plan: CheckedPlan) -> Network:
    """Make the net with its starting weights, a function of the seed alone, on the CPU."""
    torch.manual_seed(derive_seed(plan.recipe.run.seed, "weights"))
    model = _build_units(plan.recipe, classes=plan.classes, stem=plan.stem, channels=plan.info.channels)
    network = Network(model.units)
    return network.to(memory_format=_memory_format(plan.recipe))


def evaluation_data(plan: CheckedPlan) -> EvaluationData:
    """Open the test data alone."""
    recipe = plan.recipe
    data = open_data(recipe.data.name, seed=recipe.run.seed, test_only=True, **_data_places(recipe))
    return data.eval_loader(batch_size=_eval_batch_size(recipe), workers=recipe.data.workers)


def evaluation_placement(plan: CheckedPlan) -> Placement:
    """Return where and in which precision the net is evaluated."""
    return Placement(plan.device, _memory_format(plan.recipe), _autocast_dtype(plan.recipe))


def num_threads(recipe: Recipe) -> int:
    """Return the CPU threads to use: the recipe's, else OMP_NUM_THREADS, else the usable cores."""
    if recipe.engine.threads:
        return recipe.engine.threads
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(given) if given.isdigit() and int(given) > 0 else len(os.sched_getaffinity(0))


def _data_places(recipe: Recipe) -> dict[str, Any]:
    data = recipe.data
    places: dict[str, Any] = {"train": data.train, "val": data.val}
    if data.name == "fake":
        places |= {
            "fake_samples": data.fake_samples,
            "image_size": data.image_size,
            "channels": data.channels,
            "classes": data.classes,
        }
    return places


def _check_device(recipe: Recipe, problems: _Problems) -> torch.device:
    name = recipe.engine.device
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        there = f"there are {count} GPUs" if count else "this machine has no usable GPU"
        problems.add("engine.device", f'"{name}": {there}', 'use "auto" or "cpu"')
        return torch.device("cpu")
    return device


def _check_batches(recipe: Recipe, info: DataInfo, problems: _Problems) -> None:
    if info.train_samples < 0:
        return
    with problems.collect("data.batch_size"):
        TrainOrder(
            info.train_samples,
            batch_size=recipe.data.batch_size,
            seed=0,
            steps_per_epoch=recipe.data.steps_per_epoch,
            drop_last=recipe.data.drop_last,
        )


def _stand_in(recipe: Recipe) -> DataInfo:
    side, channels = (8, 1) if recipe.data.name == "digits" else (32, 3)
    return DataInfo(
        name=recipe.data.name,
        classes=1,
        channels=channels,
        height=side,
        width=side,
        train_samples=-1,
        val_samples=-1,
    )


def _stem(recipe: Recipe, info: DataInfo) -> str:
    if recipe.model.stem != "auto":
        return recipe.model.stem
    return "imagenet" if max(info.height, info.width) >= IMAGENET_STEM_FROM_SIDE else "cifar"


def _build_units(recipe: Recipe, *, classes: int, stem: str, channels: int) -> BuiltModel:
    return build_model(
        recipe.model.name,
        width=recipe.model.width,
        classes=classes,
        in_channels=channels,
        stem=stem,
        depth=recipe.model.depth,
        arguments=recipe.model.arguments,
    )


def _check_single_samples(recipe: Recipe, info: DataInfo, model: BuiltModel, problems: _Problems) -> None:
    """Find batch norms that would see a single value per channel."""
    if recipe.data.batch_size > 1:
        return
    try:
        unit_costs(model.units, input_shape=(info.channels, info.height, info.width), samples=1)
    except UserError as error:
        problems.add("data.batch_size", f"1 is too few for this net: {error.what}", "give 2 or more")


def _check_output(cost: UnitCost, data_classes: int) -> None:
    shapes = cost.output_shapes
    if len(shapes) != 1 or len(shapes[0]) != 1 or shapes[0][0] < data_classes:
        got = ", ".join(str(shape) for shape in shapes)
        raise UserError(
            f"the last unit returns {got} per sample, not one vector of at least {data_classes} logits",
            where="model.name",
            hint="end the list of units with a head for the data's classes",
        )


def _check_method(
    recipe: Recipe, spec: MethodSpec, reversible: Sequence[bool], problems: _Problems
) -> list[Problem]:
    if any(reversible[:-1]):
        return []
    model = recipe.model.name
    if spec.needs_reversible:
        name, key = (spec.name, "method.name") if not spec.keep else (f'keep = "{spec.keep}"', "method.keep")
        problems.add(
            key,
            f"{name} needs a reversible unit, and {model} has none",
            'choose a RevNet, or method.name = "petra", "delayed" with keep = "inputs", or "backprop"',
        )
    if spec.name != "petra":
        return []
    return [
        Problem(
            "method.name",
            f"{model} has no reversible unit: petra becomes delayed gradients with every unit's input kept",
            "choose a RevNet to keep nothing",
        )
    ]


def _choose_cuts(
    recipe: Recipe,
    spec: MethodSpec,
    costs: Sequence[UnitCost],
    kept: Sequence[Keeping],
    problems: _Problems,
) -> tuple[int, ...]:
    """Return the first units of stages 1 ... J-1."""
    units, choice = len(costs), recipe.partition
    if choice.cuts:
        if choice.cuts[-1] >= units:
            problems.add(
                "partition.cuts",
                f"{choice.cuts[-1]} is past the last unit: {recipe.model.name} has units 0 to {units - 1}",
                f"give numbers from 1 to {units - 1}",
            )
            return ()
        return choice.cuts
    stages = choice.stages
    if stages == "auto":
        stages = 1 if spec.locked else "units"
    if stages == "units":
        stages = units
    assert isinstance(stages, int)
    if stages > units:
        problems.add(
            "partition.stages",
            f"{stages} stages are more than the {units} units of {recipe.model.name}",
            f'give at most {units}, or "units"',
        )
        return ()
    return balanced_cuts(costs, kept=kept, num_stages=stages, balance=choice.balance)


def _choose_lookahead(recipe: Recipe, spec: MethodSpec, stages: int, problems: _Problems) -> tuple[int, ...]:
    schedule = recipe.engine.schedule
    if schedule == "auto":
        schedule = "sequential" if spec.locked else "tight"
    try:
        return lookaheads(schedule, num_stages=stages, slack=recipe.engine.slack)
    except ValueError as error:
        problems.add("engine.schedule", str(error), f"give a list of {stages}, one entry per stage")
        return (0,) * stages


def _make_optimizer(recipe: Recipe, parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    choice = recipe.optimizer
    return build_optimizer(
        choice.name,
        parameters,
        lr=choice.lr,
        momentum=choice.momentum,
        nesterov=choice.nesterov,
        weight_decay=choice.weight_decay,
        decay_norm_and_bias=choice.decay_norm_and_bias,
        betas=(choice.betas[0], choice.betas[1]),
        arguments=choice.arguments,
    )


def _make_updater(
    recipe: Recipe, steps_per_epoch: int, parameters: list[tuple[str, nn.Parameter]]
) -> Updater:
    training, k = recipe.training, recipe.method.accumulation
    scale = recipe.data.batch_size * k / 256 if recipe.optimizer.scale_lr else 1.0
    rate = LearningRate(
        base_lr=recipe.optimizer.lr * scale,
        updates_per_epoch=num_updates(num_microbatches=steps_per_epoch, accumulation=k),
        epochs=training.epochs,
        warmup_epochs=training.warmup_epochs,
        decay=training.lr_decay,
        milestones=training.milestones,
        factor=training.decay_factor,
        power=training.polynomial_power,
    )
    clip: Callable[..., torch.Tensor] | None = None
    if recipe.optimizer.clip_norm:
        clip = partial(clip_norm_, max_norm=recipe.optimizer.clip_norm)
    return Updater(_make_optimizer(recipe, parameters), learning_rate=rate, clip=clip)


def _memory_format(recipe: Recipe) -> torch.memory_format:
    return torch.channels_last if recipe.model.memory_format == "channels-last" else torch.contiguous_format


def _autocast_dtype(recipe: Recipe) -> torch.dtype | None:
    return torch.bfloat16 if recipe.engine.precision == "bfloat16" else None


def _eval_batch_size(recipe: Recipe) -> int:
    return recipe.data.eval_batch_size or max(recipe.data.batch_size, MIN_EVAL_BATCH)


def _plan_event(plan: CheckedPlan, info: DataInfo, steps: int) -> PlanMade:
    recipe, k = plan.recipe, plan.recipe.method.accumulation
    schedule = recipe.engine.schedule
    if schedule == "auto":
        schedule = "sequential" if plan.method.locked else "tight"
    if not isinstance(schedule, str):
        schedule = str(list(schedule))
    elif recipe.engine.slack and schedule == "tight":
        schedule = f"tight + slack {recipe.engine.slack}"
    return PlanMade(
        stages=stage_plans(
            names=plan.names,
            kept=plan.keepings,
            costs=plan.costs,
            cuts=plan.cuts,
            lookahead=plan.lookahead,
            accumulation=k,
        ),
        microbatch_size=recipe.data.batch_size,
        accumulation=k,
        samples_per_update=recipe.data.batch_size * k,
        steps_per_epoch=steps,
        updates_per_epoch=num_updates(num_microbatches=steps, accumulation=k),
        epochs=recipe.training.epochs,
        train_samples=info.train_samples,
        val_samples=info.val_samples,
        parameters=sum(cost.parameters for cost in plan.costs),
        schedule=schedule,
        method=plan.method.name + (f" (keep = {plan.method.keep})" if plan.method.keep else ""),
        precision=recipe.engine.precision,
        device=str(plan.device),
        threads=num_threads(recipe),
    )
