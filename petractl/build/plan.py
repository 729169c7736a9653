"""What will be run, found out before the first step and without memory for the weights."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from petractl.build.blocks import costs_of_auxiliaries, single_block_warnings
from petractl.build.layout import (
    IN_PROCESS,
    Layout,
    Mode,
    automatic_stages,
    choose_layout,
    choose_mode,
    exact_schedule,
    layout_problems,
)
from petractl.build.measured import MEASURED_BALANCES, least_lookaheads, measured_cuts
from petractl.build.parts import build_units, data_request, make_optimizer, stem_of
from petractl.data import DataInfo, describe_data
from petractl.data.order import TrainOrder
from petractl.engine.schedule import lookaheads
from petractl.engine.world import Launch
from petractl.errors import Problem, RecipeError, UserError
from petractl.estimator import Estimator
from petractl.methods.family import Keeping, MethodSpec, keepings, method_spec
from petractl.models.registry import BuiltModel
from petractl.models.units import Network, is_reversible
from petractl.models.weights import load_weights
from petractl.planning.auxiliary_cost import AuxiliaryCost
from petractl.planning.flops import UnitCost, unit_costs
from petractl.planning.stages import balanced_cuts
from petractl.recipe.checks import RESTARTS_ALONE, explicit_keys
from petractl.recipe.data_checks import PHOTOGRAPH_SIDE
from petractl.recipe.load import LoadedRecipe
from petractl.recipe.schema import PHOTOGRAPH_DATASETS, Recipe


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
    """The device of a run in one process."""
    layout: Layout
    warnings: tuple[Problem, ...]
    choice: Estimator | None = None
    """What blocks learn from; None for methods whose stages are no blocks."""
    auxiliary_costs: tuple[AuxiliaryCost, ...] = ()
    """Of the auxiliary net of every block but the last; empty where there are none."""

    @property
    def num_stages(self) -> int:
        """J."""
        return len(self.lookahead)

    @property
    def summary(self) -> str:
        """One line: model, data, method, stages."""
        stages = len(self.lookahead)
        size = sum(cost.parameters for cost in self.costs)
        keep = f" (keep = {self.method.keep})" if self.method.keep else ""
        return (
            f"{self.recipe.model.name} ({size:,} parameters) on {self.recipe.data.name} "
            f"by {self.method.name}{keep}, {stages} {'stage' if stages == 1 else 'stages'}{self._processes}"
        )

    @property
    def _processes(self) -> str:
        if self.layout.mode == IN_PROCESS:
            return ""
        copies = f" ({self.layout.num_replicas} replicas)" if self.layout.num_replicas > 1 else ""
        count = self.layout.num_processes
        return f" in {count} {'process' if count == 1 else 'processes'}{copies}"


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


def check(
    loaded: LoadedRecipe,
    *,
    starting_weights: bool = True,
    test_only: bool = False,
    launch: Launch | None = None,
    info: DataInfo | None = None,
) -> CheckedPlan:
    """Find out everything that can be known before the first step; the net is built on the meta device.

    `starting_weights` is false where a checkpoint takes their place: their file may be gone by then.
    `test_only` is for evaluation, which needs no training data and one process. `launch` is what was started
    already, None where this decides it. `info` is what another process knows of the data, which then need not
    be here.

    Raises:
        RecipeError: every problem that was found.
    """
    recipe = loaded.recipe
    problems = _Problems()
    mode = IN_PROCESS if test_only else choose_mode(recipe, launch)
    device = torch.device("cpu")
    if mode == IN_PROCESS:
        device = _check_device(recipe, problems)
    elif not recipe.engine.devices:
        _check_device(recipe, problems)
    if info is None:
        with problems.collect("data"):
            info = describe_data(recipe.data.name, test_only=test_only, **data_request(recipe))
    if info is not None and not test_only:
        _check_batches(recipe, info, problems)
    # A wrong place of the data must not hide what is wrong with the net.
    weights = recipe.model.weights if starting_weights else ""
    plan = _Checker(recipe, problems, mode=mode, launch=launch).check(
        info or _stand_in(recipe), device=device, weights=weights
    )
    if problems.found:
        raise RecipeError(problems.found, where=str(loaded.path))
    assert plan is not None, "no problem was found"
    return plan


class _Checker:
    """Checks a recipe's model and stages."""

    def __init__(self, recipe: Recipe, problems: _Problems, *, mode: Mode, launch: Launch | None) -> None:
        self._recipe = recipe
        self._problems = problems
        self._mode = mode
        self._launch = launch

    def check(self, info: DataInfo, *, device: torch.device, weights: str) -> CheckedPlan | None:
        """Return the plan, or None where a problem has made that impossible."""
        recipe, problems = self._recipe, self._problems
        classes = recipe.model.classes or info.classes
        stem = stem_of(recipe, info)
        if classes < info.classes:
            problems.add(
                "model.classes",
                f"{classes} are too few: {recipe.data.name} has {info.classes}",
                f"give at least {info.classes}, or 0 for as many as the data have",
            )
        with problems.collect("model.name"), _of_possible_size(), torch.device("meta"):
            model = build_units(recipe, classes=classes, stem=stem, channels=info.channels)
            costs = unit_costs(model.units, input_shape=(info.channels, info.height, info.width))
            _check_output(costs[-1], info.classes)
            if weights:
                load_weights(Network(model.units), Path(weights))
            _check_single_samples(recipe, info, model, problems)
            make_optimizer(recipe, list(model.units[-1].named_parameters()))
            spec = method_spec(recipe.method.name, keep=recipe.method.keep)
            reversible = [is_reversible(unit) for unit in model.units]
            warnings = _check_method(recipe, spec, reversible, problems)
            kept = keepings(spec, reversible)
            cuts = self._choose_cuts(spec, costs, kept, model, info)
            num_stages = len(cuts) + 1
            is_open = recipe.engine.schedule == "least" and not recipe.engine.lookahead
            if is_open and not spec.locked and not problems.found:
                recipe = recipe.with_lookahead(
                    least_lookaheads(
                        recipe,
                        model,
                        spec=spec,
                        info=info,
                        cuts=cuts,
                        device=self._measuring_device(device),
                        mode=self._mode,
                    )
                )
            layout = choose_layout(recipe, self._mode, num_stages=num_stages)
            if not problems.found:
                problems.found += layout_problems(recipe, layout, self._launch, num_stages=num_stages)
            if recipe.engine.mode == "auto" and self._mode == IN_PROCESS:
                warnings += _idle_alone(recipe)
            choice = recipe.method.estimator
            auxiliary: tuple[AuxiliaryCost, ...] = ()
            if choice is not None:
                warnings += single_block_warnings(recipe, num_blocks=num_stages)
                if not problems.found:
                    auxiliary = costs_of_auxiliaries(recipe, model, costs, cuts=cuts, classes=classes)
            if 0 < info.train_samples < recipe.data.batch_size:
                what = f"{recipe.data.batch_size} is more than the {info.train_samples} samples"
                warnings.append(Problem("data.batch_size", what, "every microbatch will hold all of them"))
            return CheckedPlan(
                recipe=recipe.with_cuts(cuts).with_mode(self._mode),
                info=info,
                classes=classes,
                stem=stem,
                method=spec,
                names=model.names,
                keepings=kept,
                costs=tuple(costs),
                cuts=cuts,
                lookahead=_choose_lookahead(recipe, spec, num_stages, problems),
                device=device,
                layout=layout,
                warnings=tuple(warnings),
                choice=choice,
                auxiliary_costs=auxiliary,
            )
        return None

    def _choose_cuts(
        self,
        spec: MethodSpec,
        costs: Sequence[UnitCost],
        kept: Sequence[Keeping],
        model: BuiltModel,
        info: DataInfo,
    ) -> tuple[int, ...]:
        """Return the first units of stages 1 ... J-1."""
        recipe, problems = self._recipe, self._problems
        units, choice = len(costs), recipe.partition
        if choice.cuts:
            if choice.cuts[-1] >= units:
                problems.add(
                    "partition.cuts",
                    f"{choice.cuts[-1]} is past the last unit, {units - 1}, of {recipe.model.name}",
                    f"give numbers from 1 to {units - 1}",
                )
                return ()
            return choice.cuts
        stages = choice.stages
        if stages == "auto" and self._mode != IN_PROCESS:
            stages = automatic_stages(recipe, self._launch, num_units=units)
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
        if choice.balance in MEASURED_BALANCES:
            return measured_cuts(
                recipe,
                model,
                spec=spec,
                info=info,
                num_stages=stages,
                device=self._measuring_device(torch.device("cpu")),
                mode=self._mode,
            )
        return balanced_cuts(costs, kept=kept, num_stages=stages, balance=choice.balance)

    def _measuring_device(self, device: torch.device) -> torch.device:
        """Return where times are measured: the device of the run, of several the first."""
        engine = self._recipe.engine
        if engine.devices:
            return torch.device(engine.devices[0])
        if engine.device in ("auto", "cuda") and torch.cuda.device_count():
            return torch.device("cuda", 0)
        return device if engine.device == "auto" else torch.device(engine.device)


_TOO_LARGE = re.compile(r"overflow|can't allocate memory|out of memory", re.IGNORECASE)


@contextmanager
def _of_possible_size() -> Iterator[None]:
    """Turn sizes past 64 bits, or past the memory of what is measured, into a user's error."""
    try:
        yield
    except (RuntimeError, OverflowError, MemoryError) as error:
        told = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, RuntimeError) and not _TOO_LARGE.search(told):
            raise
        hint = "make model.width, model.classes, data.image_size or data.batch_size smaller"
        raise UserError(f"the net is too large: {told}", where="model", hint=hint) from error


def _idle_alone(recipe: Recipe) -> list[Problem]:
    """Return what is set for several processes, where the run has turned out to need only one."""
    what = "has no effect: this run needs one process only"
    hints = {
        "engine.stall_timeout": 'set engine.mode = "processes" for one per stage',
        "engine.max_restarts": f"it is for {RESTARTS_ALONE}",
    }
    given = explicit_keys(recipe)
    return [Problem(key, what, hint) for key, hint in hints.items() if key in given]


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
            replicas=recipe.engine.replicas,
        )


def _stand_in(recipe: Recipe) -> DataInfo:
    name = recipe.data.name
    side, channels = {"digits": (8, 1), "fashion-mnist": (28, 1)}.get(name, (32, 3))
    if name in PHOTOGRAPH_DATASETS:
        side = recipe.data.image_size or PHOTOGRAPH_SIDE
    return DataInfo(
        name=name,
        classes=1,
        channels=channels,
        height=side,
        width=side,
        train_samples=-1,
        val_samples=-1,
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


def _choose_lookahead(recipe: Recipe, spec: MethodSpec, stages: int, problems: _Problems) -> tuple[int, ...]:
    schedule = recipe.engine.schedule
    if schedule == "auto" or exact_schedule(recipe):
        schedule = spec.default_schedule
    if schedule == "least":
        schedule = recipe.engine.lookahead or (0,) * stages  # not chosen where there are problems
    try:
        return lookaheads(schedule, num_stages=stages, slack=recipe.engine.slack)
    except ValueError as error:
        problems.add("engine.schedule", str(error), f"give a list of {stages}, one entry per stage")
        return (0,) * stages
