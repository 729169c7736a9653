"""From units, cuts and an estimator to stages that learn block by block."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from petractl.engine.assembly import UpdaterFactory, stage_bounds
from petractl.engine.block_stage import BlockStage
from petractl.estimator import Estimator
from petractl.methods.block import Loss, OwnLoss, Row
from petractl.methods.evaluation import Evaluator
from petractl.methods.learner import Guessing, Learner
from petractl.methods.rest import Rest
from petractl.models.auxiliary_nets import AuxiliaryNet


@dataclass(frozen=True, slots=True)
class Auxiliaries:
    """A block's auxiliary nets: one that learns from the block's own loss, one for guesses; None for none."""

    learning: AuxiliaryNet | None = None
    guessing: AuxiliaryNet | None = None


def auxiliary_name(last_unit: int) -> str:
    """Return what an auxiliary net is called, by the last unit of its block, as parameters are by theirs."""
    return f"auxiliary.{last_unit}"


def assemble_blocks(
    units: Sequence[nn.Module],
    *,
    names: Sequence[str],
    cuts: Sequence[int],
    choice: Estimator,
    auxiliaries: Sequence[Auxiliaries],
    num_streams: Sequence[int],
    make_updater: UpdaterFactory,
    loss: Loss,
    seed: int,
    device: torch.device,
    autocast_dtype: torch.dtype | None = None,
    wanted: Collection[int] | None = None,
) -> list[BlockStage]:
    """Build the stages of a net, or those wanted.

    `auxiliaries` has an entry per block, `num_streams` one per unit: how many streams go in. Auxiliary nets
    are on `device` already. Where blocks look through those above, all must be wanted.
    """
    bounds = stage_bounds(cuts, num_units=len(units))
    last = len(bounds) - 1

    def evaluator(module: nn.Module, *, index: int, name: str) -> Evaluator:
        return Evaluator(
            module, index=index, name=name, seed=seed, device=device, autocast_dtype=autocast_dtype
        )

    def own_loss(block: int, net: AuxiliaryNet | None) -> OwnLoss | None:
        if net is None:
            return OwnLoss(loss) if block == last else None
        name = f"auxiliary net of block {block}"
        return OwnLoss(loss, evaluator(net, index=len(units) + block, name=name))

    rows = [
        Row([evaluator(units[n], index=n, name=names[n]) for n in range(*bound)], input_gradient=bound[0] > 0)
        for bound in bounds
    ]
    losses = [own_loss(j, auxiliaries[j].learning) for j in range(len(bounds))]
    stages = []
    for j, (first, end) in enumerate(bounds):
        if wanted is not None and j not in wanted:
            continue
        nets = auxiliaries[j]
        named = [
            (f"units.{n}.{name}", p) for n in range(first, end) for name, p in units[n].named_parameters()
        ]
        if nets.learning is not None:
            prefix = auxiliary_name(end - 1)
            named += [(f"{prefix}.{name}", p) for name, p in nets.learning.named_parameters()]
        learner = Learner(
            rows[j],
            choice,
            index=j,
            num_blocks=len(bounds),
            own_loss=losses[j],
            guessing=_guessing(choice, nets.guessing, own_loss(j, nets.guessing)),
            above=Rest(list(zip(rows, losses, strict=True))[j + 1 :]) if j < last else None,
            seed=seed,
            device=device,
        )
        stages.append(
            BlockStage(
                learner,
                index=j,
                updater=make_updater([(name, p) for name, p in named if p.requires_grad]),
                num_streams=num_streams[first],
            )
        )
    return stages


def _guessing(choice: Estimator, net: AuxiliaryNet | None, loss: OwnLoss | None) -> Guessing | None:
    if net is None or loss is None:
        return None
    return Guessing(net, loss, is_new_each_time=choice.guess == "ntk")
