"""Replicas of a stage: the same parameters, other microbatches, one average gradient.

A replica averages over the microbatches of its group. Over replicas the average is weighted by the samples
that each one's group held, so that every sample of an update counts the same where microbatches are equal,
and a replica with nothing adds zero. All replicas get the same bits, so their parameters stay equal without
ever being compared.

Each unit's gradients travel in one bucket. Its all-reduce starts as soon as the unit's last gradient of the
group is there, in the order of the backward, and runs while the units below are differentiated.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor

from petractl.errors import PeerLost, Stalled


class Reducer:
    """Averages the gradients of one stage over its replicas; every replica calls it at every update.

    `units` are the parameters that are trained, by unit, from the stage's first. A parameter of several units
    is reduced with the lowest one, whose gradient comes last. Buckets are allocated once, here.
    """

    def __init__(self, units: Sequence[Sequence[Tensor]], *, group: dist.ProcessGroup) -> None:
        seen: set[int] = set()
        self._buckets: list[_Bucket | None] = []
        for unit in units:
            own = [p for p in unit if id(p) not in seen]
            seen.update(map(id, own))
            self._buckets.append(_Bucket(own) if own else None)
        self._group = group
        self._next = len(units) - 1
        self.wait_s = 0.0
        """Seconds, over all updates so far, that `finish` has waited for the other replicas.

        With NCCL the device waits, not the process: this counts next to nothing.
        """

    def start(self, unit: int, *, samples: int) -> None:
        """Begin to sum a unit's gradients; units come in reverse order, the last one first.

        `samples`: those of this replica's whole group.
        """
        assert unit == self._next, f"unit {unit} before unit {self._next}: replicas would sum different units"
        self._next -= 1
        bucket = self._buckets[unit]
        if bucket is not None:
            bucket.fill(samples)
            with _lost_peers_named():
                bucket.work = dist.all_reduce(bucket.flat, group=self._group, async_op=True)

    def finish(self, *, samples: int) -> None:
        """Start what is not started, wait, and leave the average in every parameter's gradient.

        `samples`: those of this replica's group, 0 if it held nothing. Where no replica has a gradient, there
        is none.
        """
        while self._next >= 0:
            self.start(self._next, samples=samples)
        began = time.perf_counter()
        with _lost_peers_named():
            for bucket in self._filled():
                bucket.wait()
        self.wait_s += time.perf_counter() - began
        for bucket in self._filled():
            bucket.give_back()
        self._next = len(self._buckets) - 1

    def _filled(self) -> list["_Bucket"]:
        """Return the buckets in the order in which they were started."""
        return [bucket for bucket in reversed(self._buckets) if bucket is not None]


class _Bucket:
    """The gradients of one unit in one piece of memory: [gradients x samples, samples, presence flags].

    Gradients lie in their parameters' own order of memory, so that going in and out are plain copies. Sums
    are at least float32's.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        dtype = reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
        size = sum(p.numel() for p in parameters)
        self.flat = torch.zeros(size + 1 + len(parameters), dtype=dtype, device=parameters[0].device)
        self._gradients, self._samples, self._flags = self.flat.split_with_sizes([size, 1, len(parameters)])
        parts = self._gradients.split_with_sizes([p.numel() for p in parameters])
        self._views = [_like(part, p) for part, p in zip(parts, parameters, strict=True)]
        self._is_missing: list[bool] = []
        self.work: dist.Work | None = None

    def fill(self, samples: int) -> None:
        """Take in the parameters' gradients; a replica without samples adds nothing."""
        gradients = [p.grad if samples else None for p in self._parameters]
        self._is_missing = [g is None for g in gradients]
        if all(self._is_missing):
            self.flat.zero_()
            self._samples.fill_(samples)
            return
        present = [(v, g) for v, g in zip(self._views, gradients, strict=True) if g is not None]
        torch._foreach_copy_([view for view, _ in present], [g for _, g in present])
        self._gradients.mul_(samples)
        self._samples.fill_(samples)
        self._flags.fill_(1)
        for n, is_missing in enumerate(self._is_missing):
            if is_missing:
                self._views[n].zero_()
                self._flags[n].zero_()

    def wait(self) -> None:
        """Wait for the sums; with NCCL, let the device wait for them."""
        assert self.work is not None
        self.work.wait()
        self.work = None

    def give_back(self) -> None:
        """Write the averages into the parameters' gradients."""
        self._gradients.div_(self._samples)
        given = []
        for p, view, exists in zip(self._parameters, self._views, self._presence(), strict=True):
            if not exists:
                p.grad = None
                continue
            if p.grad is None:
                p.grad = torch.empty_like(p)
            given.append((p.grad, view))
        if given:
            torch._foreach_copy_([g for g, _ in given], [view for _, view in given])

    def _presence(self) -> Sequence[bool]:
        """Tell for every parameter whether any replica has a gradient.

        What this one has needs no question, so the flags are read, which waits for the device, only where it
        lacks some.
        """
        if not any(self._is_missing):
            return [True] * len(self._parameters)
        return [bool(flag) for flag in self._flags.tolist()]


def average_buffers(buffers: Iterable[Tensor], *, group: dist.ProcessGroup) -> None:
    """Give all replicas the same running statistics, in place: the mean, or replica 0's where integer.

    Every replica passes the same buffers in the same order. A value that is equal on all replicas stays as it
    is, to the bit.
    """
    distinct = list({id(buffer): buffer.detach() for buffer in buffers}.values())
    averaged = [b for b in distinct if b.is_floating_point() or b.is_complex()]
    counted = [b for b in distinct if not (b.is_floating_point() or b.is_complex())]
    for dtype in dict.fromkeys(b.dtype for b in averaged):
        _average([b for b in averaged if b.dtype is dtype], dtype, group)
    if counted:
        # As bytes: no backend has every integer type.
        flat = torch.cat([b.flatten().view(torch.uint8) for b in counted])
        _take_from_first(flat, group)
        parts = flat.split_with_sizes([b.numel() * b.element_size() for b in counted])
        for part, b in zip(parts, counted, strict=True):
            b.copy_(part.clone().view(b.dtype).view(b.shape))


def _average(buffers: Sequence[Tensor], dtype: torch.dtype, group: dist.ProcessGroup) -> None:
    own = torch.cat([b.flatten() for b in buffers]).to(torch.promote_types(dtype, torch.float32))
    first = own.clone()
    _take_from_first(first, group)
    # The mean of differences: constants, infinite ones too (a mask), come out as they went in.
    difference = torch.where(own == first, 0.0, own - first)
    with _lost_peers_named():
        dist.all_reduce(difference, group=group)
    mean = first + difference / dist.get_world_size(group)
    for part, b in zip(mean.split_with_sizes([b.numel() for b in buffers]), buffers, strict=True):
        b.copy_(part.view(b.shape))


def _take_from_first(values: Tensor, group: dist.ProcessGroup) -> None:
    with _lost_peers_named():
        dist.broadcast(values, group=group, group_src=0)


def _like(flat: Tensor, parameter: Tensor) -> Tensor:
    """Return flat memory in the shape and, where it has no holes, the strides of a parameter."""
    has_holes = torch.empty_like(parameter).stride() != parameter.stride()
    if has_holes:
        return flat.view(parameter.shape)
    return flat.as_strided(parameter.shape, parameter.stride(), flat.storage_offset())


@contextmanager
def _lost_peers_named() -> Iterator[None]:
    """Turn what a backend says of a replica that is gone or silent into what has happened."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            raise Stalled("no answer from another replica of this stage") from error
        raise PeerLost("lost another replica of this stage") from error
