"""The auxiliary nets themselves: a block's streams to logits (Fournier et al., ICML 2023).

A net reads images (n, c, h, w). Streams of equal sides are put together over the channels. Streams without
sides are images of one pixel: features (n, d) as they are, tokens (n, t, d) as their mean over the tokens.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from petractl.errors import UserError
from petractl.models.resnet import conv1x1, initialise
from petractl.models.units import Streams, as_streams

Shape = Sequence[int]
"""Of a stream, for one sample: (c, h, w), (d,) or (t, d)."""


class AuxiliaryNet(nn.Module):
    """A block's streams to logits (n, classes): first through `copied` modules, then, as images, `net`."""

    def __init__(self, net: nn.Module, *, copied: Sequence[nn.Module] = (), user_made: bool = False) -> None:
        super().__init__()
        self.copied = nn.ModuleList(copied)
        self.net = net
        self.user_made = user_made

    def forward(self, *streams: Tensor) -> Tensor:
        """Return the logits."""
        for module in self.copied:
            streams = as_streams(module(*streams))
        return cast(Tensor, self.net(join_streams(streams)))


def reinitialise(auxiliary: AuxiliaryNet) -> None:
    """Draw the weights anew, in place, from the generator of their device; running statistics too.

    A user's net is initialised by its modules' own `reset_parameters()`.

    Raises:
        UserError: a module has parameters and no `reset_parameters()`.
    """
    _reset(auxiliary)
    if not auxiliary.user_made:
        initialise([auxiliary])


def _reset(module: nn.Module) -> None:
    for child in module.children():
        _reset(child)
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if reset is not None:
        reset()
    elif next(module.parameters(recurse=False), None) is not None:
        raise UserError(
            f"{type(module).__name__} has parameters and no reset_parameters() to draw them anew",
            where="auxiliary.name",
            hint="give it that method",
        )


class QuadrantMeans(nn.Module):
    """Adaptive average pool to 2x2, flattened: (n, c, h, w) to (n, 4c).

    Where a side is odd, the quadrants share its middle. torch's own pool would then add gradients up in no
    fixed order on a GPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the means of the quadrants."""
        n, c, h, w = x.shape
        if h % 2 == 0 and w % 2 == 0:
            return x.reshape(n, c, 2, h // 2, 2, w // 2).mean(dim=(3, 5)).flatten(1)
        rows = (x[:, :, : (h + 1) // 2], x[:, :, h // 2 :])
        quadrants = [part for row in rows for part in (row[..., : (w + 1) // 2], row[..., w // 2 :])]
        return torch.stack([part.mean(dim=(2, 3)) for part in quadrants], dim=2).flatten(1)


class HalvingConv(nn.Conv2d):
    """3x3 convolution with stride 2 and no bias, in the weight's own precision on a map of one pixel.

    On the CPU, oneDNN 3.13 (torch 2.15) leaves parts of that layer's bfloat16 weight gradient unwritten: the
    run then has other bits each time, and NaN.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps, of half the side."""
        if x.shape[-2:] != (1, 1) or x.is_meta:  # which knows no autocast
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def cnn(channels: int, width: int, classes: int) -> nn.Sequential:
    """Return a 1x1 convolution to `width` channels, three of 3x3 with stride 2, and a linear layer on 2x2."""
    layers: list[nn.Module] = [conv1x1(channels, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    for _ in range(3):
        layers += [HalvingConv(width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    net = nn.Sequential(*layers, QuadrantMeans(), nn.Linear(4 * width, classes))
    initialise([net])
    return net


def mlp(channels: int, width: int, classes: int) -> nn.Sequential:
    """Return a perceptron on 2x2 pixels with three hidden layers of `width`."""
    layers: list[nn.Module] = [QuadrantMeans()]
    for inputs in (4 * channels, width, width):
        layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def linear(channels: int, classes: int) -> nn.Sequential:
    """Return a batch norm and a linear layer on 2x2 pixels."""
    return nn.Sequential(nn.BatchNorm2d(channels), QuadrantMeans(), nn.Linear(4 * channels, classes))


def join_streams(streams: Streams) -> Tensor:
    """Return a block's streams as one tensor of images (n, c, h, w)."""
    images = [_as_images(stream) for stream in streams]
    return images[0] if len(images) == 1 else torch.cat(images, dim=1)


def joined_shape(shapes: Sequence[Shape]) -> tuple[int, int, int]:
    """Return the (channels, height, width) of what `join_streams` makes of streams of these shapes.

    Raises:
        UserError: streams of unequal sides, or of more than three dimensions per sample.
    """
    for shape in shapes:
        if not 1 <= len(shape) <= 3:
            raise UserError(
                f"a block returns a stream of shape {tuple(shape)} per sample",
                where="auxiliary.name",
                hint="an auxiliary net reads images (c, h, w), tokens (t, d) or features (d,)",
            )
    images = [tuple(shape) if len(shape) == 3 else (shape[-1], 1, 1) for shape in shapes]
    sides = {(height, width) for _, height, width in images}
    if len(sides) != 1:
        listed = ", ".join(str(tuple(shape)) for shape in shapes)
        raise UserError(
            f"a block returns streams of unequal sides: {listed} per sample",
            where="auxiliary.name",
            hint="an auxiliary net puts the streams together over the channels: cut the net elsewhere",
        )
    ((height, width),) = sides
    return sum(channels for channels, _, _ in images), height, width


def _as_images(stream: Tensor) -> Tensor:
    if stream.ndim == 4:
        return stream
    features = stream if stream.ndim == 2 else stream.mean(dim=1)
    return features[:, :, None, None]
