"""How much memory is left, whoever sets the limit: the device, the machine, a cgroup, a resource limit."""

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryLeft:
    """Bytes that can still be taken; `shared` with the other processes on this machine."""

    bytes: int
    shared: bool


def memory_left(device: torch.device) -> MemoryLeft | None:
    """Return what the tightest limit leaves; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return MemoryLeft(free + unused, shared=False)
    return min(_limits(), key=lambda left: left.bytes, default=None)


def _limits() -> Iterator[MemoryLeft]:
    available = _lines(_PROC / "meminfo").get("MemAvailable:")
    if available is not None:
        yield MemoryLeft(available * 1024, shared=True)
    yield from _cgroup_limit(_CGROUP)
    status = _lines(_PROC / "self" / "status")
    for limit, key in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        most, used = resource.getrlimit(limit)[0], status.get(key)
        if most != resource.RLIM_INFINITY and used is not None:
            yield MemoryLeft(max(0, most - used * 1024), shared=False)


def _cgroup_limit(folder: Path) -> Iterator[MemoryLeft]:
    """Yield what version 2 of cgroups leaves; files that can be read again do not count as taken."""
    most, used = _number(folder / "memory.max"), _number(folder / "memory.current")
    if most is not None and used is not None:
        idle = _lines(folder / "memory.stat").get("inactive_file", 0)
        yield MemoryLeft(max(0, most - used + idle), shared=True)


def _lines(path: Path) -> dict[str, int]:
    """Return the numbers of a file of "name number ..." lines."""
    try:
        rows = [line.split() for line in path.read_text(encoding="ascii", errors="replace").splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
