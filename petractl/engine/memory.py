"""Memory settings of the training process."""

import ctypes
import resource
import sys

import torch

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_KEPT = 1 << 30


def keep_freed_memory() -> bool:
    """Let glibc keep freed activations for the next microbatch instead of giving them back to the system.

    Otherwise every large tensor is mapped and cleared anew: a fifth of the time of a step that keeps its
    graph was page faults. Returns False where the C library is another; nothing else depends on it.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    done = mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    return bool(done)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory held so far: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024
