"""Which processes run a recipe, and on which devices.

A process holds one stage (two with interleaved schedules) of one replica. Without a word from the recipe, a
run stays in one process, unless it was started as several, or asks for what only several can do, or finds two
GPUs.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch

from petractl.engine.exact_rules import EXACT_SCHEDULES, exact_schedule_problem, stages_per_process
from petractl.engine.world import Launch, Seat
from petractl.errors import Problem
from petractl.recipe.schema import Recipe

Mode = Literal["in-process", "processes"]

IN_PROCESS: Final = "in-process"
PROCESSES: Final = "processes"


@dataclass(frozen=True, slots=True)
class Layout:
    """The processes of a run: P places in R replicas, each with `stages_per_process` stages."""

    mode: Mode
    num_places: int = 1
    num_replicas: int = 1
    stages_per_process: int = 1

    @property
    def num_processes(self) -> int:
        """P x R."""
        return self.num_places * self.num_replicas

    def seat(self, rank: int) -> Seat:
        """Return where a rank sits."""
        return Seat.of_rank(rank, num_places=self.num_places, num_replicas=self.num_replicas)

    def stages_of(self, place: int) -> range:
        """Return the stages of a place: p, p + P, ..."""
        return range(place, self.num_places * self.stages_per_process, self.num_places)


def exact_schedule(recipe: Recipe) -> str:
    """Return the name of the exact pipeline schedule, "" if there is none."""
    schedule = recipe.engine.schedule
    return schedule if isinstance(schedule, str) and schedule in EXACT_SCHEDULES else ""


def choose_mode(recipe: Recipe, launch: Launch | None) -> Mode:
    """Return "in-process" or "processes"."""
    engine = recipe.engine
    if engine.mode != "auto":
        return engine.mode
    choice = recipe.method.estimator
    if recipe.diagnostics.every or (choice is not None and choice.probes):
        return IN_PROCESS  # both look into all stages
    several_gpus = engine.device in ("auto", "cuda") and torch.cuda.device_count() >= 2
    asked = engine.replicas > 1 or bool(engine.devices) or bool(exact_schedule(recipe))
    asked = asked or engine.backend != "auto"
    started = launch is not None and launch.world_size > 1
    return PROCESSES if asked or started or several_gpus else IN_PROCESS


def automatic_stages(recipe: Recipe, launch: Launch | None, *, num_units: int) -> int:
    """Return how many stages a run in processes has where the recipe leaves it open."""
    per_process = stages_per_process(exact_schedule(recipe)) if exact_schedule(recipe) else 1
    return max(1, min(num_units, per_process * max(1, _workplaces(recipe, launch) // recipe.engine.replicas)))


def _workplaces(recipe: Recipe, launch: Launch | None) -> int:
    if launch is not None:
        return launch.world_size
    devices, schedule = recipe.engine.devices, recipe.engine.schedule
    if not isinstance(schedule, str):
        return len(schedule) * recipe.engine.replicas
    if devices:
        return len(devices)
    gpus = torch.cuda.device_count() if recipe.engine.device in ("auto", "cuda") else 0
    return gpus or len(os.sched_getaffinity(0))


def choose_layout(recipe: Recipe, mode: Mode, *, num_stages: int) -> Layout:
    """Return the processes of a run of `num_stages` stages."""
    if mode == IN_PROCESS:
        return Layout(IN_PROCESS)
    per_process = stages_per_process(exact_schedule(recipe)) if exact_schedule(recipe) else 1
    return Layout(PROCESSES, -(-num_stages // per_process), recipe.engine.replicas, per_process)


def layout_problems(
    recipe: Recipe, layout: Layout, launch: Launch | None, *, num_stages: int
) -> list[Problem]:
    """Return what does not fit: the world's size, the devices, the schedule."""
    if layout.mode == IN_PROCESS:
        return _in_process_problems(launch)
    problems = _device_problems(recipe, layout)
    if recipe.engine.backend == "nccl" and not torch.cuda.device_count():
        what = '"nccl" needs a GPU for every process, and there is none here'
        problems.append(Problem("engine.backend", what, 'set engine.backend = "auto"'))
    if launch is not None and launch.world_size != layout.num_processes:
        problems.append(_world_problem(layout, launch.world_size, num_stages))
    schedule = exact_schedule(recipe)
    if schedule:
        wrong = exact_schedule_problem(
            schedule,
            num_stages=num_stages,
            num_places=layout.num_places,
            accumulation=recipe.method.accumulation,
        )
        if wrong:
            what, _, hint = wrong.partition(": ")
            problems.append(Problem("engine.schedule", what, hint))
    return problems


def _in_process_problems(launch: Launch | None) -> list[Problem]:
    if launch is None or launch.world_size == 1:
        return []
    what = f'"in-process" is one process, but {launch.world_size} were started'
    return [Problem("engine.mode", what, 'set engine.mode = "processes", or start it without torchrun')]


def _world_problem(layout: Layout, world_size: int, num_stages: int) -> Problem:
    per = layout.stages_per_process
    stages = f"stages({num_stages})" + (f" / {per} per process" if per > 1 else "")
    product = f"{stages} x replicas({layout.num_replicas}) = {layout.num_processes} processes"
    hint = f"start {layout.num_processes}"
    if world_size % layout.num_replicas == 0:
        hint += f", or set partition.stages = {world_size // layout.num_replicas * per}"
    return Problem("partition.stages", f"{product}, but {world_size} were started", hint)


def _device_problems(recipe: Recipe, layout: Layout) -> list[Problem]:
    devices, places = recipe.engine.devices, layout.num_places
    if devices and len(devices) not in (places, layout.num_processes):
        per = layout.stages_per_process
        what = f"{len(devices)} devices are given for {places} processes of a pipeline"
        if layout.num_replicas > 1:
            what += f" (and {layout.num_processes} of all {layout.num_replicas} replicas)"
        hint = f"give {places}" + (f", one for every {per} stages" if per > 1 else ", one per stage")
        return [Problem("engine.devices", what, hint)]
    missing = missing_gpus(devices)
    if missing:
        there = torch.cuda.device_count()
        what = f"{', '.join(missing)}: " + (f"there are {there} GPUs" if there else "no usable GPU here")
        return [Problem("engine.devices", what, "name GPUs of this machine; several stages may share one")]
    return []


def missing_gpus(devices: Sequence[str]) -> list[str]:
    """Return those of the devices that this machine does not have."""
    count = torch.cuda.device_count()
    found = [torch.device(name) for name in dict.fromkeys(devices)]
    return [str(device) for device in found if device.type == "cuda" and (device.index or 0) >= count]


def device_of(
    recipe: Recipe, layout: Layout, *, rank: int, local_rank: int, local_world_size: int
) -> torch.device:
    """Return the device of a process; where processes outnumber the GPUs, neighbours share one."""
    engine, seat = recipe.engine, layout.seat(rank)
    if engine.devices:
        per_replica = len(engine.devices) == layout.num_places
        return torch.device(engine.devices[seat.place if per_replica else rank])
    count = torch.cuda.device_count()
    if engine.device == "cpu" or (engine.device == "auto" and not count):
        return torch.device("cpu")
    if engine.device in ("auto", "cuda"):
        return torch.device("cuda", local_rank * count // max(count, local_world_size))
    return torch.device(engine.device)
