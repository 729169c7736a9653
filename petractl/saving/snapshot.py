"""What one stage is at a cut: all of its tensors by name, safe from the training that goes on.

Parameters, buffers, the optimiser's state and the open averages of a group change in place, so they are
copied, on their device: that is all that training waits for. Where a GPU has no room for the copies beside
what training takes, they go to the host at once. What is in flight does not change, and is only referred to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from petractl.build import Built
from petractl.checkpoint import PIPELINE
from petractl.engine.cut import StageCut, StageRecord, recorded_state
from petractl.engine.memory_left import memory_left
from petractl.engine.tensor_tree import taken_apart
from petractl.optim import Number, optimizer_state

MODEL, OPTIMIZER, AUXILIARY = "model", "optimizer", "auxiliary"
GRADIENT, BUFFER = "gradient/", "buffer/"
ROWS = "rows"
"""In a checkpoint's state: microbatches of an epoch, the most over all replicas."""


def part_name(stage: int, replica: int) -> str:
    """Return what tells the file of one stage from the others."""
    return f"stage-{stage:02d}" + (f".replica-{replica}" if replica else "")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The tensors of one stage: those of the whole run by group, and what is its own in mid-epoch.

    `own` are its messages, averages and (beside the first replica) buffers; `description` says what they are.
    `ready` is the event after which a GPU has made the copies.
    """

    groups: dict[str, dict[str, Tensor]]
    numbers: dict[str, Number]
    part: str
    counters: dict[str, int]
    own: dict[str, Tensor] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)
    ready: Any = None


class Photographer:
    """Takes snapshots of the stages of this process; `bounds` are the units of every stage of the net."""

    def __init__(self, built: Built, *, bounds: Sequence[tuple[int, int]]) -> None:
        self._built = built
        self._bounds = bounds
        names = dict(built.network.named_parameters())
        if built.auxiliary is not None:
            names |= dict(built.auxiliary.named_parameters())
        self._name_of = {id(p): name for name, p in names.items()}
        self._trained = frozenset(names)
        self._stays = True

    def named_parameters(self, stage: StageRecord) -> list[tuple[str, nn.Parameter]]:
        """Return what a stage trains, by name."""
        groups = stage.updater.optimizer.param_groups
        return [(self._name_of[id(p)], p) for group in groups for p in group["params"]]

    def take(self, stage: StageRecord, cut: StageCut | None = None) -> Snapshot:
        """Return a stage as it is; `cut` is what it has in flight, None at the end of an epoch.

        Beside the first replica only what differs from it: buffers, messages and averages, in mid-epoch.

        Raises:
            NonFinite: the stage holds what is not finite.
        """
        sentinel = getattr(stage, "sentinel", None)
        if sentinel is not None:
            sentinel.settle()  # what is not finite is not saved
        self._stays = self._has_room(self._built.placement.device)
        replica = self._built.world.seat.replica
        own: dict[str, Tensor] = {}
        description: dict[str, Any] = {}
        if cut is not None:
            own, description = self._in_flight(stage, cut)
        groups, numbers = ({}, {}) if replica else self._of_the_run(stage)
        if replica and cut is not None:
            buffers = self._buffers(stage)
            own |= self._copies({BUFFER + name: b for name, b in buffers.items()})
        device = self._built.placement.device
        ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        part, counters = part_name(stage.index, replica), asdict(stage.counters)
        return Snapshot(groups, numbers, part, counters, own, description, ready)

    def must_be_finite(self, name: str) -> bool:
        """Tell of a tensor of the model whether it can only be finite; a mask, for one, need not be."""
        return name in self._trained or name.endswith((".running_mean", ".running_var"))

    def _of_the_run(self, stage: StageRecord) -> tuple[dict[str, dict[str, Tensor]], dict[str, Number]]:
        state, numbers = optimizer_state(stage.updater.optimizer, self.named_parameters(stage))
        groups = {MODEL: self._copies(self._module_state(stage)), OPTIMIZER: self._copies(state)}
        if self._built.auxiliary is not None:
            groups[AUXILIARY] = self._copies(self._auxiliary_state(stage))
        return groups, numbers

    def _copies(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: copy_of(tensor, stays=self._stays) for name, tensor in tensors.items()}

    def _has_room(self, device: torch.device) -> bool:
        """Tell whether a GPU has room for copies of all stages here beside what training takes at most."""
        if device.type != "cuda":
            return True
        left = memory_left(device)
        trained = [p for stage in self._built.pipeline.stages for _, p in self.named_parameters(stage)]
        optimizers = [stage.updater.optimizer for stage in self._built.pipeline.stages]
        states = [x for o in optimizers for state in o.state.values() for x in state.values()]
        copied = [*trained, *(p.grad for p in trained), *states]
        return left is None or fits_beside(
            sum(x.nbytes for x in copied if isinstance(x, Tensor)),
            left=left.bytes,
            allocated=torch.cuda.memory_allocated(device),
            peak=torch.cuda.max_memory_allocated(device),
        )

    def _in_flight(self, stage: StageRecord, cut: StageCut) -> tuple[dict[str, Tensor], dict[str, Any]]:
        sent = [
            {"microbatch": message.microbatch, "streams": message.streams, "labels": message.labels}
            for message in cut.sent
        ]
        sentinel = getattr(stage, "sentinel", None)
        tree = {
            "stage": cut.state,
            "sent": sent,
            "recorded": recorded_state(stage),
            "skipped": None if sentinel is None else sentinel.suspended(),
        }
        tensors, description = taken_apart(tree, name="in_flight")
        gradients = {
            GRADIENT + name: p.grad for name, p in self.named_parameters(stage) if p.grad is not None
        }
        return tensors | self._copies(gradients), cast(dict[str, Any], description)

    def _units(self, stage: StageRecord) -> dict[str, nn.Module]:
        units = cast(Any, self._built.network).units
        table = {name: unit for name, unit in units.named_children()}
        return {f"units.{n}.": table[str(n)] for n in range(*self._bounds[stage.index])}

    def _module_state(self, stage: StageRecord) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for prefix, unit in self._units(stage).items():
            unit.state_dict(destination=found, prefix=prefix)
        return found

    def _auxiliary_state(self, stage: StageRecord) -> dict[str, Tensor]:
        """Return the auxiliary net of a block, which has the number of the block's last unit."""
        assert self._built.auxiliary is not None
        prefix = f"{AUXILIARY}.{self._bounds[stage.index][1] - 1}."
        state = self._built.auxiliary.state_dict()
        return {name: value for name, value in state.items() if name.startswith(prefix)}

    def _buffers(self, stage: StageRecord) -> dict[str, Tensor]:
        found = {
            prefix + name: b
            for prefix, unit in self._units(stage).items()
            for name, b in unit.named_buffers()
        }
        if self._built.auxiliary is not None:
            buffers = dict(self._built.auxiliary.named_buffers())
            found |= {name: buffers[name] for name in self._auxiliary_state(stage) if name in buffers}
        return found


def fits_beside(needed: int, *, left: int, allocated: int, peak: int) -> bool:
    """Tell whether so many bytes can be taken while training goes on, which may get to its peak again."""
    return needed <= left - max(0, peak - allocated)


def copy_of(tensor: Tensor, *, stays: bool) -> Tensor:
    """Return a copy, on the same device if it is to stay there and has room, else in the host's memory."""
    if stays:
        try:
            return tensor.detach().clone()
        except torch.OutOfMemoryError:
            pass
    return tensor.detach().to("cpu", copy=True)


def on_host(snapshot: Snapshot) -> Snapshot:
    """Return a snapshot whose tensors are in the host's memory; waits for the device."""
    if snapshot.ready is None:
        return snapshot
    tables = [*snapshot.groups.values(), snapshot.own]
    device = next((t.device for table in tables for t in table.values() if t.is_cuda), None)
    if device is None:
        return snapshot
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_event(snapshot.ready)
    with torch.cuda.stream(stream):
        groups = {group: _to_host(table) for group, table in snapshot.groups.items()}
        own = _to_host(snapshot.own)
    stream.synchronize()
    return replace(snapshot, groups=groups, own=own, ready=None)


def _to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("cpu") for name, tensor in tensors.items()}


__all__ = [
    "AUXILIARY",
    "BUFFER",
    "GRADIENT",
    "MODEL",
    "OPTIMIZER",
    "PIPELINE",
    "ROWS",
    "Photographer",
    "Snapshot",
]
