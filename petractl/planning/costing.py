"""From a built model to a `Net`: FLOPs, memory traced on meta tensors, times measured or from FLOPs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from petractl.methods.family import Keeping, MethodSpec, keepings, method_spec
from petractl.models.units import is_reversible
from petractl.planning.devices import NOMINAL
from petractl.planning.flops import UnitCost, unit_costs
from petractl.planning.footprint import trace_footprints
from petractl.planning.memory import OPTIMIZER_STATE
from petractl.planning.message_cost import FREE_MESSAGES, measure_messages
from petractl.planning.net import Net, times_by_flops
from petractl.planning.profile import Measured, measure_units

_BUDGET_S = 6.0


@dataclass(frozen=True, slots=True)
class Clock:
    """Where times are from: measured on `device`, or FLOPs where it is None.

    `processes` that train side by side on this machine's CPU slow each other down a little.
    """

    device: torch.device | None = None
    autocast_dtype: torch.dtype | None = None
    channels_last: bool = True
    budget_s: float = _BUDGET_S
    use_cache: bool = True
    processes: int = 1


def cost_net(
    units: Sequence[nn.Module],
    names: Sequence[str],
    *,
    method: MethodSpec,
    input_shape: Sequence[int],
    batch_size: int,
    clock: Clock,
    optimizer: str = "sgd",
    host_buffers: bool = True,
    compared: bool = True,
    number_formats: tuple[str, str] = ("float32", "float32"),
) -> Net:
    """Find out what every unit costs under a method, and if it is to be compared, under backprop.

    The units may be on the meta device; they do not change. Without `compared` the times of backprop are the
    method's own. `number_formats` are those of messages, upwards and downwards.

    Raises:
        UserError: a unit cannot be called with what the unit before it returns.
    """
    reversible = [is_reversible(unit) for unit in units]
    kept = keepings(method, reversible)
    plain = keepings(method_spec("backprop"), reversible)
    costs = unit_costs(units, input_shape=input_shape)
    footprints = trace_footprints(
        units,
        kept,
        input_shape=input_shape,
        samples=batch_size,
        autocast_dtype=clock.autocast_dtype,
        channels_last=clock.channels_last,
        cpu_kernels=host_buffers,
    )
    if clock.device is None:
        times = times_by_flops(costs, kept, batch_size=batch_size)
        backprop = times_by_flops(costs, plain, batch_size=batch_size)
        said = f"FLOPs on a {NOMINAL}"
        messages = FREE_MESSAGES
    else:
        methods = (kept, plain) if compared else (kept,)
        measured = _measure(units, methods, costs, input_shape, batch_size, clock, optimizer=optimizer)
        messages = measure_messages(clock.device)
        times, backprop = measured.times[0], measured.times[-1]
        few = f", from {measured.samples} of {batch_size} samples"
        part = "" if measured.samples == batch_size else few
        said = f"measured here ({measured.device}{part})"
    return Net(
        names=tuple(names),
        kept=kept,
        costs=tuple(costs),
        times=times,
        backprop_times=backprop,
        footprints=footprints,
        batch_size=batch_size,
        locked=method.locked,
        clock=said,
        messages=messages,
        optimizer_copies=float(OPTIMIZER_STATE.get(optimizer, 2)),
        host_buffers=host_buffers,
        number_formats=number_formats,
    )


def _measure(
    units: Sequence[nn.Module],
    methods: Sequence[Sequence[Keeping]],
    costs: Sequence[UnitCost],
    input_shape: Sequence[int],
    batch_size: int,
    clock: Clock,
    *,
    optimizer: str = "sgd",
) -> Measured:
    assert clock.device is not None
    return measure_units(
        units,
        methods,
        costs,
        input_shape=input_shape,
        batch_size=batch_size,
        device=clock.device,
        autocast_dtype=clock.autocast_dtype,
        channels_last=clock.channels_last,
        optimizer=optimizer,
        processes=clock.processes,
        budget_s=clock.budget_s,
        use_cache=clock.use_cache,
    )
