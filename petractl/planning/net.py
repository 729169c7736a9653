"""A net as the planner sees it: what each unit costs in time and memory under one method."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from petractl.methods.family import Keep, Keeping
from petractl.planning.devices import DeviceSpec
from petractl.planning.flops import UnitCost
from petractl.planning.footprint import Footprint, scaled
from petractl.planning.memory import MemoryModel
from petractl.planning.message_cost import FREE_MESSAGES, MessageCost
from petractl.planning.times import Link, StageTimes
from petractl.planning.unit_bench import UnitTimes

FORWARDS = {Keep.GRAPH: 3, Keep.INPUT: 4, Keep.NOTHING: 4}
"""Forward and backward in forwards: the backward counts two, and a unit may have to be evaluated again."""
_FLOPS_PER_S = 1e12  # nominal


def times_by_flops(
    costs: Sequence[UnitCost], kept: Sequence[Keeping], *, batch_size: int
) -> tuple[UnitTimes, ...]:
    """Return the units' times on a nominal device of 1 TFLOP/s that does nothing but FLOPs."""
    forwards = [cost.flops * batch_size / _FLOPS_PER_S for cost in costs]
    passes = [FORWARDS[keeping.keep] - 1 for keeping in kept]
    return tuple(UnitTimes(f, f * n) for f, n in zip(forwards, passes, strict=True))


@dataclass(frozen=True)
class Net:
    """The units of a net with their costs, for microbatches of `batch_size`.

    `times` and `backprop_times` are on a device of speed 1, as is `messages`; `clock` says where they are
    from. `footprints` are of `kept`.
    """

    names: tuple[str, ...]
    kept: tuple[Keeping, ...]
    costs: tuple[UnitCost, ...]
    times: tuple[UnitTimes, ...]
    backprop_times: tuple[UnitTimes, ...]
    footprints: tuple[Footprint, ...]
    batch_size: int
    locked: bool
    clock: str
    optimizer_copies: float = 1.0
    host_buffers: bool = True
    number_formats: tuple[str, str] = ("float32", "float32")
    """Of messages, upwards and downwards."""
    messages: MessageCost = FREE_MESSAGES

    @property
    def num_units(self) -> int:
        """How many units there are."""
        return len(self.names)

    def memory(self, *, accumulation: int) -> MemoryModel:
        """Return the memory model for k = `accumulation`."""
        return MemoryModel(
            self.footprints,
            samples=self.batch_size,
            optimizer_copies=self.optimizer_copies,
            accumulation=accumulation,
            host_buffers=self.host_buffers,
            number_formats=self.number_formats,
        )

    def with_batch(self, batch_size: int) -> "Net":
        """Return the net with another batch size, memory and times scaled."""
        factor = batch_size / self.batch_size
        times, backprop = (
            tuple(replace(t, forward_s=t.forward_s * factor, backward_s=t.backward_s * factor) for t in each)
            for each in (self.times, self.backprop_times)
        )
        footprints = tuple(scaled(item, factor) for item in self.footprints)
        return replace(
            self, times=times, backprop_times=backprop, footprints=footprints, batch_size=batch_size
        )

    @cached_property
    def message_bytes(self) -> npt.NDArray[np.int64]:
        """The bytes of messages (up, down) over the cut below each unit, shape (2, units + 1)."""
        model = self.memory(accumulation=1)
        cuts = range(self.num_units + 1)
        return np.array([[model.up_bytes(cut) for cut in cuts], [model.down_bytes(cut) for cut in cuts]])

    def unit_times_s(self, *, accumulation: int, speeds: Sequence[float]) -> npt.NDArray[np.float64]:
        """Return the seconds of every unit per microbatch on every stage's device, its part of the update in.

        Shape (units,) for devices of one speed, else (stages, units).
        """
        whole: npt.NDArray[np.float64] = np.array([unit_s(t, accumulation=accumulation) for t in self.times])
        factors = 1.0 / np.asarray(speeds)
        result: npt.NDArray[np.float64] = np.multiply.outer(factors, whole)
        return result[0] if len(set(speeds)) == 1 else result

    def stage_times(
        self,
        cuts: Sequence[int],
        *,
        speeds: Sequence[float],
        backprop: bool = False,
        accumulation: int = 1,
    ) -> tuple[StageTimes, ...]:
        """Return what the simulator is told of the stages of a cut net; of backprop's if that is asked.

        A stage's operations have the copying of what they send in them. With `accumulation` > 1 a backward
        has its share of adding gradients up.
        """
        edges = [0, *cuts, self.num_units]
        times = self.backprop_times if backprop else self.times
        up, down = self.message_bytes
        result = []
        for j, speed in enumerate(speeds):
            first, end = edges[j], edges[j + 1]
            part = times[first:end]
            # Backprop sends gradients alone, as large as what was sent up.
            below = int(up[first] if backprop else down[first])
            above = int(up[end])
            takes_up, takes_down = first > 0, end < self.num_units
            further = (accumulation - 1) / accumulation
            stage = StageTimes(
                forward_s=sum(t.forward_s for t in part)
                + self._handling_s(takes=takes_up, sends=takes_down, sent_bytes=above),
                backward_s=sum(t.backward_s + further * t.accumulate_s for t in part)
                + self._handling_s(takes=takes_down, sends=takes_up, sent_bytes=below),
                update_s=sum(t.update_s for t in part),
                message_up_bytes=above,
                message_down_bytes=below,
            )
            result.append(stage.on_device(speed))
        return tuple(result)

    def _handling_s(self, *, takes: bool, sends: bool, sent_bytes: int) -> float:
        """Return the seconds of taking a message out and of packing another."""
        taking = self.messages.unpack_s if takes else 0.0
        return taking + (self.messages.sending_s(sent_bytes) if sends else 0.0)

    def crossing_s(self, links: Sequence[Link]) -> npt.NDArray[np.float64]:
        """Return how long a cut keeps the link below each stage busy, shape (stages, units + 1)."""
        up, down = self.message_bytes
        rows = [np.zeros(self.num_units + 1)]
        for link in links:
            if self.locked:
                rows.append((up + down) / link.bytes_per_s + 2 * link.latency_s)
            else:
                rows.append(np.maximum(up, down) / link.bytes_per_s)
        return np.stack(rows)


def unit_s(times: UnitTimes, *, accumulation: int) -> float:
    """Return all that a unit takes per microbatch, its parts of adding up gradients and updating in."""
    per_update = times.update_s + (accumulation - 1) * times.accumulate_s
    return times.forward_s + times.backward_s + per_update / accumulation


def links_of(devices: Sequence[DeviceSpec], *, unknown: Link = Link()) -> tuple[Link, ...]:  # noqa: B008
    """Return the links between neighbours: as slow as the slower one; `unknown` where nothing is known."""
    result = []
    for below, above in pairwise(devices):
        rates = [d.link_bytes_per_s for d in (below, above) if d.link_bytes_per_s is not None]
        latencies = [d.link_latency_s for d in (below, above) if d.link_latency_s is not None]
        given = Link(max(latencies, default=0.0), min(rates, default=float("inf")))
        result.append(given if rates or latencies else unknown)
    return tuple(result)
