"""From units, cuts and a method to stages."""

from collections.abc import Callable, Collection, Sequence
from itertools import pairwise

import torch
from torch import nn

from petractl.engine.stage import Loss, Stage
from petractl.engine.update import Updater
from petractl.methods.evaluation import Evaluator
from petractl.methods.family import Keep, MethodSpec, keepings
from petractl.methods.keeping import build_keeper
from petractl.models.units import is_reversible

UpdaterFactory = Callable[[list[tuple[str, nn.Parameter]]], Updater]
"""(name, parameter) pairs of a stage -> its updater; names are those of the whole net."""


def stage_bounds(cuts: Sequence[int], *, num_units: int) -> list[tuple[int, int]]:
    """Return (first unit, end) of every stage; `cuts` are the first units of stages 1 ... J-1."""
    return list(pairwise([0, *cuts, num_units]))


def assemble_stages(
    units: Sequence[nn.Module],
    *,
    names: Sequence[str],
    cuts: Sequence[int],
    method: MethodSpec,
    make_updater: UpdaterFactory,
    loss: Loss,
    seed: int,
    device: torch.device,
    statistics_in_forward: bool = False,
    autocast_dtype: torch.dtype | None = None,
    wanted: Collection[int] | None = None,
) -> list[Stage]:
    """Build the stages of a net, or those wanted; parameters are named `units.<unit>.<name in the unit>`."""
    kept = keepings(method, [is_reversible(unit) for unit in units])
    bounds = stage_bounds(cuts, num_units=len(units))
    stages = []
    for j, (first, end) in enumerate(bounds):
        if wanted is not None and j not in wanted:
            continue
        keepers = [
            build_keeper(
                Evaluator(
                    units[n],
                    index=n,
                    name=names[n],
                    seed=seed,
                    device=device,
                    autocast_dtype=autocast_dtype,
                ),
                keep=kept[n].keep,
                statistics_in_forward=statistics_in_forward,
                input_gradient=n > 0,
            )
            for n in range(first, end)
        ]
        parameters = [
            (f"units.{n}.{name}", p) for n in range(first, end) for name, p in units[n].named_parameters()
        ]
        stages.append(
            Stage(
                index=j,
                keepers=keepers,
                stashes=[kept[n].parameters for n in range(first, end)],
                updater=make_updater([(name, p) for name, p in parameters if p.requires_grad]),
                loss=loss if j == len(bounds) - 1 else None,
                sends_streams=first > 0 and kept[first - 1].keep is Keep.NOTHING,
            )
        )
    return stages
