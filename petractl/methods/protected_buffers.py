"""Buffers that are put back where an evaluation would leave a number in them that is not finite.

A running mean that has once been infinite stays so: leaving out the update of a bad microbatch is not enough.
So the buffers of a unit are copied before an evaluation that may change them, and those of a module in which
something has turned bad come back, counters beside them. What was not finite before (a mask) is left alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def buffers_of(unit: nn.Module) -> list[list[Tensor]]:
    """Return the buffers of a unit, those of one module together; each once."""
    seen: set[int] = set()
    groups = []
    for module in unit.modules():
        own = [b for b in module.buffers(recurse=False) if id(b) not in seen]
        seen.update(map(id, own))
        if any(b.is_floating_point() for b in own):
            groups.append(own)
    return groups


@contextmanager
def protected(groups: Sequence[Sequence[Tensor]]) -> Iterator[None]:
    """Put back the buffers of each group in which a number is no longer finite; waits for the device."""
    before = [[b.detach().clone() for b in group] for group in groups]
    yield
    for group, kept in zip(groups, before, strict=True):
        if any(_has_turned_bad(b, old) for b, old in zip(group, kept, strict=True)):
            for b, old in zip(group, kept, strict=True):
                # By `.data`: a graph that has saved the buffer must not take this for a change of its own.
                b.data.copy_(old)


def _has_turned_bad(buffer: Tensor, before: Tensor) -> bool:
    if not buffer.is_floating_point() or bool(torch.isfinite(buffer.sum())):
        return False
    return bool((~torch.isfinite(buffer) & torch.isfinite(before)).any())
