"""What each unit holds in memory under a method, traced on meta tensors with the engine's own code.

Three microbatches go through the whole net, one unit after the other:

    1   forward, then what is kept is dropped from the top down: a piece of memory dies with the lowest unit
        that keeps it
    2   forward, then dropped from the bottom up: it dies with the highest unit that keeps it
    3   forward and backward, the peak of every unit's pass taken

A piece made by one unit and kept by its neighbour (an activation that is kept as an input) so counts once,
and at a cut it belongs to the message instead.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy

from petractl.methods.evaluation import Evaluator
from petractl.methods.family import Keep, Keeping
from petractl.methods.keeping import Keeper, build_keeper
from petractl.models.units import Streams
from petractl.planning.tracing import LiveBytes, cpu_workspace

_FALLBACK_SAMPLES = 2
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Footprint:
    """The bytes of one unit for one microbatch; peaks are above what is kept of microbatches and gradients.

    "Above" and "below" are the unit's two ends. `kept`: made here and kept until the backward by any unit;
    `kept_above`: made here or below and kept only above; `needs_input`: something made below is kept here
    or above.
    """

    parameters: int
    trained: int
    buffers: int
    stashes: bool
    kept: int
    kept_above: int
    needs_input: bool
    streams_below: int
    down_below: int
    """Streams, if the unit below rebuilds its input, and gradients."""
    forward_peak: int
    backward_peak: int
    at_backward: int
    """What of the backward peak is what came from above: streams and gradients."""


@dataclass(slots=True)
class _Passes:
    """What the third microbatch showed of each unit."""

    forward_peaks: list[int]
    backward_peaks: list[int]
    at_backward: list[int]
    gradients_below: list[int]


def trace_footprints(
    units: Sequence[nn.Module],
    kept: Sequence[Keeping],
    *,
    input_shape: Sequence[int],
    samples: int,
    autocast_dtype: torch.dtype | None = None,
    channels_last: bool = True,
    cpu_kernels: bool = True,
) -> tuple[Footprint, ...]:
    """Trace every unit with microbatches of `samples` images of `input_shape`.

    `cpu_kernels` counts what the CPU's kernels allocate for themselves; those of GPUs are not known here. The
    units do not change. Units that have no meta implementation are run on the CPU with two samples, and what
    depends on the samples is scaled.
    """
    conditions = _Conditions(tuple(input_shape), autocast_dtype, channels_last, cpu_kernels)
    try:
        # Autocast passes the meta device's tensors by, but not fake ones, which say that they are the CPU's.
        with nullcontext() if autocast_dtype is None else FakeTensorMode():
            device = "meta" if autocast_dtype is None else "cpu"
            return _trace(_without_memory(units, device), kept, conditions, samples=samples, device=device)
    except RuntimeError:  # a kernel that the meta device lacks: NotImplementedError is one
        if any(tensor.is_meta for unit in units for tensor in unit.state_dict().values()):
            raise
    copies = [copy.deepcopy(unit).cpu() for unit in units]
    few = _trace(copies, kept, conditions, samples=_FALLBACK_SAMPLES, device="cpu")
    return tuple(scaled(item, samples / _FALLBACK_SAMPLES) for item in few)


@dataclass(frozen=True, slots=True)
class _Conditions:
    """How the units are run, whatever the number of samples; see `trace_footprints`."""

    input_shape: tuple[int, ...]
    autocast_dtype: torch.dtype | None
    channels_last: bool
    cpu_kernels: bool


def _trace(
    units: Sequence[nn.Module],
    kept: Sequence[Keeping],
    conditions: _Conditions,
    *,
    samples: int,
    device: str,
) -> tuple[Footprint, ...]:
    keepers = [
        _keeper(unit, n, keeping, conditions.autocast_dtype)
        for n, (unit, keeping) in enumerate(zip(units, kept, strict=True))
    ]
    images = torch.zeros(samples, *conditions.input_shape, dtype=_dtype(units), device=device)
    if images.ndim == 4 and conditions.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(samples, dtype=torch.int64, device=device)
    workspace = partial(cpu_workspace, channels_last=conditions.channels_last)
    trace = _Trace(keepers, images, labels, workspace if conditions.cpu_kernels else None)
    lowest, made = trace.lowest_holders(from_top=True)
    highest, _ = trace.lowest_holders(from_top=False)
    passes = trace.passes(lowest, made)
    result = []
    for n, (unit, keeping) in enumerate(zip(units, kept, strict=True)):
        result.append(
            Footprint(
                parameters=_bytes(unit.parameters()),
                trained=_bytes(keepers[n].evaluator.parameters),
                buffers=_bytes(unit.buffers()),
                stashes=keeping.parameters,
                kept=sum(size for m, (at, size) in enumerate(made) if at == n and m in lowest),
                kept_above=sum(size for m, (at, size) in enumerate(made) if at <= n < lowest.get(m, -1)),
                needs_input=n > 0 and any(made[m][0] < n <= unit_ for m, unit_ in highest.items()),
                streams_below=trace.streams_below[n],
                down_below=passes.gradients_below[n]
                + (trace.streams_below[n] if n and kept[n - 1].keep is Keep.NOTHING else 0),
                forward_peak=passes.forward_peaks[n],
                backward_peak=passes.backward_peaks[n],
                at_backward=passes.at_backward[n],
            )
        )
    return tuple(result)


class _Trace:
    """The whole net as one stage, watched."""

    def __init__(
        self,
        keepers: Sequence[Keeper],
        images: Tensor,
        labels: Tensor,
        workspace: Callable[[Any, Sequence[Any]], int] | None,
    ) -> None:
        self._keepers = keepers
        self._workspace = workspace
        self._images = images
        self._labels = labels
        self.streams_below: list[int] = []

    def lowest_holders(self, *, from_top: bool) -> tuple[dict[int, int], list[tuple[int, int]]]:
        """Return the lowest (or highest) unit that keeps each piece of memory, and (unit, bytes) of all."""
        body = self._keepers[:-1]
        with LiveBytes() as live:
            streams: Streams = (self._images,)
            flight: list[Any] = []
            self.streams_below = []
            for n, keeper in enumerate(body):
                live.section = n
                self.streams_below.append(_bytes(streams))
                streams, item = keeper.forward(streams, microbatch=0, parameters=None)
                flight.append(item)
                del item
            self.streams_below.append(_bytes(streams))
            del streams
            live.freed.clear()  # what is dead by now was kept by nobody
            order = reversed(range(len(body))) if from_top else range(len(body))
            for n in order:
                live.section = n
                flight[n] = None
        return dict(live.freed), live.made

    def passes(self, lowest: dict[int, int], made: Sequence[tuple[int, int]]) -> _Passes:
        """Run a forward and a backward and return each unit's peaks."""
        body, head = self._keepers[:-1], self._keepers[-1]
        count = len(self._keepers)
        found = _Passes([0] * count, [0] * count, [0] * count, [0] * count)
        held = [
            sum(size for m, (_, size) in enumerate(made) if lowest.get(m, count) < n)
            for n in range(count + 1)
        ]
        with LiveBytes(self._workspace) as live:
            streams: Streams = (self._images,)
            flight: list[Any] = []
            for n, keeper in enumerate(body):
                live.reset_peak()
                streams, item = keeper.forward(streams, microbatch=0, parameters=None)
                flight.append(item)
                del item
                found.forward_peaks[n] = live.peak - held[n]
            live.reset_peak()
            found.at_backward[-1] = live.live - held[-2]
            down = self._head(head, streams)
            grads = [down.parameter_gradients]
            found.backward_peaks[-1] = live.peak - held[-2]
            streams, gradients = down.inputs, down.gradients
            del down
            for n in range(count - 2, -1, -1):
                above = sum(_bytes(g for g in unit if g is not None) for unit in grads)
                found.gradients_below[n + 1] = _bytes(gradients)
                keeper = body[n]
                if not keeper.needs_outputs:
                    streams = ()
                found.at_backward[n] = live.live - held[n + 1] - above
                live.reset_peak()
                down = keeper.backward(flight[n], streams or None, gradients, microbatch=0, parameters=None)
                found.backward_peaks[n] = live.peak - held[n + 1] - above
                flight[n] = None
                streams, gradients = down.inputs, down.gradients
                grads.append(down.parameter_gradients)
                del down
        return found

    def _head(self, head: Keeper, streams: Streams) -> Any:
        outputs, kept = head.forward(streams, microbatch=0, parameters=None)
        logits = outputs[0].requires_grad_()
        with torch.enable_grad():
            loss = cross_entropy(logits, self._labels)
        gradients = torch.autograd.grad(loss, [logits])
        return head.backward(kept, None, gradients, microbatch=0, parameters=None)


def _keeper(unit: nn.Module, index: int, keeping: Keeping, autocast_dtype: torch.dtype | None) -> Keeper:
    evaluator = Evaluator(
        unit, index=index, name=f"unit {index}", seed=0, device=_CPU, autocast_dtype=autocast_dtype
    )
    return build_keeper(evaluator, keep=keeping.keep, statistics_in_forward=False, input_gradient=index > 0)


def _without_memory(units: Sequence[nn.Module], device: str) -> list[nn.Module]:
    """Return copies without memory, and without copying any: meta tensors, or fake ones of a device."""
    result = []
    for unit in units:
        tensors = [*unit.parameters(), *unit.buffers()]
        empty = {
            id(x): torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) for x in tensors
        }
        for parameter in unit.parameters():
            empty[id(parameter)] = nn.Parameter(empty[id(parameter)], requires_grad=parameter.requires_grad)
        result.append(copy.deepcopy(unit, memo=dict(empty)))
    return result


def _dtype(units: Sequence[nn.Module]) -> torch.dtype:
    parameters = (parameter for unit in units for parameter in unit.parameters())
    return next((p.dtype for p in parameters if p.is_floating_point()), torch.get_default_dtype())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def scaled(item: Footprint, factor: float) -> Footprint:
    """Return the footprint with `factor` times the samples; a backward's peak holds gradients besides."""
    names = ("kept", "kept_above", "streams_below", "down_below", "forward_peak", "at_backward")
    values = {name: round(getattr(item, name) * factor) for name in names}
    activations = max(0, item.backward_peak - item.trained)
    return replace(item, **values, backward_peak=item.trained + round(activations * factor))
