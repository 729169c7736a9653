"""ResNets whose units are the blocks of local learning: the stem is in the first, the head in the last.

The splits are those of Fournier et al., "Can Forward Gradient Match Backpropagation?" (ICML 2023). A block is
what learns by itself, from an auxiliary net of its own, so it is the unit, and `partition.stages = "units"`
makes a stage of each. The head has a batch norm before its pool. Widths and strides are ResNet-18's, in
residual blocks or in plain convolutions; the split in 2 has the first two groups alone.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from petractl.models.registry import BuiltModel, ModelShape, register_model
from petractl.models.resnet import BasicBlock, ResNetStem, conv3x3, initialise


class PlainBlock(nn.Module):
    """One convolution and no skip, conv3x3-BN-ReLU: (n, in, h, w) to (n, out, h/stride, w/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride=stride)
        self.bn1 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(BN(conv(x)))."""
        return F.relu(self.bn1(self.conv1(x)), inplace=True)


class NormalisedHead(nn.Module):
    """Batch norm, global average pool and linear classifier: (n, c, h, w) to logits (n, classes)."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.fc = nn.Linear(in_channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return cast(Tensor, self.fc(F.adaptive_avg_pool2d(self.bn(x), 1).flatten(1)))


def _assemble(
    shape: ModelShape, *, block: Callable[[int, int, int], nn.Module], groups: Sequence[int], per_unit: int
) -> BuiltModel:
    """Put together groups of blocks, `per_unit` of them in each unit, the stem before, the head after them.

    `block(in_channels, out_channels, stride)`; `groups` counts the blocks of each group.
    """
    blocks, channels = _blocks(shape.width, block=block, groups=groups)
    rows = [blocks[first : first + per_unit] for first in range(0, len(blocks), per_unit)]
    rows[0].insert(0, ("stem", ResNetStem(shape.in_channels, shape.width, shape.stem)))
    rows[-1].append(("head", NormalisedHead(channels, shape.classes)))
    units = [_in_a_row(row) for row in rows]
    initialise(units)
    return BuiltModel(units, tuple(" + ".join(name for name, _ in row) for row in rows))


def _blocks(
    width: int, *, block: Callable[[int, int, int], nn.Module], groups: Sequence[int]
) -> tuple[list[tuple[str, nn.Module]], int]:
    """Return the blocks under their names, and the channels of the last one.

    A group has twice the width of the one before and halves the sides.
    """
    blocks, channels = [], width
    for group, count in enumerate(groups):
        for index in range(count):
            down = group > 0 and index == 0
            name = f"block{group + 1}.{index + 1}{' (down)' if down else ''}"
            blocks.append((name, block(channels, width * 2**group, 2 if down else 1)))
            channels = width * 2**group
    return blocks, channels


def _in_a_row(named: list[tuple[str, nn.Module]]) -> nn.Module:
    """Return a module alone as it is, several as one, under the names of the parts ("block2_1")."""
    if len(named) == 1:
        return named[0][1]
    parts = ((name.partition(" ")[0].replace(".", "_"), module) for name, module in named)
    return nn.Sequential(OrderedDict(parts))


@register_model
def resnet18_2b(shape: ModelShape) -> BuiltModel:
    """First half of a ResNet-18 in 2 blocks for local learning, of two residual blocks each."""
    return _assemble(shape, block=BasicBlock, groups=(2, 2), per_unit=2)


@register_model
def resnet18_8b(shape: ModelShape) -> BuiltModel:
    """ResNet-18 in 8 blocks for local learning, of one residual block each."""
    return _assemble(shape, block=BasicBlock, groups=(2, 2, 2, 2), per_unit=1)


@register_model
def resnet18_16b(shape: ModelShape) -> BuiltModel:
    """ResNet-18 without skips in 16 blocks for local learning, of one convolution each, two in the first."""
    return _assemble(shape, block=PlainBlock, groups=(4, 4, 4, 4), per_unit=1)
