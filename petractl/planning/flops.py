"""What each unit costs, found without weights and without computing: on torch's meta device.

A unit is called once with two meta samples (batch norm refuses a single value per channel), its parameters
and buffers replaced by meta tensors of the same shapes, and torch's counter adds up the multiplications and
additions of convolutions and matrix products (2 FLOPs per multiply-add). The result depends on shapes alone,
so it is the same on every machine. A unit that has no meta implementation is run on zeros instead, on a copy.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from petractl.errors import UserError
from petractl.models.units import Streams, as_streams

_SAMPLES = 2


@dataclass(frozen=True, slots=True)
class UnitCost:
    """A unit's forward FLOPs per sample, its number of parameters, and its outputs' shapes for one sample."""

    flops: int
    parameters: int
    output_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[torch.dtype, ...] = ()
    trained_tensors: int = 0
    """Parameter tensors that are trained."""


def unit_costs(
    units: Sequence[nn.Module], *, input_shape: Sequence[int], samples: int = _SAMPLES
) -> list[UnitCost]:
    """Return what each unit costs when the first one gets images of `input_shape` (channels, height, width).

    Neither the units nor the random state change. Units on the meta device are welcome.

    Raises:
        UserError: a unit cannot be called with what the unit before it returns.
    """
    streams: Streams = (torch.empty(samples, *input_shape, dtype=_dtype(units), device="meta"),)
    costs = []
    for index, unit in enumerate(units):
        shapes = ", ".join(str(tuple(stream.shape[1:])) for stream in streams)
        try:
            flops, streams = _count(unit, streams)
        except Exception as error:
            raise UserError(
                f"unit {index} ({type(unit).__name__}) fails on streams of {shapes} per sample: "
                f"{type(error).__name__}: {' '.join(str(error).split())}",
                where="model.name",
                hint="check the images' size and channels against the model",
            ) from error
        costs.append(
            UnitCost(
                flops=flops // samples,
                parameters=sum(parameter.numel() for parameter in unit.parameters()),
                output_shapes=tuple(tuple(stream.shape[1:]) for stream in streams),
                output_dtypes=tuple(stream.dtype for stream in streams),
                trained_tensors=sum(parameter.requires_grad for parameter in unit.parameters()),
            )
        )
    return costs


def _dtype(units: Sequence[nn.Module]) -> torch.dtype:
    parameters = (parameter for unit in units for parameter in unit.parameters())
    return next((p.dtype for p in parameters if p.is_floating_point()), torch.get_default_dtype())


def _count(unit: nn.Module, streams: Streams) -> tuple[int, Streams]:
    tensors = [*unit.named_parameters(), *unit.named_buffers()]
    try:
        on_meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            outputs = as_streams(functional_call(unit, on_meta, streams))
        return counter.get_total_flops(), outputs
    except Exception:
        if any(tensor.is_meta for _, tensor in tensors):
            raise
        return _count_on_zeros(unit, streams)


def _count_on_zeros(unit: nn.Module, streams: Streams) -> tuple[int, Streams]:
    device = next((tensor.device for tensor in unit.state_dict().values()), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    zeros: list[Tensor] = [torch.zeros_like(stream, device=device) for stream in streams]
    with torch.random.fork_rng(devices), torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs = as_streams(copy.deepcopy(unit)(*zeros))
    return counter.get_total_flops(), tuple(output.to("meta") for output in outputs)
