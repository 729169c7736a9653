"""The rest of the net above a block that may look through it: derivatives and gradients of losses.

Tangents are carried block by block to the loss, and nothing of a block is kept once its neighbour has what it
gave: the memory is that of one block, whatever the depth.
"""

from collections.abc import Sequence

from torch import Tensor

from petractl.estimator import Statistics
from petractl.methods.block import OwnLoss, Row, Setting
from petractl.models.units import Streams


class Rest:
    """The blocks above one, the lowest first, each with its own loss; the last one's is the net's."""

    def __init__(self, blocks: Sequence[tuple[Row, OwnLoss | None]]) -> None:
        assert blocks, "nothing is above the last block"
        self._blocks = blocks

    def derivatives(
        self,
        loss: str,
        outputs: Streams,
        tangents: Sequence[Streams],
        labels: Tensor,
        *,
        microbatch: int,
        statistics: Statistics,
    ) -> Tensor:
        """Return how every sample's share of a loss moves along K tangents of the block's outputs, (K, n).

        `loss`: "global", or "above", the next block's own.
        """
        carried = list(tangents)
        for row, own in self._up_to(loss):
            setting = _now(row, microbatch)
            outputs, carried = row.push(outputs, carried, setting, statistics=statistics)
            last = own
        assert last is not None
        return last.derivatives(outputs, carried, labels, microbatch=microbatch, statistics=statistics)

    def gradient(self, loss: str, outputs: Streams, labels: Tensor, *, microbatch: int) -> Streams:
        """Return the gradient of a loss at the block's outputs, by backpropagation through the rest."""
        graphs = []
        for row, own in self._up_to(loss):
            graphs.append(row.linearize(outputs, _now(row, microbatch), live=False))
            outputs = tuple(y.detach() for y in graphs[-1].outputs)
            last = own
        assert last is not None
        gradients = last.gradient(outputs, labels, microbatch=microbatch).at_outputs
        while graphs:
            gradients, _ = graphs.pop().vjp(gradients)
        return gradients

    def _up_to(self, loss: str) -> Sequence[tuple[Row, OwnLoss | None]]:
        return self._blocks[:1] if loss == "above" else self._blocks


def _now(row: Row, microbatch: int) -> Setting:
    return Setting(microbatch, [None] * len(row.evaluators))
