"""What the auxiliary nets cost beside the blocks that they are for, without computing (see `flops`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from petractl.models.units import Streams
from petractl.planning.flops import UnitCost, unit_costs


@dataclass(frozen=True, slots=True)
class AuxiliaryCost:
    """Forward FLOPs per sample and parameters of an auxiliary net, and the forward FLOPs of its block."""

    flops: int
    parameters: int
    block_flops: int

    @property
    def share(self) -> float | None:
        """The net's FLOPs over the block's; None for a block that has none."""
        return self.flops / self.block_flops if self.block_flops else None


class _Source(nn.Module):
    """Streams of given shapes, whatever comes in."""

    def __init__(self, cost: UnitCost) -> None:
        super().__init__()
        self._shapes, self._dtypes = cost.output_shapes, cost.output_dtypes

    def forward(self, x: Tensor) -> Streams:
        """Return streams of the batch size of x."""
        return tuple(
            torch.empty(len(x), *shape, dtype=dtype, device=x.device)
            for shape, dtype in zip(self._shapes, self._dtypes, strict=True)
        )


def auxiliary_costs(
    auxiliaries: Sequence[nn.Module], costs: Sequence[UnitCost], *, cuts: Sequence[int]
) -> list[AuxiliaryCost]:
    """Return what the auxiliary net of every block but the last costs.

    `costs` are the units', `cuts` the first unit of every block but the first.
    """
    found = []
    for auxiliary, first, end in zip(auxiliaries, [0, *cuts][:-1], cuts, strict=True):
        _, own = unit_costs([_Source(costs[end - 1]), auxiliary], input_shape=(1,))
        block_flops = sum(cost.flops for cost in costs[first:end])
        found.append(AuxiliaryCost(own.flops, own.parameters, block_flops))
    return found
