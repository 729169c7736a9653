"""Stages on paper: where to cut, and what each stage of a cut net has, costs and keeps."""

from collections.abc import Sequence

from petractl.engine.assembly import stage_bounds
from petractl.events import StagePlan
from petractl.methods.family import Keep, Keeping
from petractl.planning.auxiliary_cost import AuxiliaryCost
from petractl.planning.flops import UnitCost
from petractl.planning.net import FORWARDS
from petractl.planning.partition import partition, partition_uniform


def balanced_cuts(
    costs: Sequence[UnitCost], *, kept: Sequence[Keeping], num_stages: int, balance: str
) -> tuple[int, ...]:
    """Return the first units of stages 1 ... J-1, made even by "flops", "parameters" or "uniform".

    Raises:
        UserError: fewer than one stage, or more stages than units.
    """
    if balance == "uniform":
        return partition_uniform(len(costs), num_stages)
    if balance == "parameters":
        return partition([cost.parameters for cost in costs], num_stages)
    assert balance == "flops", balance
    passes = [FORWARDS[item.keep] for item in kept]
    return partition([cost.flops * n for cost, n in zip(costs, passes, strict=True)], num_stages)


def stage_plans(
    *,
    names: Sequence[str],
    kept: Sequence[Keeping],
    costs: Sequence[UnitCost],
    cuts: Sequence[int],
    lookahead: Sequence[int],
    accumulation: int,
    devices: Sequence[str] = (),
    alone: bool = False,
    auxiliary: Sequence[AuxiliaryCost] = (),
) -> tuple[StagePlan, ...]:
    """Return what a person reads of each stage before the first step.

    `alone`: nothing comes down to the stages, which have forward and backward in one.
    """
    bounds = stage_bounds(cuts, num_units=len(costs))
    last = len(bounds) - 1
    return tuple(
        StagePlan(
            index=j,
            units=_unit_names(names[first:end]),
            num_units=end - first,
            parameters=sum(cost.parameters for cost in costs[first:end]),
            flops=float(sum(cost.flops for cost in costs[first:end])),
            # Forward and backward are one operation there: nothing waits.
            keeps="nothing" if j == last or alone else _kept_words(kept[first:end]),
            lookahead=lookahead[j],
            staleness_updates=lookahead[j] / accumulation,
            device=devices[j] if devices else "",
            auxiliary_percent=_percent(auxiliary[j].share) if j < len(auxiliary) else None,
        )
        for j, (first, end) in enumerate(bounds)
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100.0 * share


def _unit_names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} ... {names[-1]}"


def _kept_words(kept: Sequence[Keeping]) -> str:
    words = []
    for keep, noun in ((Keep.GRAPH, "graph"), (Keep.INPUT, "input")):
        count = sum(item.keep is keep for item in kept)
        if count:
            words.append(noun if len(kept) == 1 else f"{noun} of {count} of {len(kept)} units")
    if any(item.parameters and item.keep is not Keep.GRAPH for item in kept):
        words.append("parameters")
    return " + ".join(words) or "nothing"
