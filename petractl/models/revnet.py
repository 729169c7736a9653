"""RevNets: ResNets with two streams, whose blocks rebuild their input from their output.

Rivaud et al., "PETRA: Parallel End-to-end Training with Reversible Architectures" (ICLR 2025): two streams of
the ResNet's width and a residual function of one stream keep the parameter count near the ResNet's. A block
that keeps the shape is the reversible `Coupling`, (x, x~) -> (x~ + f(x), x), with no ReLU after the sum. A
block that changes the shape is not reversible. Convolutions have no bias, batch norms follow them.

Streams leave a unit dense, in the memory format that they came in, and in the parameters' dtype: under
autocast the sums are then taken in float32, and what is rebuilt from them loses nothing to the lower
precision of f.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petractl.models.registry import BuiltModel, ModelShape, register_model
from petractl.models.resnet import (
    BOTTLENECK_EXPANSION,
    assemble,
    conv1x1,
    conv3x3,
    stem_conv,
    stem_pool,
)
from petractl.models.units import Coupling


class BasicFunction(nn.Module):
    """f of a basic block, conv3x3-BN-ReLU twice: (n, c, h, w) to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return f(x)."""
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(h)), inplace=True)


class BottleneckFunction(nn.Module):
    """f of a bottleneck block, 1x1, 3x3, 1x1 convolutions, each with BN and ReLU.

    (n, in, h, w) to (n, 4*hidden, h/stride, w/stride); the stride is on the 3x3.
    """

    def __init__(self, in_channels: int, hidden: int, *, stride: int = 1) -> None:
        super().__init__()
        out_channels = BOTTLENECK_EXPANSION * hidden
        self.conv1 = conv1x1(in_channels, hidden)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = conv3x3(hidden, hidden, stride=stride)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = conv1x1(hidden, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return f(x)."""
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        h = F.relu(self.bn2(self.conv2(h)), inplace=True)
        return F.relu(self.bn3(self.conv3(h)), inplace=True)


class RevNetStem(nn.Module):
    """Images (n, c, h, w) to two streams (n, width, h, w), a quarter of the side with the "imagenet" stem."""

    def __init__(self, in_channels: int, width: int, stem: str) -> None:
        super().__init__()
        self.conv1 = stem_conv(stem, in_channels, 2 * width)
        self.bn1 = nn.BatchNorm2d(2 * width)
        self.pool = stem_pool(stem)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the streams."""
        h = self.pool(F.relu(self.bn1(self.conv1(images)), inplace=True))
        return split_streams(h, dtype=self.conv1.weight.dtype)


class BasicDown(nn.Module):
    """Block that halves the sides: two streams (n, in, h, w) to two of (n, out, h/2, w/2).

    Not reversible. h = ReLU(BN(conv3x3/2(x))); y = ReLU(BN(conv3x3(h))) + BN(conv1x1/2(x~)); y~ = h.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride=stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.skip_conv = conv1x1(in_channels, out_channels, stride=stride)
        self.skip_bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        """Return (y, y~)."""
        dtype = self.conv1.weight.dtype
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = F.relu(self.bn2(self.conv2(h)), inplace=True)
        return residual.to(dtype) + self.skip_bn(self.skip_conv(xt)), h.to(dtype)


class BottleneckDown(nn.Module):
    """Block that changes the shape: two streams (n, in, h, w) to two of (n, 4*hidden, h/s, w/s).

    Not reversible. y = f(x) + BN(conv1x1/s(x~)); y~ = BN(conv1x1/s(x)).
    """

    def __init__(self, in_channels: int, hidden: int, *, stride: int) -> None:
        super().__init__()
        out_channels = BOTTLENECK_EXPANSION * hidden
        self.f = BottleneckFunction(in_channels, hidden, stride=stride)
        self.skip_conv = conv1x1(in_channels, out_channels, stride=stride)
        self.skip_bn = nn.BatchNorm2d(out_channels)
        self.carry_conv = conv1x1(in_channels, out_channels, stride=stride)
        self.carry_bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        """Return (y, y~)."""
        dtype = self.skip_conv.weight.dtype
        y = self.f(x).to(dtype) + self.skip_bn(self.skip_conv(xt))
        return y, self.carry_bn(self.carry_conv(x)).to(dtype)


class RevNetHead(nn.Module):
    """Global average pool of both streams, concatenated, and a linear classifier.

    Two streams (n, c, h, w) to logits (n, classes). The pool comes first: the concatenation is then of 2c
    numbers per sample, and the result is the same.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * channels, classes)

    def forward(self, x: Tensor, xt: Tensor) -> Tensor:
        """Return the logits."""
        pooled = [F.adaptive_avg_pool2d(stream, 1).flatten(1) for stream in (x, xt)]
        return cast(Tensor, self.fc(torch.cat(pooled, dim=1)))


def split_streams(h: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split (n, 2c, h, w) into two tensors (n, c, h, w) of their own, in the memory format of `h`.

    Views of `h` would be copied by every convolution that reads them and would keep all of `h` alive.
    """
    channels_last = h.is_contiguous(memory_format=torch.channels_last) and not h.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, xt = h.chunk(2, dim=1)
    return (
        x.to(dtype, copy=True, memory_format=layout),
        xt.to(dtype, copy=True, memory_format=layout),
    )


def _basic_block(in_channels: int, hidden: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == hidden:
        return Coupling(BasicFunction(hidden))
    return BasicDown(in_channels, hidden, stride=stride)


def _bottleneck_block(in_channels: int, hidden: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == BOTTLENECK_EXPANSION * hidden:
        return Coupling(BottleneckFunction(in_channels, hidden))
    return BottleneckDown(in_channels, hidden, stride=stride)


def _basic(shape: ModelShape, *blocks: int) -> BuiltModel:
    stem = RevNetStem(shape.in_channels, shape.width, shape.stem)
    return assemble(shape, stem=stem, block=_basic_block, expansion=1, blocks=blocks, head=RevNetHead)


def _bottleneck(shape: ModelShape, *blocks: int) -> BuiltModel:
    stem = RevNetStem(shape.in_channels, shape.width, shape.stem)
    return assemble(
        shape,
        stem=stem,
        block=_bottleneck_block,
        expansion=BOTTLENECK_EXPANSION,
        blocks=blocks,
        head=RevNetHead,
    )


@register_model
def revnet18(shape: ModelShape) -> BuiltModel:
    """RevNet-18, 10 units, of which 5 reversible."""
    return _basic(shape, 2, 2, 2, 2)


@register_model
def revnet34(shape: ModelShape) -> BuiltModel:
    """RevNet-34, 18 units, of which 13 reversible."""
    return _basic(shape, 3, 4, 6, 3)


@register_model
def revnet50(shape: ModelShape) -> BuiltModel:
    """RevNet-50, 18 units, of which 12 reversible."""
    return _bottleneck(shape, 3, 4, 6, 3)


@register_model
def revnet101(shape: ModelShape) -> BuiltModel:
    """RevNet-101, 35 units, of which 29 reversible."""
    return _bottleneck(shape, 3, 4, 23, 3)
