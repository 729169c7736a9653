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
from petractl.planning.net import Net, times_by_flops
from petractl.planning.optimal import optimal_cuts
from petractl.planning.profile import Measured, measure_units

_BUDGET_S = 6.0


@dataclass(frozen=True, slots=True)
class Clock:
    """Where times are from: measured on `device`, or FLOPs where it is None."""

    device: torch.device | None = None
    autocast_dtype: torch.dtype | None = None
    channels_last: bool = True
    budget_s: float = _BUDGET_S
    use_cache: bool = True


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
) -> Net:
    """Find out what every unit costs under a method, and under backprop to compare with.

    The units may be on the meta device; they do not change.

    Raises:
        UserError: a unit cannot be called with what the unit before it returns.
    """
    reversible = [is_reversible(unit) for unit in units]
    kept = keepings(method, reversible)
    plain = keepings(method_spec("backprop"), reversible)
    costs = unit_costs(units, input_shape=input_shape)
    footprints = trace_footprints(units, kept, input_shape=input_shape, samples=batch_size)
    if clock.device is None:
        times = times_by_flops(costs, kept, batch_size=batch_size)
        backprop = times_by_flops(costs, plain, batch_size=batch_size)
        said = f"FLOPs on a {NOMINAL}"
    else:
        measured = _measure(units, (kept, plain), costs, input_shape, batch_size, clock)
        times, backprop = measured.times
        part = (
            "" if measured.samples == batch_size else f", {measured.samples} of {batch_size} samples, scaled"
        )
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
        optimizer_copies=float(OPTIMIZER_STATE.get(optimizer, 2)),
        host_buffers=host_buffers,
    )


def cuts_by_time(
    units: Sequence[nn.Module],
    kept: Sequence[Keeping],
    costs: Sequence[UnitCost],
    *,
    num_stages: int,
    input_shape: Sequence[int],
    batch_size: int,
    accumulation: int,
    clock: Clock,
) -> tuple[int, ...]:
    """Return the cuts that make the stages' measured times even; for a run, which compares with nothing."""
    measured = _measure(units, (kept,), costs, input_shape, batch_size, clock)
    times = [t.forward_s + t.backward_s + t.update_s / accumulation for t in measured.times[0]]
    cuts = optimal_cuts(times, num_stages=num_stages)
    assert cuts is not None
    return cuts


def _measure(
    units: Sequence[nn.Module],
    methods: Sequence[Sequence[Keeping]],
    costs: Sequence[UnitCost],
    input_shape: Sequence[int],
    batch_size: int,
    clock: Clock,
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
        budget_s=clock.budget_s,
        use_cache=clock.use_cache,
    )
