"""Nested values with tensors in them, taken apart into tensors by name and a description in plain JSON.

What is in flight in a stage is nested: microbatches, units, streams. A file of tensors is flat, and keeps no
strides. But kernels choose their order of summation by strides, so a tensor that is read again must have
those that it had. A tensor that occurs twice is kept once.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Tree = Any
"""None, bool, int, float, str or a tensor; or a list, a tuple or a dict (with texts for keys) of trees."""

_TENSOR = "tensor"


def taken_apart(tree: Tree, *, name: str) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors by name, each beginning with `name`, and what is left as values of JSON.

    The tensors are the tree's own, not copies; where a dimension only repeats (stride 0) it has size 1.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _apart(tree, name, tensors, {})


def put_together(description: Any, tensors: Mapping[str, Tensor], *, device: torch.device) -> Tree:
    """Return the tree again, tuples as lists, its tensors new ones on `device`.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: the description is not one of these tensors.
    """
    return _together(description, tensors, device, {})


def _apart(tree: Tree, path: str, tensors: dict[str, Tensor], seen: dict[tuple[Any, ...], str]) -> Any:
    if isinstance(tree, Tensor):
        tree = tree.detach()
        shape, strides = list(tree.shape), list(tree.stride())
        identity = (tree.untyped_storage().data_ptr(), tree.storage_offset(), *shape, *strides, tree.dtype)
        name = seen.get(identity, path) if tree.numel() else path
        if name not in tensors:
            compact = [min(n, 1) if step == 0 else n for n, step in zip(shape, strides, strict=True)]
            tensors[name] = tree.as_strided(compact, strides)
            seen[identity] = name
        return {_TENSOR: name, "shape": shape, "strides": strides}
    if isinstance(tree, Mapping):
        return {key: _apart(value, f"{path}.{key}", tensors, seen) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_apart(value, f"{path}.{n}", tensors, seen) for n, value in enumerate(tree)]
    assert tree is None or isinstance(tree, bool | int | float | str), type(tree)
    return tree


def _together(
    described: Any, tensors: Mapping[str, Tensor], device: torch.device, made: dict[str, Tensor]
) -> Tree:
    if isinstance(described, Mapping) and _TENSOR in described:
        key = str(described)
        if key not in made:
            found = tensors[described[_TENSOR]]
            made[key] = _laid_out(found, described["shape"], described["strides"], device)
        return made[key]
    if isinstance(described, Mapping):
        return {key: _together(value, tensors, device, made) for key, value in described.items()}
    if isinstance(described, list):
        return [_together(value, tensors, device, made) for value in described]
    return described


def _laid_out(tensor: Tensor, shape: list[int], strides: list[int], device: torch.device) -> Tensor:
    compact = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=device).copy_(tensor)
    return compact if list(tensor.shape) == shape else compact.expand(shape)
