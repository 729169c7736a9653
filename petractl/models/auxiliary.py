"""Auxiliary nets by name: what gives every block but the last a loss of its own.

Fournier et al., "Can Forward Gradient Match Backpropagation?" (ICML 2023): a small net from a block's output
to the classes, whose loss is a target or a guess for the block, thrown away after training. There are a
convolutional one, a perceptron, a linear one (`auxiliary_nets`), a copy of the block above, and functions of
the user's ("package.module:function").
"""

import copy
import difflib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from petractl.errors import UserError
from petractl.models.auxiliary_nets import AuxiliaryNet, Shape, cnn, joined_shape, linear, mlp, reinitialise
from petractl.models.units import as_streams
from petractl.models.user import call_named, check_nothing_shared, describe_exception

AUXILIARY_NETS = ("cnn", "mlp", "linear", "copy")

PAPER_WIDTHS = {"cnn": (32, 16), "mlp": (1024, 512)}
"""The paper's widths of the nets that have one, for up to 8 blocks and for more."""
_FEW_BLOCKS = 8
_NAME = "auxiliary.name"


def build_auxiliaries(
    name: str,
    *,
    units: Sequence[nn.Module],
    shapes: Sequence[Sequence[Shape]],
    cuts: Sequence[int],
    classes: int,
    width: int = 0,
    arguments: Mapping[str, Any] | None = None,
) -> list[AuxiliaryNet]:
    """Build the auxiliary net of every block but the last, first to last, each with tensors of its own.

    `shapes` are of the streams that each unit returns, per sample; `cuts` the first unit of every block but
    the first. The rest is as in `build_auxiliary`.

    Raises:
        UserError: as `build_auxiliary`, or a user's function that returns one tensor for two blocks.
    """
    auxiliaries = [
        build_auxiliary(
            name,
            shapes=shapes[first - 1],
            classes=classes,
            num_blocks=len(cuts) + 1,
            width=width,
            arguments=arguments,
            next_block=units[first:end],
        )
        for first, end in pairwise([*cuts, len(units)])
    ]
    check_nothing_shared(name, auxiliaries, where=_NAME, kind="the nets of blocks")
    return auxiliaries


def build_auxiliary(
    name: str,
    *,
    shapes: Sequence[Shape],
    classes: int,
    num_blocks: int,
    width: int = 0,
    arguments: Mapping[str, Any] | None = None,
    next_block: Sequence[nn.Module] | None = None,
) -> AuxiliaryNet:
    """Build the auxiliary net of one block, newly initialised, on the current default device.

    The weights come from torch's global random generator.

    Args:
        name: one of `AUXILIARY_NETS`, or "package.module:function".
        shapes: of the streams that the block returns, for one sample each.
        classes: number of classes.
        num_blocks: how many blocks the whole net has; it decides the width.
        width: of the layers of "cnn" and "mlp"; 0 = the paper's.
        arguments: keywords for the user's function, which win over those of channels, height, width, classes
            and num_blocks that its signature names.
        next_block: the units of the block above, which "copy" copies.

    Raises:
        UserError: unknown name, streams that cannot be put together, a width or arguments for a net that has
            none, no block above to copy, or a user's function that cannot be used.
    """
    _check(name, width=width, arguments=arguments)
    if name == "copy":
        return _copy(next_block, shapes=shapes, classes=classes)
    channels, height, image_width = joined_shape(shapes)
    if name == "linear":
        return AuxiliaryNet(linear(channels, classes))
    if name in PAPER_WIDTHS:
        width = width or PAPER_WIDTHS[name][num_blocks > _FEW_BLOCKS]
        return AuxiliaryNet((cnn if name == "cnn" else mlp)(channels, width, classes))
    offered = {
        "channels": channels,
        "height": height,
        "width": image_width,
        "classes": classes,
        "num_blocks": num_blocks,
    }
    return _user_made(name, offered=offered, arguments=arguments or {})


def _copy(next_block: Sequence[nn.Module] | None, *, shapes: Sequence[Shape], classes: int) -> AuxiliaryNet:
    """Return a new copy of the block above, less its head, and the linear net on what it returns."""
    if not next_block:
        raise UserError(
            '"copy" copies the block above, and there is none',
            where=_NAME,
            hint="the last block has no auxiliary net",
        )
    copied = []
    for module in _parts(next_block):
        outputs = _output_shapes(module, shapes)
        if _are_images(shapes) and not _are_images(outputs):
            break
        copied.append(copy.deepcopy(module))
        shapes = outputs
    auxiliary = AuxiliaryNet(linear(joined_shape(shapes)[0], classes), copied=copied)
    reinitialise(auxiliary)
    return auxiliary


def _parts(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the modules with those in sequences one by one: a head may be the last of a sequence."""
    parts: list[nn.Module] = []
    for module in modules:
        parts += _parts(list(module)) if isinstance(module, nn.Sequential) else [module]
    return parts


def _are_images(shapes: Sequence[Shape]) -> bool:
    return all(len(shape) == 3 for shape in shapes)


def _output_shapes(module: nn.Module, shapes: Sequence[Shape]) -> list[Shape]:
    """Return the shapes per sample of what a module makes of zeros, with no effect on it or on randomness."""
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else torch.get_default_device()
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)
    zeros = [torch.zeros(2, *shape, device=device, dtype=dtype) for shape in shapes]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        return [tuple(output.shape[1:]) for output in as_streams(copy.deepcopy(module)(*zeros))]


def _user_made(name: str, *, offered: Mapping[str, Any], arguments: Mapping[str, Any]) -> AuxiliaryNet:
    net = call_named(name, section="auxiliary", offered=offered, arguments=arguments)
    hint = "return an nn.Module that maps images (n, channels, height, width) to logits (n, classes)"
    if not isinstance(net, nn.Module):
        raise UserError(f"{name} returned a {type(net).__name__}", where=_NAME, hint=hint)
    shape = (offered["channels"], offered["height"], offered["width"])
    try:
        outputs = _output_shapes(net, [shape])
    except Exception as error:
        raise UserError(
            f"the net of {name} fails on images of {shape} per sample: {describe_exception(error)}",
            where=_NAME,
            hint=hint,
        ) from error
    if outputs != [(offered["classes"],)]:
        raise UserError(
            f"the net of {name} returns {', '.join(map(str, outputs))} per sample, "
            f"not logits ({offered['classes']},)",
            where=_NAME,
            hint=hint,
        )
    return AuxiliaryNet(net, user_made=True)


def _check(name: str, *, width: int, arguments: Mapping[str, Any] | None) -> None:
    user_made = ":" in name
    if not user_made and name not in AUXILIARY_NETS:
        close = difflib.get_close_matches(name.lower(), AUXILIARY_NETS, n=1)
        guess = f'did you mean "{close[0]}"? ' if close else ""
        known = ", ".join(AUXILIARY_NETS)
        raise UserError(
            f'there is no auxiliary net "{name}"',
            where=_NAME,
            hint=f'{guess}there are {known}, and "package.module:function" for one of your own',
        )
    if width and name not in PAPER_WIDTHS:
        raise UserError(
            f"{name} has no width",
            where="auxiliary.width",
            hint="give it in auxiliary.arguments" if user_made else f"{' and '.join(PAPER_WIDTHS)} have one",
        )
    if width < 0:
        raise UserError(f"{width} is below 0", where="auxiliary.width", hint="0 is the paper's width")
    if arguments and not user_made:
        raise UserError(
            f"{name} takes no arguments, but got {', '.join(sorted(arguments))}",
            where="auxiliary.arguments",
            hint='arguments are for a net of your own ("package.module:function")',
        )
