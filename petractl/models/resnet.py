"""ResNets cut into units: the stem, each residual block, the head.

He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), in torchvision's version: the stride of
a bottleneck is on its 3x3 convolution. Parameters are named as in torchvision inside each unit, so that a
torchvision state dict differs by prefixes only (see `weights.py`).

Activations may be kept or sent by whoever runs the units, so no operation here writes to a unit's input or
output; batch norm's output is the unit's own, and the ReLU that follows overwrites it (autograd needs only
the result).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from petractl.models.registry import BuiltModel, ModelShape, register_model

BOTTLENECK_EXPANSION = 4


def conv3x3(in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution that keeps the size at stride 1; no bias, a batch norm follows."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution; no bias, a batch norm follows."""
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)


def stem_conv(stem: str, in_channels: int, out_channels: int) -> nn.Conv2d:
    """Return the stem's convolution: 7x7 stride 2 for "imagenet", 3x3 stride 1 for "cifar"."""
    if stem == "imagenet":
        return nn.Conv2d(in_channels, out_channels, 7, stride=2, padding=3, bias=False)
    return conv3x3(in_channels, out_channels)


def stem_pool(stem: str) -> nn.Module:
    """Return the stem's pooling: max 3x3 stride 2 for "imagenet", none for "cifar"."""
    return nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()


def initialise(units: Iterable[nn.Module]) -> None:
    """Initialise as torchvision does: convolutions Kaiming normal by fan-out, batch norms 1 and 0."""
    for unit in units:
        for module in unit.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ResNetStem(nn.Module):
    """Images (n, c, h, w) to (n, width, h, w), or a quarter of the side with the "imagenet" stem."""

    def __init__(self, in_channels: int, width: int, stem: str) -> None:
        super().__init__()
        self.conv1 = stem_conv(stem, in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = stem_pool(stem)

    def forward(self, images: Tensor) -> Tensor:
        """Return the stem's activations."""
        return cast(Tensor, self.pool(F.relu(self.bn1(self.conv1(images)), inplace=True)))


def _downsample(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv1x1(in_channels, out_channels, stride=stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a skip: (n, in, h, w) to (n, hidden, h/stride, w/stride)."""

    def __init__(self, in_channels: int, hidden: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, hidden, stride=stride)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = conv3x3(hidden, hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.downsample = _downsample(in_channels, hidden, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(skip(x) + branch(x))."""
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        h = self.bn2(self.conv2(h))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)), inplace=True)


class BottleneckBlock(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a skip: (n, in, h, w) to (n, 4*hidden, h/stride, w/stride)."""

    def __init__(self, in_channels: int, hidden: int, stride: int) -> None:
        super().__init__()
        out_channels = BOTTLENECK_EXPANSION * hidden
        self.conv1 = conv1x1(in_channels, hidden)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = conv3x3(hidden, hidden, stride=stride)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = conv1x1(hidden, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _downsample(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(skip(x) + branch(x))."""
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        h = F.relu(self.bn2(self.conv2(h)), inplace=True)
        h = self.bn3(self.conv3(h))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNetHead(nn.Module):
    """Global average pool and linear classifier: (n, c, h, w) to logits (n, classes)."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(in_channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return cast(Tensor, self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)))


def assemble(
    shape: ModelShape,
    *,
    stem: nn.Module,
    block: Callable[[int, int, int], nn.Module],
    expansion: int,
    blocks: Sequence[int],
    head: Callable[[int, int], nn.Module],
) -> BuiltModel:
    """Put together a stem, groups of blocks and a head, and initialise them.

    A group has twice the hidden width of the one before and halves the sides. `block(in_channels, hidden,
    stride)` gives `expansion * hidden` channels; `blocks` counts the blocks of each group; `head(channels,
    classes)`.
    """
    units, names, channels = [stem], ["stem"], shape.width
    for group, count in enumerate(blocks, start=1):
        hidden = shape.width * 2 ** (group - 1)
        for index in range(count):
            stride = 2 if index == 0 and group > 1 else 1
            units.append(block(channels, hidden, stride))
            names.append(_block_name(group, index, stride=stride, projects=channels != expansion * hidden))
            channels = expansion * hidden
    units.append(head(channels, shape.classes))
    initialise(units)
    return BuiltModel(units, (*names, "head"))


def _block_name(group: int, index: int, *, stride: int, projects: bool) -> str:
    suffix = " (down)" if stride > 1 else " (widen)" if projects else ""
    return f"block{group}.{index + 1}{suffix}"


def _basic(shape: ModelShape, *blocks: int) -> BuiltModel:
    stem = ResNetStem(shape.in_channels, shape.width, shape.stem)
    return assemble(shape, stem=stem, block=BasicBlock, expansion=1, blocks=blocks, head=ResNetHead)


def _bottleneck(shape: ModelShape, *blocks: int) -> BuiltModel:
    stem = ResNetStem(shape.in_channels, shape.width, shape.stem)
    return assemble(
        shape,
        stem=stem,
        block=BottleneckBlock,
        expansion=BOTTLENECK_EXPANSION,
        blocks=blocks,
        head=ResNetHead,
    )


@register_model
def resnet18(shape: ModelShape) -> BuiltModel:
    """ResNet-18, 10 units, torchvision's."""
    return _basic(shape, 2, 2, 2, 2)


@register_model
def resnet34(shape: ModelShape) -> BuiltModel:
    """ResNet-34, 18 units, torchvision's."""
    return _basic(shape, 3, 4, 6, 3)


@register_model
def resnet50(shape: ModelShape) -> BuiltModel:
    """ResNet-50, 18 units, torchvision's."""
    return _bottleneck(shape, 3, 4, 6, 3)


@register_model
def resnet101(shape: ModelShape) -> BuiltModel:
    """ResNet-101, 35 units, torchvision's."""
    return _bottleneck(shape, 3, 4, 23, 3)
