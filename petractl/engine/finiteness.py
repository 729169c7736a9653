"""Whether numbers are finite, as cheaply as a device allows.

A CPU is asked at once: a tensor whose sum is finite is finite (one pass at the speed of memory), and where
the sum is not, a second look tells an overflow from a bad element. A GPU is not waited for: the largest
magnitude of each tensor stays there, and a batch of them is read when it has arrived.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

_MOST_UNREAD = 64  # batches: the host is never so far ahead of a device without something to read

T = TypeVar("T")


def look_finite(made: Sequence[Tensor | None], given: Sequence[Tensor] = ()) -> bool:
    """Tell whether tensors are finite, but for those that are among `given`; None counts as zeros.

    The way of every microbatch: nothing but one sum of each tensor, as long as all is well.
    """
    total = 0.0
    for y in made:
        if y is None:
            continue
        for x in given:
            if x is y:
                break
        else:
            total += y.sum().item()
    # Not so where the total is infinite or not a number, complex or not.
    return total - total == 0.0 or are_finite(made)


def are_finite(tensors: Sequence[Tensor | None]) -> bool:
    """Tell whether every element of every tensor is finite; waits for the device."""
    return all(bool(torch.isfinite(x).all()) for x in tensors if x is not None)


def _as_reals(x: Tensor | None) -> Tensor | None:
    """Return a tensor whose sum says whether the given one is finite; None where it cannot but be."""
    if x is None or x.dtype is torch.float32:
        return None if x is None else x.detach()
    if x.is_complex():
        return torch.view_as_real(x.detach().resolve_conj())
    if not x.is_floating_point():
        return None
    return x.detach() if x.dtype is torch.float64 else x.detach().float()


@dataclass(frozen=True, slots=True)
class _Batch(Generic[T]):
    """Notes whose flags are on their way to the host."""

    notes: Sequence[T]
    flags: Tensor
    arrived: torch.cuda.Event | None


class FlagsOnDevice(Generic[T]):
    """Notes about tensors, each with a flag on the device that says whether they are finite."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._notes: list[T] = []
        self._magnitudes: list[Tensor] = []
        self._unread: deque[_Batch[T]] = deque()

    def note(self, note: T, tensors: Sequence[Tensor | None]) -> None:
        """Measure tensors; the note comes back if they are not finite."""
        measured = [x for x in map(_as_reals, tensors) if x is not None and x.numel()]
        if measured:
            found = torch._foreach_norm(measured, math.inf)
            self._magnitudes += found
            self._notes += [note] * len(found)

    def send(self) -> None:
        """Send the flags of what was noted since the last time to the host."""
        if not self._notes:
            return
        # In one dtype that holds them all: a double is not finite less often than what it was made of.
        same = len({x.dtype for x in self._magnitudes}) == 1
        row = torch.stack(self._magnitudes if same else [x.double() for x in self._magnitudes])
        flags, arrived = torch.isfinite(row), None
        if self._device.type == "cuda":
            host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            flags = host.copy_(flags, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._unread.append(_Batch(self._notes, flags, arrived))
        self._notes, self._magnitudes = [], []

    def read(self, *, wait: bool = False) -> list[T]:
        """Return the notes whose tensors are not finite, of what has arrived, in order; or wait for all."""
        bad: list[T] = []
        while self._unread and (wait or self._has_arrived(self._unread[0])):
            batch = self._unread.popleft()
            if batch.arrived is not None:
                batch.arrived.synchronize()
            bad += [note for note, flag in zip(batch.notes, batch.flags.tolist(), strict=True) if not flag]
        return bad

    def _has_arrived(self, batch: _Batch[T]) -> bool:
        if batch.arrived is None or len(self._unread) > _MOST_UNREAD:
            return True
        return bool(batch.arrived.query())  # type: ignore[no-untyped-call]
