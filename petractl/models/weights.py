"""Weights on disk: safetensors, named by unit, written so that equal weights give equal bytes.

A file may also have torchvision's names, for the ResNets: inside a unit they are ours, so a prefix decides
("layer1.0.conv1.weight" is "units.1.conv1.weight"). A head made for another number of classes is left as it
was initialised, which is what fine-tuning wants; any other difference is an error, before anything is
written.
"""

import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from petractl.errors import UserError
from petractl.models.resnet import BasicBlock, BottleneckBlock, ResNetHead, ResNetStem
from petractl.models.units import Network

_SHOWN = 6


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """What `load_weights` did: names of the tensors it filled, and of those that it left as they were."""

    loaded: tuple[str, ...]
    left: tuple[str, ...]


def save_weights(network: Network, path: Path) -> None:
    """Write parameters and buffers by unit, contiguous, without metadata; equal weights give equal bytes.

    The file appears whole or not at all: it is written under another name beside `path` and renamed.

    Raises:
        UserError: the file cannot be written.
    """
    save_tensors(network.state_dict(), path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write named tensors as `save_weights` does.

    Raises:
        UserError: the file cannot be written.
    """
    tensors = {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(tensors, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the weights: {error}", where=str(path)) from error


def _write_atomically(tensors: dict[str, Tensor], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        # safetensors makes its files private; weights have the permissions of any other new file.
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


def load_weights(network: Network, path: Path) -> LoadedWeights:
    """Fill a network from a safetensors file, by unit names or torchvision's.

    Tensors keep their dtype, device and strides. Left as they are: tensors of the last unit whose first
    dimension alone differs (another number of classes), and batch norms' counters that the file does not
    have.

    Raises:
        UserError: no such file, not safetensors, or names or shapes that do not fit the network.
    """
    tensors = _to_unit_names(network, _read(path), path)
    own = network.state_dict()
    missing = {name for name in own.keys() - tensors.keys() if not name.endswith("num_batches_tracked")}
    unknown = tensors.keys() - own.keys()
    head = f"units.{len(network.units) - 1}."
    wrong_shape = {name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape}
    other_classes = {
        name
        for name in wrong_shape
        if name.startswith(head) and own[name].ndim > 0 and own[name].shape[1:] == tensors[name].shape[1:]
    }
    problems = [
        *(f"{name} is missing" for name in sorted(missing)),
        *(f"{name} is not in the model" for name in sorted(unknown)),
        *(
            f"{name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
            for name in sorted(wrong_shape - other_classes)
        ),
    ]
    if problems:
        raise _mismatch(path, problems)
    loaded = [name for name in own if name in tensors and name not in other_classes]
    with torch.no_grad():
        for name in loaded:
            own[name].copy_(tensors[name])
    return LoadedWeights(tuple(loaded), tuple(name for name in own if name not in loaded))


def torchvision_names(network: Network) -> dict[str, str]:
    """Map torchvision's names of a ResNet's tensors to ours; empty for other networks.

    A block with a projection opens the next layer ("layer2.0"), except right after the stem.
    """
    prefixes: list[str] = []
    layer, index = 1, 0
    for unit in network.units:
        if isinstance(unit, ResNetStem):
            prefixes.append("")
        elif isinstance(unit, (BasicBlock, BottleneckBlock)):
            if unit.downsample is not None and len(prefixes) > 1:
                layer, index = layer + 1, 0
            prefixes.append(f"layer{layer}.{index}.")
            index += 1
        elif isinstance(unit, ResNetHead):
            prefixes.append("")
        else:
            return {}
    return {
        f"{prefix}{name}": f"units.{position}.{name}"
        for position, (prefix, unit) in enumerate(zip(prefixes, network.units, strict=True))
        for name in unit.state_dict()
    }


def _to_unit_names(network: Network, tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    if any(name.startswith("units.") for name in tensors) or "conv1.weight" not in tensors:
        return tensors
    names = torchvision_names(network)
    if not names:
        raise UserError(
            "the file has torchvision's names, which only fit the ResNets",
            where=f"model.weights: {path}",
            hint="use a ResNet of the same depth, or weights written by `petractl export`",
        )
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def _read(path: Path) -> dict[str, Tensor]:
    where = f"model.weights: {path}"
    if not path.is_file():
        raise UserError("there is no such file", where=where, hint="give the path of a safetensors file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"not a readable safetensors file ({error})",
            where=where,
            hint="a state dict becomes one by safetensors.torch.save_file(state_dict, path)",
        ) from error


def _mismatch(path: Path, problems: Iterable[str]) -> UserError:
    listed = list(problems)
    shown = listed[:_SHOWN] + ([f"and {len(listed) - _SHOWN} more"] if len(listed) > _SHOWN else [])
    return UserError(
        f"the weights do not fit the model: {'; '.join(shown)}",
        where=f"model.weights: {path}",
        hint="model.name, width, stem and the images' channels must be those of the weights",
    )
