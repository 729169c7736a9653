"""Cuts and lookaheads that need more than FLOPs: measured times, or memory.

They are chosen once, by the process that checks a run first, and written to `resolved.toml`: measuring again
elsewhere would choose others.
"""

from collections.abc import Sequence

import torch

from petractl.build.layout import IN_PROCESS, Mode, exact_schedule
from petractl.build.parts import autocast_dtype, num_threads, wire_formats
from petractl.data import DataInfo
from petractl.data.worker_processes import usable_cores
from petractl.engine.schedule import lookaheads
from petractl.errors import UserError
from petractl.methods.family import MethodSpec
from petractl.models.registry import BuiltModel
from petractl.planning.costing import Clock, cost_net
from petractl.planning.devices import DeviceSpec
from petractl.planning.least import least_lookahead
from petractl.planning.net import Net
from petractl.planning.plan import Setting, choose_cuts
from petractl.planning.times import Link
from petractl.recipe.schema import Recipe

MEASURED_BALANCES = ("time", "memory")


def measured_cuts(
    recipe: Recipe,
    model: BuiltModel,
    *,
    spec: MethodSpec,
    info: DataInfo,
    num_stages: int,
    device: torch.device,
    mode: Mode,
) -> tuple[int, ...]:
    """Return the first units of stages 1 ... J-1 that make time or memory even, as `partition` does.

    On GPUs of several processes no stage gets more than fits in one.

    Raises:
        UserError: more stages than units, or nothing fits.
    """
    balance = recipe.partition.balance
    processes = _num_processes(recipe, mode, num_stages=num_stages)
    timed_on = device if balance == "time" else None
    net = _net(recipe, model, spec=spec, info=info, timed_on=timed_on, processes=processes)
    memory = _memory_bytes(device) if mode != IN_PROCESS else None
    setting = Setting(
        devices=(DeviceSpec(str(device), memory_bytes=memory),) * num_stages,
        speeds=(1.0,) * num_stages,
        schedule=_schedule(recipe, spec, num_stages=num_stages),
        accumulation=recipe.method.accumulation,
        balance=balance,
    )
    cuts = choose_cuts(net, setting)
    if cuts is None:
        raise UserError(
            f"no cut into {num_stages} stages fits in the memory of {device}",
            where="partition.stages",
            hint="more stages, a smaller data.batch_size or a larger method.accumulation: "
            "`petractl partition` says what fits",
        )
    return cuts


def least_lookaheads(
    recipe: Recipe,
    model: BuiltModel,
    *,
    spec: MethodSpec,
    info: DataInfo,
    cuts: Sequence[int],
    device: torch.device,
    mode: Mode,
) -> tuple[int, ...]:
    """Return the smallest lookaheads that cost no throughput, by the stages' and messages' measured times."""
    stages = len(cuts) + 1
    processes = _num_processes(recipe, mode, num_stages=stages)
    net = _net(recipe, model, spec=spec, info=info, timed_on=device, processes=processes)
    k = recipe.method.accumulation
    times = net.stage_times(cuts, speeds=(1.0,) * stages, accumulation=k)
    # In one process messages do not travel.
    link = Link() if mode == IN_PROCESS else net.messages.link
    return least_lookahead(times, link=link, accumulation=k)


def _net(
    recipe: Recipe,
    model: BuiltModel,
    *,
    spec: MethodSpec,
    info: DataInfo,
    timed_on: torch.device | None,
    processes: int,
) -> Net:
    """Return what the units cost; in times of `timed_on`, or in FLOPs.

    They are timed with the threads, and beside the processes, that the stages will have.
    """
    threads = num_threads(recipe, processes=processes)
    beside = max(1, min(processes, usable_cores() // threads))
    channels_last = recipe.model.memory_format == "channels-last"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.device("cpu"):  # the net itself is on the meta device
            return cost_net(
                model.units,
                model.names,
                method=spec,
                input_shape=(info.channels, info.height, info.width),
                batch_size=recipe.data.batch_size,
                clock=Clock()
                if timed_on is None
                else Clock(timed_on, autocast_dtype(recipe), channels_last, processes=beside),
                optimizer=recipe.optimizer.name,
                compared=False,
                number_formats=wire_formats(recipe),
            )
    finally:
        torch.set_num_threads(before)


def _num_processes(recipe: Recipe, mode: Mode, *, num_stages: int) -> int:
    return 1 if mode == IN_PROCESS else num_stages * recipe.engine.replicas


def _schedule(recipe: Recipe, spec: MethodSpec, *, num_stages: int) -> str | tuple[int, ...]:
    schedule = recipe.engine.schedule
    if recipe.engine.slack:
        return lookaheads("tight", num_stages=num_stages, slack=recipe.engine.slack)
    if exact_schedule(recipe) == "interleaved-1f1b":
        return "1f1b"
    return "sequential" if spec.locked and schedule == "auto" else schedule


def _memory_bytes(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)
