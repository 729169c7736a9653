"""Several methods and schedules on one recipe, measured in turn.

All variants are built first, each trains on a short segment in which its memory is watched, and then come the
repeats: v1 v2 v3, v1 v2 v3, ... so that a machine that slows down slows all of them. They train on a few
microbatches of the recipe's data held in memory: it is the engine that is measured, not the loader.
"""

import dataclasses
import gc
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from petractl import build
from petractl.bench.measuring import Contender, Microbatch, Round, Segment, measure_round, plan_segment
from petractl.bench.memory import watched_memory
from petractl.bench.summary import Measurement, Spread, rate_of, summarise_processes
from petractl.bench.usage import segment_usage_of, usage_of
from petractl.bench.variants import Variant, joined, vary
from petractl.engine.world import Alone, Launch, World
from petractl.errors import Problem, RecipeError, RunError
from petractl.events import PlanMade
from petractl.recipe.load import LoadedRecipe

PREPARED = 4
"""Microbatches held in memory, taken in turn."""

Tell = Callable[[str], None]
"""Takes a line about the progress."""


@dataclass(frozen=True, slots=True)
class Options:
    """How much is measured: `microbatches` are timed per repeat and variant, after `warmup` others."""

    repeats: int = 5
    microbatches: int = 24
    warmup: int = 4


@dataclass(frozen=True, slots=True)
class Checked:
    """A variant that can run."""

    variant: Variant
    plan: build.CheckedPlan
    warnings: tuple[Problem, ...]


@dataclass(slots=True)
class _Entry:
    """A variant that is built, and what was measured of it so far; `rounds` by repeat and then by rank."""

    contender: Contender
    plan: PlanMade
    segment: Segment
    peak_memory_bytes: list[int]
    stages: list[tuple[int, ...]]
    rounds: list[list[Round]]


def check_variants(
    base: LoadedRecipe, variants: Sequence[Variant], *, launch: Launch | None = None
) -> tuple[Checked, ...]:
    """Check every variant of a recipe as `run` would check it, in the same processes for all of them.

    Where one variant needs several processes, all get them. `launch` is what was started already.

    Raises:
        RecipeError: every problem of every variant.
    """
    checked = _check_each(base, variants, launch=launch, mode="")
    if len({each.plan.layout.mode for each in checked}) > 1:
        checked = _check_each(base, variants, launch=launch, mode=build.PROCESSES)
    processes = {each.variant.text: each.plan.layout.num_processes for each in checked}
    if len(set(processes.values())) > 1:
        counts = ", ".join(f"{text}: {count}" for text, count in processes.items())
        what = f"all must run in the same processes, but they need different numbers of them ({counts})"
        hint = "set partition.stages to a number, with --set"
        raise RecipeError([Problem("partition.stages", what, hint)], where=str(base.path))
    return checked


def _check_each(
    base: LoadedRecipe, variants: Sequence[Variant], *, launch: Launch | None, mode: str
) -> tuple[Checked, ...]:
    checked: list[Checked] = []
    problems: dict[str, Sequence[Problem]] = {}
    for variant in variants:
        try:
            loaded = vary(base, variant, mode=mode)
            plan = build.check(loaded, launch=launch)
        except RecipeError as error:
            problems[variant.text] = error.problems
        else:
            problems[variant.text] = ()
            checked.append(Checked(variant, plan, (*loaded.warnings, *plan.warnings)))
    if any(problems.values()):
        raise RecipeError(joined(problems), where=str(base.path))
    return tuple(checked)


def measure(
    checked: Sequence[Checked],
    world: Alone | World,
    *,
    device: torch.device,
    options: Options,
    tell: Tell = lambda line: None,
) -> tuple[Measurement, ...]:
    """Measure the variants with all processes of the world; every one of them calls this with the same.

    `device` is this process's. Returns nothing but on rank 0.

    Raises:
        RunError: not enough memory.
    """
    bench = _Bench(checked[0], world, device)
    entries = [bench.enter(each, options) for each in _told(checked, tell)]
    for repeat in range(options.repeats):
        rates = []
        for entry in entries:
            bench.run(entry)
            rates.append(f"{entry.contender.name} {rate_of(entry.rounds[-1]):,.1f}")
        tell(f"repeat {repeat + 1} of {options.repeats}, images/s: {', '.join(rates)}")
    diverged = [bench.has_diverged(entry) for entry in entries]
    return _summaries(entries, diverged) if world.seat.rank == 0 else ()


class _Bench:
    """The part of a comparison that is this process's: where it sits, and the microbatches that it feeds."""

    def __init__(self, first: Checked, world: Alone | World, device: torch.device) -> None:
        self._world = world
        self._device = device
        self._data = build.open_data_here(first.plan, world)
        self._microbatches = prepare_microbatches(first.plan, self._data, device)
        self._batch_size = world.share(len(self._microbatches[0][1]) if self._microbatches else 0)

    def enter(self, checked: Checked, options: Options) -> _Entry:
        """Build a variant and train on a first segment; its memory is watched from before the build."""
        gc.collect()
        with _out_of_memory_named(checked.variant.text), watched_memory(self._device) as peak:
            contender, plan = build_contender(checked, self._world, self._data)
            plan_for = partial(
                plan_segment, ahead=contender.ahead, accumulation=contender.pipeline.accumulation
            )
            # Two groups with a full pipeline: the second one finds the optimiser's state made by the first.
            short = plan_for(microbatches=1, warmup=1)
            peak.counts_from_here()
            contender.train(self._microbatches, count=short.total)
        return _Entry(
            contender=contender,
            plan=plan,
            segment=plan_for(microbatches=options.microbatches, warmup=options.warmup),
            peak_memory_bytes=self._world.gather(peak.bytes),
            stages=self._world.gather(tuple(stage.index for stage in contender.pipeline.stages)),
            rounds=[],
        )

    def run(self, entry: _Entry) -> None:
        """Measure one repeat."""
        gc.collect()
        self._world.barrier()
        with _out_of_memory_named(entry.contender.name):
            measured = measure_round(
                entry.contender,
                self._microbatches,
                segment=entry.segment,
                batch_size=self._batch_size,
                has_last_stage=self._world.seat.is_last,
                synchronize=self._synchronize,
            )
        entry.rounds.append(self._world.gather(measured))

    def has_diverged(self, entry: _Entry) -> bool:
        """Tell whether the loss stopped being a number, in any process."""
        loss, _ = entry.contender.pipeline.stages[-1].totals.means()
        return any(self._world.gather(self._world.seat.is_last and not math.isfinite(loss)))

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def prepare_microbatches(
    plan: build.CheckedPlan, data: build.DataHere, device: torch.device
) -> list[Microbatch] | None:
    """Return the first few microbatches of the recipe's training data, on the device.

    None where no images enter.
    """
    if data.training is None:
        return None
    placement = dataclasses.replace(build.evaluation_placement(plan), device=device)
    batches = itertools.islice(data.training.epoch(0), PREPARED)
    placed = [(placement.images(batch), placement.labels(batch)) for batch in batches]
    # The last one of an epoch may be smaller: images/s would be wrong.
    return [(images, labels) for images, labels in placed if len(labels) == len(placed[0][1])]


def build_contender(
    checked: Checked, world: Alone | World, data: build.DataHere | None = None
) -> tuple[Contender, PlanMade]:
    """Build a variant's pipeline, for this process."""
    built = build.build(checked.plan, world=world if isinstance(world, World) else None, data=data)
    name, ahead = checked.variant.text, max(checked.plan.lookahead, default=0)
    contender = Contender(
        name,
        built.pipeline,
        ahead,
        usage=usage_of(built.pipeline),
        segment_usage=segment_usage_of(built.pipeline, checked.plan),
    )
    return contender, built.plan


def _told(checked: Sequence[Checked], tell: Tell) -> Iterator[Checked]:
    for number, each in enumerate(checked, start=1):
        tell(f"variant {number} of {len(checked)}, {each.variant.text}: {each.plan.summary}")
        yield each


@contextmanager
def _out_of_memory_named(name: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"{name}: out of memory: {str(error).splitlines()[0]}",
            hint="all variants are held at once: compare fewer, or lower data.batch_size",
        ) from error


def _summaries(entries: Sequence[_Entry], diverged: Sequence[bool]) -> tuple[Measurement, ...]:
    rates = [tuple(rate_of(rounds) for rounds in entry.rounds) for entry in entries]
    return tuple(
        Measurement(
            variant=entry.contender.name,
            plan=entry.plan,
            segment=entry.segment,
            images_per_s=Spread(own),
            ratio=Spread(tuple(a / b for a, b in zip(own, rates[0], strict=True))),
            processes=summarise_processes(
                entry.rounds, stages=entry.stages, peak_memory_bytes=entry.peak_memory_bytes
            ),
            has_diverged=broken,
        )
        for entry, own, broken in zip(entries, rates, diverged, strict=True)
    )
