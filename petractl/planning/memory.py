"""The memory of every possible stage: what must fit on a device, before anything runs.

    static      parameters, buffers, optimiser state, stale versions of the parameters, message buffers
    in flight   W microbatches that wait for their backward: graphs, inputs or nothing
    working     the most of: a forward; the backward of one unit, with what is left of the (W+1)-th
                microbatch and the gradients that are there by then; the end of the backward, with all
                gradients and the message down
    received    buffers of messages: those to come, those that wait, those kept as inputs

A message in a smaller number format is unpacked into tensors of its own: what is kept of it is then in
flight, and the buffer is free again.

A stage runs W forwards ahead of its backwards. Everything is a difference of prefix sums but the largest
working set, which is a range maximum: so the whole matrix of stages is as easy as one of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from petractl.engine.links import POSTED_AHEAD
from petractl.planning.fitting import StageBytes
from petractl.planning.footprint import Footprint
from petractl.planning.optimal import cheapest_path

Integers = npt.NDArray[np.int64]

OPTIMIZER_STATE = {"sgd": 1, "lars": 1, "adamw": 2}
"""Copies of the parameters that an optimiser keeps; sgd and lars: its momentum."""
_LABEL_BYTES = 8
_TOO_FULL = 1e6
_NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True, slots=True)
class StageMemory:
    """The bytes that a stage holds at its peak, item by item (or arrays of them)."""

    parameters: Any
    """Parameters and buffers."""
    optimizer: Any
    versions: Any
    """Stale copies of the parameters."""
    in_flight: Any
    """Microbatches that wait for their backward."""
    working: Any
    """The largest working set, gradients included."""
    received: Any
    """Buffers of messages that have come or will come, or are kept as inputs."""
    sent: Any
    """Buffers of messages on their way."""
    data: Any
    """Images of the microbatches in flight, on the first stage."""

    @property
    def total(self) -> Any:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def static(self) -> Any:
        """What does not depend on the number of samples, gradients aside."""
        return self.parameters + self.optimizer + self.versions


class MemoryModel:
    """The memory of stages of a net whose units were traced, under one method and batch size.

    `optimizer_copies` is the optimiser's state in copies of the trained parameters, `accumulation` is k,
    `number_formats` those of messages (upwards, downwards), `host_buffers` whether messages wait in the
    memory that is counted until they are wanted (CPU) or come when there is room (GPU).
    """

    def __init__(
        self,
        footprints: Sequence[Footprint],
        *,
        samples: int,
        optimizer_copies: float = 1.0,
        accumulation: int = 1,
        number_formats: tuple[str, str] = ("float32", "float32"),
        host_buffers: bool = True,
    ) -> None:
        self._optimizer_copies = optimizer_copies
        self.accumulation = accumulation
        self._posted = POSTED_AHEAD if host_buffers else 0
        self.num_units = len(footprints)
        self._parameters = _sums(f.parameters + f.buffers for f in footprints)
        self._trained = _sums(f.trained for f in footprints)
        self._stashed = _sums(f.trained * f.stashes for f in footprints)
        self._kept = _sums(f.kept for f in footprints)
        self._kept_above = _array([0, *(f.kept_above for f in footprints)])
        self._needs_message = _array([*(f.needs_input for f in footprints), False])
        self._streams = _array([*(f.streams_below for f in footprints), 0])
        self._images = int(self._streams[0])
        self._set_messages(footprints, samples, number_formats)
        self._from_above = _array([0, *(f.at_backward for f in footprints)])
        self._backward_peak = _array([0, *(f.backward_peak for f in footprints)])
        self._forward = _array([f.forward_peak for f in footprints])
        left = self._kept[1:] - self._kept_above[1:]
        # Sums of gradients are there from the start; a first gradient is taken over as it comes.
        if accumulation == 1:
            left = left - self._trained[1:]
        self._most_inside = _range_maximum(self._backward_peak[1:] + left)
        before = self._kept[:-1] - self._kept_above[:-1]
        self._most_forward = _range_maximum(self._forward + before)

    def _set_messages(
        self, footprints: Sequence[Footprint], samples: int, number_formats: tuple[str, str]
    ) -> None:
        """Set what crosses the cut below each unit: in buffers, and unpacked beside them, if it has to be."""
        labels = _LABEL_BYTES * samples
        inner = [f.streams_below > 0 and n > 0 for n, f in enumerate(footprints)]
        up = _array([*(f.streams_below * there for f, there in zip(footprints, inner, strict=True)), 0])
        down = _array([*(f.down_below * there for f, there in zip(footprints, inner, strict=True)), 0])
        upwards, downwards = (_NUMBER_BYTES[name] for name in number_formats)
        self._up = up * upwards // 4 + labels * _array([*inner, False])
        self._down = down * downwards // 4
        self._up_unpacked = up if upwards < 4 else 0 * up
        self._down_unpacked = down if downwards < 4 else 0 * down

    def up_bytes(self, cut: int) -> int:
        """Return the bytes of a message up over the cut below unit `cut`."""
        return int(self._up[cut])

    def down_bytes(self, cut: int) -> int:
        """Return the bytes of a message down over it."""
        return int(self._down[cut])

    def stage(
        self,
        first: int | Integers,
        end: int | Integers,
        *,
        lookahead: int,
        lookahead_below: int | None = None,
        lookahead_above: int | None = None,
    ) -> StageMemory:
        """Return the peak of a stage of the units `first` ... `end` - 1, or of arrays of such stages.

        `lookahead` is the stage's W; those of its neighbours (None: there is none) limit how many messages
        can wait for it.
        """
        k, ahead = self.accumulation, lookahead
        trained = self._trained[end] - self._trained[first]
        stashed = self._stashed[end] - self._stashed[first]
        flight = self._flight(first, end)
        below = 0 if lookahead_below is None else lookahead_below - ahead + 1
        above = 0 if lookahead_above is None else ahead - lookahead_above + 1
        kept_as_they_came = (self._needs_message[first] > 0) & (self._up_unpacked[first] == 0)
        incoming = (below > 0) * (below + ahead * kept_as_they_came + self._posted) * self._up[first]
        incoming = incoming + (above > 0) * (above + self._posted) * self._down[end]
        return StageMemory(
            parameters=self._parameters[end] - self._parameters[first],
            optimizer=np.int64(1) * np.rint(self._optimizer_copies * trained).astype(np.int64),
            versions=-(-ahead // k) * stashed,
            in_flight=ahead * flight,
            working=self._working(first, end, trained, flight),
            received=incoming,
            sent=(below > 0) * self._down[first] + (above > 0) * self._up[end],
            data=np.where(np.asarray(first) == 0, (ahead + 1) * self._images, 0),
        )

    def bytes_of(self, lookahead: Sequence[int], stage: int) -> npt.NDArray[np.float64]:
        """Return the bytes of every possible stage number `stage`, [end, first]; infinite without units."""
        places = np.arange(self.num_units + 1)
        first, end = places[None, :], np.maximum(places[:, None], places[None, :])
        found = self.stage(first, end, **_neighbours(lookahead, stage)).total.astype(np.float64)
        return np.where(np.tri(len(places), k=-1, dtype=bool), found, np.inf)

    def stages(self, cuts: Sequence[int], *, lookahead: Sequence[int]) -> tuple[StageMemory, ...]:
        """Return the peak of every stage of a cut net."""
        edges = [0, *cuts, self.num_units]
        return tuple(
            _plain(self.stage(edges[j], edges[j + 1], **_neighbours(lookahead, j)))
            for j in range(len(lookahead))
        )

    def _flight(self, first: int | Integers, end: int | Integers) -> Any:
        """Return what one microbatch leaves in a stage, outside of messages' buffers."""
        inside = np.maximum(0, self._kept[end] - self._kept[first] - self._kept_above[end])
        return inside + np.where(self._needs_message[first] > 0, self._up_unpacked[first], 0)

    def _working(self, first: int | Integers, end: int | Integers, trained: Any, flight: Any) -> Any:
        """Return the largest working set above what W microbatches hold."""
        is_last = np.asarray(end) == self.num_units
        alone = np.asarray(end) - np.asarray(first) == 1
        sums = trained if self.accumulation > 1 else 0
        # The messages of the operation: one unpacked for the backward; the last stage's began with a forward.
        arrived = self._up_unpacked[first]
        message = self._down_unpacked[end] + np.where(is_last, arrived, 0)
        held = np.where(self._needs_message[first] > 0, arrived, 0)
        # The top unit finds in a message what the others get from the unit above them.
        from_message = np.where(is_last, np.where(alone, self._streams[first], 0), self._from_above[end])
        top = self._backward_peak[end] - from_message + flight - np.where(is_last, held, 0) + message + sums
        gradients = sums if self.accumulation > 1 else self._trained[end]
        inside = self._most_inside[first, np.maximum(end - 1, first)] - self._kept[first] + gradients
        inside = inside + np.where(is_last, 0, held) + message
        ends = 2 - (self._needs_message[first] > 0) * (self._up_unpacked[first] == 0)
        finish = np.where(np.asarray(first) == 0, 0, ends * self._streams[first]) + trained + message
        bottom = self._forward[np.minimum(first, self.num_units - 1)] - self._streams[first] + arrived + sums
        above = np.minimum(np.asarray(first) + 1, end)
        forward = self._most_forward[above, end] - self._kept[first] + arrived + sums
        return np.maximum.reduce(np.broadcast_arrays(top, inside, finish, bottom, forward))


def cuts_by_memory(
    model: MemoryModel, lookahead: Sequence[int], *, limits: Sequence[int | None] = ()
) -> tuple[int, ...]:
    """Return the cuts whose fullest stage holds the least, as a share of its device where limits are given.

    What fits comes before what does not; a device of unknown memory counts as the largest one.
    """
    sizes = StageBytes(model)
    largest = max((limit for limit in limits if limit is not None), default=1)

    def share(stage: int, rows: slice, columns: slice) -> npt.NDArray[np.float64]:
        limit = limits[stage] if limits else None
        shares = sizes.of(lookahead, stage)[rows, columns] / (largest if limit is None else limit)
        return shares if limit is None else np.where(shares > 1.0, shares + _TOO_FULL, shares)

    return cheapest_path(share, num_units=model.num_units, num_stages=len(lookahead))[1]


def _neighbours(lookahead: Sequence[int], stage: int) -> dict[str, Any]:
    return {
        "lookahead": lookahead[stage],
        "lookahead_below": lookahead[stage - 1] if stage else None,
        "lookahead_above": lookahead[stage + 1] if stage + 1 < len(lookahead) else None,
    }


def _plain(memory: StageMemory) -> StageMemory:
    return StageMemory(**{field.name: int(getattr(memory, field.name)) for field in fields(memory)})


def _array(values: Any) -> Integers:
    return np.asarray(list(values), dtype=np.int64)


def _sums(values: Any) -> Integers:
    """Return the sums of the first 0, 1, ... values."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(_array(values))])


def _range_maximum(values: Integers) -> Integers:
    """Return a matrix of the largest of values[first:end], [first, end]; of nothing: far below zero."""
    count = len(values)
    nothing = np.iinfo(np.int64).min // 4
    table = np.where(np.tri(count, k=-1, dtype=bool), nothing, values[None, :])
    most = np.maximum.accumulate(table, axis=1)
    return np.pad(most, ((0, 1), (1, 0)), constant_values=nothing)
