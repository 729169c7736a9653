"""Messages as bytes: a header of integers that describes the tensors, and a payload that holds them.

A tensor arrives with the shape, dtype and strides that it was sent with: kernels choose their order of
summation by strides, so without them a run over several processes would not have the bits of one process. The
sizes of both parts are fixed at the start; a smaller message (the ragged last one) leaves the end unused.

Floating tensors may travel in a smaller number format: bfloat16, float16, or int8 with one scale per tensor,
the largest magnitude / 127. They arrive in their own dtype again, rounded. `rounded` does the same without a
wire, so that one process can give the bits of several.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from petractl.engine.messages import Activation, Gradient
from petractl.errors import RunError

MAX_DIMENSIONS = 8
FORMATS = ("float32", "bfloat16", "float16", "int8")
"""Number formats by name; "float32" leaves every tensor as it is."""

_ALIGNMENT = 64  # bytes, as torch's own memory: some libraries order their sums by alignment
_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_WORDS_FIRST = 4  # microbatch, cut, tensors before the split, tensors in all
_WORDS_PER_TENSOR = 3 + 2 * MAX_DIMENSIONS  # dtype, dtype on the wire, dimensions, shape, strides
_NO_STREAMS = -1

Message = Activation | Gradient


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor in a payload: what it is, and where its bytes lie."""

    dtype: torch.dtype
    sent_as: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def compact_shape(self) -> tuple[int, ...]:
        """The shape without repetition: 1 along every dimension in which the tensor is expanded."""
        return _compact(self.shape, self.strides)

    @property
    def end(self) -> int:
        """Where the next tensor may begin."""
        return self.offset + _aligned(self.nbytes)


def header_words(num_tensors: int) -> int:
    """Return the int64 words of the header of a message of up to `num_tensors` tensors."""
    words_per_line = _ALIGNMENT // 8
    return -(-(_WORDS_FIRST + num_tensors * _WORDS_PER_TENSOR) // words_per_line) * words_per_line


def payload_bytes(tensors: Sequence[tuple[Sequence[int], torch.dtype]], *, number_format: str) -> int:
    """Return the bytes of a payload of tensors of these shapes and dtypes."""
    return sum(
        _aligned(_wire_bytes(math.prod(shape), dtype, _sent_as(dtype, number_format)))
        for shape, dtype in tensors
    )


def tensors_of(message: Message) -> tuple[Tensor, ...]:
    """Return the tensors of a message in the order in which they travel."""
    if isinstance(message, Activation):
        return (*message.streams, message.labels)
    return (*(message.streams or ()), *message.gradients)


def parts_of(tensors: Sequence[Tensor], *, number_format: str) -> tuple[Part, ...]:
    """Lay tensors out in a payload, one after the other.

    Raises:
        RunError: a tensor is of a kind that cannot be sent.
    """
    layout = tuple((x.dtype, tuple(x.shape), tuple(x.stride())) for x in tensors)
    return _laid_out(layout, number_format)


def write_header(message: Message, parts: tuple[Part, ...], header: Tensor) -> None:
    """Describe a message in `header`, int64 of `header_words(...)`, on the CPU."""
    described = _description(_split(message), parts)
    words = header.numpy()
    words[0] = message.microbatch
    words[1] = message.cut if isinstance(message, Activation) else 0
    words[2 : 2 + len(described)] = described


@dataclass(frozen=True, slots=True)
class Head:
    """What a header says of a message besides its tensors; `first`: tensors before the split, -1: none."""

    microbatch: int
    cut: int
    first: int


def read_header(header: Tensor) -> tuple[Head, tuple[Part, ...]]:
    """Return what `write_header` has written."""
    words = header.numpy()
    count = int(words[_WORDS_FIRST - 1])
    described = words[2 : _WORDS_FIRST + count * _WORDS_PER_TENSOR].tobytes()
    return Head(int(words[0]), int(words[1]), int(words[2])), _described(described)


# A run has a handful of layouts, and every message has one of them: what follows is done once for each.


@lru_cache(maxsize=256)
def _laid_out(
    layout: tuple[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]], ...], number_format: str
) -> tuple[Part, ...]:
    for dtype, shape, _ in layout:
        if len(shape) > MAX_DIMENSIONS or dtype not in _CODES:
            raise RunError(
                f"a tensor of {len(shape)} dimensions of {dtype} cannot be sent between stages",
                hint=f"units may exchange tensors of up to {MAX_DIMENSIONS} dimensions of the usual dtypes",
            )
    return _placed(
        (dtype, _sent_as(dtype, number_format), shape, strides) for dtype, shape, strides in layout
    )


def _placed(
    tensors: Iterable[tuple[torch.dtype, torch.dtype, tuple[int, ...], tuple[int, ...]]],
) -> tuple[Part, ...]:
    parts: list[Part] = []
    for dtype, sent_as, shape, strides in tensors:
        nbytes = _wire_bytes(math.prod(_compact(shape, strides)), dtype, sent_as)
        offset = parts[-1].end if parts else 0
        parts.append(Part(dtype, sent_as, shape, strides, offset, nbytes))
    return tuple(parts)


@lru_cache(maxsize=256)
def _description(first: int, parts: tuple[Part, ...]) -> NDArray[np.int64]:
    """Return a header's words behind the first two."""
    words = [first, len(parts)]
    for part in parts:
        padding = [0] * (MAX_DIMENSIONS - len(part.shape))
        words += [_CODES[part.dtype], _CODES[part.sent_as], len(part.shape)]
        words += [*part.shape, *padding, *part.strides, *padding]
    return np.array(words, dtype=np.int64)


@lru_cache(maxsize=256)
def _described(description: bytes) -> tuple[Part, ...]:
    """Return the parts that `_description` has put into words."""
    words = np.frombuffer(description, dtype=np.int64).tolist()
    tensors = []
    for at in range(_WORDS_FIRST - 2, len(words), _WORDS_PER_TENSOR):
        dtype, sent_as, dimensions = _DTYPES[words[at]], _DTYPES[words[at + 1]], words[at + 2]
        shape = tuple(words[at + 3 : at + 3 + dimensions])
        strides = tuple(words[at + 3 + MAX_DIMENSIONS : at + 3 + MAX_DIMENSIONS + dimensions])
        tensors.append((dtype, sent_as, shape, strides))
    return _placed(tensors)


def _split(message: Message) -> int:
    if isinstance(message, Activation):
        return len(message.streams)
    return _NO_STREAMS if message.streams is None else len(message.streams)


def write_payload(tensors: Sequence[Tensor], parts: Sequence[Part], payload: Tensor) -> None:
    """Copy tensors to their places in `payload`, uint8, on the tensors' device.

    Raises:
        RunError: they need more room than was agreed.
    """
    if parts and parts[-1].offset + parts[-1].nbytes > payload.numel():
        raise RunError(
            f"a message of {parts[-1].end:,} bytes is larger than agreed ({payload.numel():,}): "
            + ", ".join(str(part.shape) for part in parts),
            hint="units must give tensors of the same shape per sample for every microbatch",
        )
    for tensor, part in zip(tensors, parts, strict=True):
        compact = tensor.detach().as_strided(part.compact_shape, part.strides)
        region = payload[part.offset : part.offset + part.nbytes]
        if part.sent_as is torch.int8 and part.dtype is not torch.int8:
            scale = _scale(compact)
            region[:4].view(torch.float32).copy_(scale)
            compact = torch.round(compact / scale).nan_to_num_(0.0).reshape(part.compact_shape)
            region = region[_ALIGNMENT:]
        _view(region, part).copy_(compact)


def read_payload(parts: Sequence[Part], payload: Tensor) -> list[Tensor]:
    """Return the tensors of a payload: views of it where they were sent as they are, else new ones."""
    return [_read(part, payload[part.offset : part.offset + part.nbytes]) for part in parts]


def message_of(head: Head, tensors: Sequence[Tensor], *, upwards: bool) -> Message:
    """Put a message together again."""
    first = head.first
    if upwards:
        return Activation(head.microbatch, tuple(tensors[:first]), tensors[first], head.cut)
    if first == _NO_STREAMS:
        return Gradient(head.microbatch, None, tuple(tensors))
    return Gradient(head.microbatch, tuple(tensors[:first]), tuple(tensors[first:]))


def rounded(message: Message, *, number_format: str) -> Message:
    """Return what a message is after its way over the wire, for engines that have none."""
    if number_format == "float32":
        return message
    tensors: Sequence[Tensor] = tensors_of(message)
    parts = parts_of(tensors, number_format=number_format)
    payload = torch.empty(parts[-1].end, dtype=torch.uint8, device=tensors[0].device)
    write_payload(tensors, parts, payload)
    upwards = isinstance(message, Activation)
    cut = message.cut if isinstance(message, Activation) else 0
    head = Head(message.microbatch, cut, _split(message))
    return message_of(head, read_payload(parts, payload), upwards=upwards)


def _read(part: Part, region: Tensor) -> Tensor:
    scale: Tensor | None = None
    if part.sent_as is torch.int8 and part.dtype is not torch.int8:
        scale, region = region[:4].view(torch.float32), region[_ALIGNMENT:]
    tensor = _view(region, part)
    if part.sent_as is not part.dtype or not _is_dense(part.compact_shape, part.strides):
        arrived = tensor if scale is None else tensor * scale[0]
        tensor = torch.empty_strided(
            part.compact_shape, part.strides, dtype=part.dtype, device=region.device
        ).copy_(arrived)
    return tensor if part.compact_shape == part.shape else tensor.expand(part.shape)


def _view(region: Tensor, part: Part) -> Tensor:
    """Return bytes as the compact tensor: in its own strides where these leave no gaps, else in order."""
    flat = region.view(part.sent_as)
    if _is_dense(part.compact_shape, part.strides):
        return flat.as_strided(part.compact_shape, part.strides, flat.storage_offset())
    return flat.view(part.compact_shape)


@lru_cache(maxsize=256)
def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Tell whether a tensor's elements fill its memory without gaps or overlaps, in any order."""
    expected = 1
    for step, size in sorted((step, size) for size, step in zip(shape, strides, strict=True) if size > 1):
        if step != expected:
            return False
        expected *= size
    return True


def _compact(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    return tuple(min(n, 1) if step == 0 else n for n, step in zip(shape, strides, strict=True))


def _scale(tensor: Tensor) -> Tensor:
    """Return the scale of int8, never 0; not finite where the tensor is not, so that it shows above."""
    if tensor.numel() == 0:
        return torch.ones(1, dtype=torch.float32, device=tensor.device)
    largest = tensor.abs().amax().float().reshape(1) / 127.0
    return torch.where(largest == 0, torch.ones_like(largest), largest)


def _sent_as(dtype: torch.dtype, number_format: str) -> torch.dtype:
    assert number_format in FORMATS, number_format
    sent: torch.dtype = getattr(torch, number_format)
    if not dtype.is_floating_point or number_format == "float32" or sent.itemsize >= dtype.itemsize:
        return dtype
    return sent


def _wire_bytes(count: int, dtype: torch.dtype, sent_as: torch.dtype) -> int:
    scale = _ALIGNMENT if sent_as is torch.int8 and dtype is not torch.int8 else 0
    return scale + count * sent_as.itemsize


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
