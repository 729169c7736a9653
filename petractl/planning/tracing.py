"""How many bytes of tensors are alive while code runs, counted operation by operation, also on meta tensors.

On torch's meta device nothing is computed and nothing allocated, but autograd saves and frees what it would
save and free: so the peak of a unit at any batch size is known in milliseconds, on any machine. What a kernel
allocates for itself is not seen, so it must be told: `cpu_workspace` knows the kernels that allocate most.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the memory that operations within the block make and that is still referred to.

    What existed before does not count. `live` is what is alive now, `peak` the most since the last
    `reset_peak`. With `section` set, `freed` tells in which section each piece of memory died. `workspace`
    tells of an operation and its arguments what its kernel allocates besides its results.
    """

    def __init__(self, workspace: Callable[[Any, Sequence[Any]], int] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._workspace = workspace
        self.live = 0
        self.peak = 0
        self.section = 0
        self.made: list[tuple[int, int]] = []
        """(section, bytes) of every piece of memory, in the order of making."""
        self.freed: dict[int, int] = {}
        """Number of the piece of memory -> the section in which it was freed."""
        self._known: dict[int, int] = {}

    def reset_peak(self) -> None:
        """Begin a new peak with what is alive."""
        self.peak = self.live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it made."""
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor, counts=False)
        result = func(*args, **(kwargs or {}))
        # Autograd adds up gradients in place, but not where a mode like this one watches.
        in_place = func is torch.ops.aten.add.Tensor and torch._C._current_graph_task_id() != -1
        for tensor in _tensors(result):
            self._meet(tensor, counts=True, spare=tensor.untyped_storage().nbytes() if in_place else 0)
        if self._workspace is not None and (more := self._workspace(func, tuple(args))):
            self.peak = max(self.peak, self.live + more)
        return result

    def _meet(self, tensor: Tensor, *, counts: bool, spare: int = 0) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        number = -1
        if counts:
            number = len(self.made)
            self.made.append((self.section, storage.nbytes()))
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live - spare)
        self._known[key] = number
        weakref.finalize(storage, self._drop, key).atexit = False

    def _drop(self, key: int) -> None:
        number = self._known.pop(key)
        if number >= 0:
            self.live -= self.made[number][1]
            self.freed[number] = self.section


def cpu_workspace(func: Any, args: Sequence[Any], *, channels_last: bool) -> int:
    """Return what torch's kernels for the CPU allocate besides their results, as far as it counts.

    Measured with torch 2.15 and oneDNN: the batch norm's backward makes its result twice; a convolution lays
    its weights out anew (again for the gradients), and its activations too where they are not channels-last.
    That is not read from the tensors: the meta device does not keep it.
    """
    aten = torch.ops.aten
    if func is aten.native_batch_norm_backward.default:
        return _bytes(args[1])
    if func is aten.convolution.default:
        activations, weight, copies = args[:1], args[1], 1
    elif func is aten.convolution_backward.default:
        activations, weight, copies = args[:2], args[2], 2
    else:
        return 0
    copies += weight.dtype is not torch.float32
    return copies * _bytes(weight) + (0 if channels_last else sum(map(_bytes, activations)))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
