"""What to say when memory is not enough: what each stage needs, and what would fit."""

from collections.abc import Sequence
from itertools import groupby

import torch

from petractl.build.layout import IN_PROCESS, device_of, exact_schedule
from petractl.build.parts import autocast_dtype, build_units, wire_formats
from petractl.build.plan import CheckedPlan
from petractl.engine.assembly import stage_bounds
from petractl.engine.memory_left import MemoryLeft
from petractl.planning.costing import Clock, cost_net
from petractl.planning.devices import DeviceSpec
from petractl.planning.fit import Cut, Room, fewest_stages, fits, largest_batch, stage_bytes
from petractl.planning.net import Net
from petractl.planning.plan import Setting, lookahead_of

_GIB = 2**30
_MIB = 2**20


def memory_advice(plan: CheckedPlan, *, stage: int | None, left: MemoryLeft | None) -> tuple[str, str]:
    """Return what the memory model says of a run that had not enough memory, and what to do about it.

    `stage` is the one that failed, None where all are in one process. `left` is what this process could still
    take after it was built and before the first step. Of blocks and their auxiliary nets there is no model.
    """
    recipe = plan.recipe
    if plan.choice is not None:
        return "", f"lower data.batch_size (now {recipe.data.batch_size})"
    net, cut = _net(plan, recipe.data.batch_size), _cut(plan, recipe.method.accumulation)
    sizes = stage_bytes(net, cut)
    need = f"by the memory model {_needs(plan, sizes, stage)} with data.batch_size = {net.batch_size}"
    if left is None:
        return need, "lower data.batch_size"
    rooms = _rooms(plan, net, left)
    room = next(each for each in rooms if (stage or 0) in each.stages)
    what = f"{need}, and there are {in_words(room.bytes)}{' for it' if len(rooms) > 1 else ''}"
    if fits(net, cut, rooms):
        return what, (
            "so something else takes memory: other processes, data.workers, data.resident; "
            f"a smaller data.batch_size needs less (now {net.batch_size})"
        )
    return what, _remedy(plan, net, cut, rooms)


def _remedy(plan: CheckedPlan, net: Net, cut: Cut, rooms: Sequence[Room]) -> str:
    """Return the largest batch that fits, with the k that keeps an update's samples, and enough stages."""
    ways = []
    batch, k = _smaller_batch(plan, net, cut, rooms)
    if batch:
        same = "for as many samples per update"
        ways.append(f"data.batch_size = {batch} fits, with method.accumulation = {k} {same}")
    if plan.layout.mode != IN_PROCESS and len(rooms) > 1:
        most = min(room.bytes for room in rooms)
        stages = fewest_stages(
            net, more_than=plan.num_stages, accumulation=cut.accumulation, device_bytes=most
        )
        if stages:
            ways.append(f"{stages} stages on as many such devices fit (partition.stages)")
    return "; or ".join(ways) or "nothing smaller fits either: take a smaller model.width, or other devices"


def _smaller_batch(plan: CheckedPlan, net: Net, cut: Cut, rooms: Sequence[Room]) -> tuple[int, int]:
    """Return (batch size, k), or zeros: scaled from what is known, then traced until it is right."""
    wanted = plan.recipe.data.batch_size * plan.recipe.method.accumulation
    batch = largest_batch(net, cut, rooms)
    while batch:
        k = -(-wanted // batch)
        net, cut = _net(plan, batch), _cut(plan, k)
        if fits(net, cut, rooms):
            return batch, k
        batch = min(batch - 1, largest_batch(net, cut, rooms))
    return 0, 0


def _net(plan: CheckedPlan, batch_size: int) -> Net:
    recipe, info = plan.recipe, plan.info
    with torch.device("meta"):
        model = build_units(recipe, classes=plan.classes, stem=plan.stem, channels=info.channels)
    channels_last = recipe.model.memory_format == "channels-last"
    return cost_net(
        model.units,
        model.names,
        method=plan.method,
        input_shape=(info.channels, info.height, info.width),
        batch_size=batch_size,
        clock=Clock(None, autocast_dtype(recipe), channels_last),
        optimizer=recipe.optimizer.name,
        host_buffers=_devices(plan)[0].type != "cuda",
        compared=False,
        number_formats=wire_formats(recipe),
    )


def _cut(plan: CheckedPlan, k: int) -> Cut:
    """Return the cut with the microbatches that are in flight at once; exact pipelines have their own."""
    stages, exact = plan.num_stages, exact_schedule(plan.recipe)
    lookahead = plan.lookahead
    if exact:
        setting = Setting(
            devices=(DeviceSpec(""),) * stages,
            speeds=(1.0,) * stages,
            schedule="1f1b" if exact == "interleaved-1f1b" else exact,
            accumulation=k,
        )
        lookahead = lookahead_of(setting, locked=True, least=None)
    return Cut(plan.cuts, lookahead, k)


def _devices(plan: CheckedPlan) -> list[torch.device]:
    """Return the device of every stage, of the first replica."""
    layout = plan.layout
    if layout.mode == IN_PROCESS:
        return [plan.device] * plan.num_stages
    count = layout.num_processes
    places = [
        device_of(plan.recipe, layout, rank=place, local_rank=place, local_world_size=count)
        for place in range(layout.num_places)
    ]
    return [places[stage % layout.num_places] for stage in range(plan.num_stages)]


def _rooms(plan: CheckedPlan, net: Net, left: MemoryLeft) -> list[Room]:
    """Return who shares what: a device, or where the limit is a process's own, a process.

    What is left was left with the parameters there.
    """
    places, devices = plan.layout.num_places, _devices(plan)
    alone = plan.layout.mode == IN_PROCESS

    def owner(stage: int) -> str:
        by_process = devices[stage].type == "cpu" and not left.shared and not alone
        return str(stage % places) if by_process else str(devices[stage])

    order = sorted(range(plan.num_stages), key=lambda stage: (owner(stage), stage))
    rooms = []
    for _, group in groupby(order, key=owner):
        stages = tuple(group)
        copies = plan.layout.num_replicas if left.shared and devices[stages[0]].type == "cpu" else 1
        bounds = stage_bounds(plan.cuts, num_units=net.num_units)
        units = [n for stage in stages for n in range(*bounds[stage])]
        parameters = sum(net.footprints[n].parameters + net.footprints[n].buffers for n in units)
        rooms.append(Room(stages, left.bytes // copies + parameters))
    return rooms


def _needs(plan: CheckedPlan, sizes: Sequence[int], stage: int | None) -> str:
    most = max(range(len(sizes)), key=sizes.__getitem__) if stage is None else stage
    first, end = stage_bounds(plan.cuts, num_units=len(plan.names))[most]
    units = f"unit {first}" if end - first == 1 else f"units {first} to {end - 1}"
    own = f"stage {most} ({units}) needs {in_words(sizes[most])}"
    if len(sizes) == 1:
        return f"the net needs {in_words(sizes[0])}"
    return own if stage is not None else f"{own}, the most, and all stages {in_words(sum(sizes))}"


def in_words(count: int) -> str:
    """Return a number of bytes in the unit that suits it."""
    return f"{count / _GIB:,.1f} GiB" if count >= _GIB else f"{count / _MIB:,.0f} MiB"
