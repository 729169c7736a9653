"""Cuts and lookaheads that need more than FLOPs: measured times, or memory.

They are chosen once, by the process that checks a run first, and written to `resolved.toml`: measuring again
elsewhere would choose others.
"""

from collections.abc import Sequence

import torch
from torch import nn

from petractl.build.parts import autocast_dtype
from petractl.data import DataInfo
from petractl.engine.schedule import lookaheads
from petractl.methods.family import Keeping, MethodSpec
from petractl.planning.costing import Clock, cost_net
from petractl.planning.flops import UnitCost
from petractl.planning.least import least_lookahead
from petractl.planning.stages import planned_cuts
from petractl.recipe.schema import Recipe

MEASURED_BALANCES = ("time", "memory")


def measured_cuts(
    recipe: Recipe,
    units: Sequence[nn.Module],
    costs: Sequence[UnitCost],
    *,
    spec: MethodSpec,
    kept: Sequence[Keeping],
    info: DataInfo,
    num_stages: int,
    device: torch.device,
) -> tuple[int, ...]:
    """Return the first units of stages 1 ... J-1 that make time or memory even.

    Raises:
        UserError: more stages than units.
    """
    schedule = recipe.engine.schedule
    if not isinstance(schedule, str) or schedule not in ("tight", "paper"):
        schedule = "sequential" if spec.locked else "tight"
    with torch.device("cpu"):  # the net itself is on the meta device
        return planned_cuts(
            units,
            costs,
            kept=kept,
            lookahead=lookaheads(schedule, num_stages=num_stages, slack=recipe.engine.slack),
            balance=recipe.partition.balance,
            input_shape=(info.channels, info.height, info.width),
            batch_size=recipe.data.batch_size,
            accumulation=recipe.method.accumulation,
            optimizer=recipe.optimizer.name,
            clock=_clock(recipe, device),
        )


def least_schedule(
    recipe: Recipe,
    units: Sequence[nn.Module],
    names: Sequence[str],
    *,
    spec: MethodSpec,
    info: DataInfo,
    cuts: Sequence[int],
    device: torch.device,
) -> tuple[int, ...]:
    """Return the smallest lookaheads that cost no throughput, by the stages' measured times."""
    with torch.device("cpu"):
        net = cost_net(
            units,
            names,
            method=spec,
            input_shape=(info.channels, info.height, info.width),
            batch_size=recipe.data.batch_size,
            clock=_clock(recipe, device),
            optimizer=recipe.optimizer.name,
        )
    times = net.stage_times(cuts, speeds=(1.0,) * (len(cuts) + 1))
    return least_lookahead(times, accumulation=recipe.method.accumulation)


def _clock(recipe: Recipe, device: torch.device) -> Clock:
    channels_last = recipe.model.memory_format == "channels-last"
    return Clock(device, autocast_dtype(recipe), channels_last)
