"""How one message gets from a stage to its neighbour: through memory of the host, or between GPUs.

A carrier has two halves of each direction: `pack` and `unpack` run in the training thread and never wait;
`send`, `post` and `complete` run in the thread of a link (see `links`) and may.

    HostCarrier    CPU tensors through gloo: one copy into a buffer, none on arrival.
    StagedCarrier  GPU tensors through gloo and pinned memory, copied on a stream of its own: for stages that
                   share a GPU, or have no NCCL between them.
    NcclCarrier    GPU tensors through NCCL on a stream of its own; the header, which says how to read them,
                   travels through gloo beside them.

Memory is allocated once: a buffer goes back to its pool when nothing refers to it any more, so a stage that
keeps its input keeps the buffer, and one that keeps nothing gives it back at once.
"""

import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from petractl.engine import wire
from petractl.engine.wire import Message


@dataclass(frozen=True, slots=True)
class MessageSize:
    """What both ends of a link have agreed on: the bytes of header and payload, and the number format."""

    header_bytes: int
    payload_bytes: int
    number_format: str = "float32"

    @property
    def nbytes(self) -> int:
        """The bytes of one message."""
        return self.header_bytes + self.payload_bytes


@dataclass(frozen=True, slots=True)
class Route:
    """The way to one neighbour: its global rank, the process groups, and a tag that parts links."""

    peer: int
    group: dist.ProcessGroup
    tag: int = 0
    header_group: dist.ProcessGroup | None = None
    """The gloo group beside an NCCL one."""


@dataclass(slots=True)
class Parcel:
    """A message on its way: host memory, and on a GPU device memory and the event of its last copy."""

    host: Tensor
    device: Tensor | None = None
    event: Any = None


class Carrier(Protocol):
    """One direction of the way between two neighbours."""

    size: MessageSize

    def enter_thread(self) -> None:
        """Prepare the link's thread, in which the rest but `pack` and `unpack` is called."""
        ...

    def pack(self, message: Message) -> Parcel:
        """Copy a message for its way (training thread)."""
        ...

    def send(self, parcel: Parcel) -> None:
        """Send it and wait until its memory may be used again (link's thread)."""
        ...

    def post(self) -> tuple[Parcel, Any]:
        """Begin to receive (link's thread)."""
        ...

    def complete(self, parcel: Parcel, work: Any) -> None:
        """Wait for what was posted (link's thread)."""
        ...

    def unpack(self, parcel: Parcel) -> Message:
        """Return the message (training thread)."""
        ...


class BufferPool:
    """Buffers of one size; each comes back by itself when no tensor uses its memory any more."""

    def __init__(self, nbytes: int, *, pinned: bool = False) -> None:
        self._nbytes = nbytes
        self._pinned = pinned
        self._free: deque[Any] = deque()
        self.allocated = 0

    def take(self) -> Tensor:
        """Return a buffer, uint8 (nbytes,), with anything in it."""
        try:
            memory = self._free.popleft()
        except IndexError:
            memory = torch.zeros(self._nbytes, dtype=torch.uint8, pin_memory=self._pinned).numpy()
            self.allocated += 1
        # A tensor of an array keeps that array alive as long as any view of the tensor lives.
        lent = memory[:]
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent)


class HostCarrier:
    """CPU tensors through gloo."""

    def __init__(self, route: Route, size: MessageSize, *, upwards: bool) -> None:
        self.size = size
        self._route = route
        self._upwards = upwards
        self._pool = BufferPool(size.nbytes)

    def enter_thread(self) -> None:
        """Do nothing: threads share the CPU's memory."""

    def pack(self, message: Message) -> Parcel:
        """Copy header and tensors into a buffer."""
        host = self._pool.take()
        tensors = wire.tensors_of(message)
        parts = wire.parts_of(tensors, number_format=self.size.number_format)
        wire.write_header(message, parts, _header(host, self.size))
        wire.write_payload(tensors, parts, host[self.size.header_bytes :])
        return Parcel(host)

    def send(self, parcel: Parcel) -> None:
        """Send the buffer; returns when the other side has taken it."""
        _wait(dist.isend(parcel.host, self._route.peer, group=self._route.group, tag=self._route.tag))

    def post(self) -> tuple[Parcel, Any]:
        """Post a receive into a buffer."""
        host = self._pool.take()
        return Parcel(host), dist.irecv(host, self._route.peer, group=self._route.group, tag=self._route.tag)

    def complete(self, parcel: Parcel, work: Any) -> None:
        """Wait for the message."""
        _wait(work)

    def unpack(self, parcel: Parcel) -> Message:
        """Return the message, its tensors views of the buffer."""
        head, parts = wire.read_header(_header(parcel.host, self.size))
        tensors = wire.read_payload(parts, parcel.host[self.size.header_bytes :])
        return wire.message_of(head, tensors, upwards=self._upwards)


class StagedCarrier:
    """GPU tensors through gloo, by way of pinned host memory and a stream of its own."""

    def __init__(self, route: Route, size: MessageSize, *, upwards: bool, device: torch.device) -> None:
        self.size = size
        self._route = route
        self._upwards = upwards
        self._device = device
        self._pool = BufferPool(size.nbytes, pinned=device.type == "cuda")
        self._stream = _Stream(device)

    def enter_thread(self) -> None:
        """Work on this carrier's GPU."""
        _use_device(self._device)

    def pack(self, message: Message) -> Parcel:
        """Copy the tensors into device memory, and from there, beside the computation, into a buffer."""
        host = self._pool.take()
        tensors = wire.tensors_of(message)
        parts = wire.parts_of(tensors, number_format=self.size.number_format)
        wire.write_header(message, parts, _header(host, self.size))
        packed = torch.empty(self.size.payload_bytes, dtype=torch.uint8, device=self._device)
        wire.write_payload(tensors, parts, packed)
        event = self._stream.after_current(
            lambda: host[self.size.header_bytes :].copy_(packed, non_blocking=True), uses=packed
        )
        return Parcel(host, packed, event)

    def send(self, parcel: Parcel) -> None:
        """Wait for the copy to the host, then send the buffer."""
        parcel.event.synchronize()
        parcel.device = None
        _wait(dist.isend(parcel.host, self._route.peer, group=self._route.group, tag=self._route.tag))

    def post(self) -> tuple[Parcel, Any]:
        """Post a receive into a pinned buffer."""
        host = self._pool.take()
        return Parcel(host), dist.irecv(host, self._route.peer, group=self._route.group, tag=self._route.tag)

    def complete(self, parcel: Parcel, work: Any) -> None:
        """Wait for the message and for its copy to the device."""
        _wait(work)
        payload = parcel.host[self.size.header_bytes :]
        parcel.device, parcel.event = self._stream.copy_to_device(payload)
        parcel.event.synchronize()  # a link's thread may wait: the buffer is then free

    def unpack(self, parcel: Parcel) -> Message:
        """Return the message on the device."""
        assert parcel.device is not None
        head, parts = wire.read_header(_header(parcel.host, self.size))
        self._stream.let_current_use(parcel.device, parcel.event)
        return wire.message_of(head, wire.read_payload(parts, parcel.device), upwards=self._upwards)


class NcclCarrier:
    """GPU tensors through NCCL, the header through gloo.

    A receive is posted to NCCL when the header has come: a posted one occupies part of the GPU until its
    message is there.
    """

    def __init__(self, route: Route, size: MessageSize, *, upwards: bool, device: torch.device) -> None:
        assert route.header_group is not None
        self.size = size
        self._route = route
        self._headers = route.header_group
        self._upwards = upwards
        self._device = device
        self._pool = BufferPool(size.header_bytes)
        self._stream = _Stream(device)

    def enter_thread(self) -> None:
        """Work on this carrier's GPU."""
        _use_device(self._device)

    def pack(self, message: Message) -> Parcel:
        """Copy the tensors into one piece of device memory."""
        host = self._pool.take()
        tensors = wire.tensors_of(message)
        parts = wire.parts_of(tensors, number_format=self.size.number_format)
        wire.write_header(message, parts, _header(host, self.size))
        packed = torch.empty(self.size.payload_bytes, dtype=torch.uint8, device=self._device)
        wire.write_payload(tensors, parts, packed)
        # An event, not a wait: the stream is given nothing before the message's turn comes.
        return Parcel(host, packed, self._stream.current_event())

    def send(self, parcel: Parcel) -> None:
        """Send the header, at which the other side receives, and the tensors when they are computed."""
        assert parcel.device is not None
        work = dist.isend(parcel.host, self._route.peer, group=self._headers, tag=self._route.tag)
        self._stream.wait_for(parcel.event, uses=parcel.device)
        event = self._stream.run(lambda: self._transfer(dist.isend, parcel.device))
        _wait(work)
        event.synchronize()
        parcel.device = None

    def post(self) -> tuple[Parcel, Any]:
        """Post the receive of a header."""
        host = self._pool.take()
        return Parcel(host), dist.irecv(host, self._route.peer, group=self._headers, tag=self._route.tag)

    def complete(self, parcel: Parcel, work: Any) -> None:
        """Wait for the header, then let the tensors come in the order of the stream."""
        _wait(work)
        parcel.device = self._stream.empty(self.size.payload_bytes)
        parcel.event = self._stream.run(lambda: self._transfer(dist.irecv, parcel.device))

    def unpack(self, parcel: Parcel) -> Message:
        """Return the message on the device; the current stream waits for it, the host does not."""
        assert parcel.device is not None
        head, parts = wire.read_header(_header(parcel.host, self.size))
        self._stream.let_current_use(parcel.device, parcel.event)
        return wire.message_of(head, wire.read_payload(parts, parcel.device), upwards=self._upwards)

    def _transfer(self, operation: Any, tensor: Tensor | None) -> None:
        # `wait` makes the current stream wait, not the host.
        _wait(operation(tensor, self._route.peer, group=self._route.group))


class _Stream:
    """A CUDA stream for copies beside the computation; nothing on a CPU, where all is done at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def after_current(self, work: Any, *, uses: Tensor) -> Any:
        """Do `work` on this stream after what the current stream has been given so far."""
        if self._stream is None:
            work()
            return _Done()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        uses.record_stream(self._stream)
        return self.run(work)

    def current_event(self) -> Any:
        """Return the event of what the current stream has been given so far."""
        if self._stream is None:
            return _Done()
        return torch.cuda.current_stream(self._device).record_event()

    def wait_for(self, event: Any, *, uses: Tensor) -> None:
        """Make this stream wait for an event of another, and the allocator know that it uses `uses`."""
        if self._stream is not None:
            self._stream.wait_event(event)
            uses.record_stream(self._stream)

    def run(self, work: Any) -> Any:
        """Do `work` on this stream; returns the event of its end."""
        if self._stream is None:
            work()
            return _Done()
        with torch.cuda.stream(self._stream):
            work()
            return self._stream.record_event()

    def empty(self, nbytes: int) -> Tensor:
        """Return device memory that belongs to this stream."""
        if self._stream is None:
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        with torch.cuda.stream(self._stream):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def copy_to_device(self, host: Tensor) -> tuple[Tensor, Any]:
        """Copy host memory to new device memory on this stream."""
        device = self.empty(host.numel())
        return device, self.run(lambda: device.copy_(host, non_blocking=True))

    def let_current_use(self, tensor: Tensor, event: Any) -> None:
        """Make the current stream wait for `event`, and the allocator know that it uses `tensor`."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(event)
            tensor.record_stream(current)


class _Done:
    """The event of something that is done already."""

    def synchronize(self) -> None:
        """Return at once."""


def _use_device(device: torch.device) -> None:
    """The current GPU is each thread's own: else a new thread would open GPU 0."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _header(host: Tensor, size: MessageSize) -> Tensor:
    return host[: size.header_bytes].view(torch.int64)


def _wait(work: Any) -> None:
    assert work is not None, "this process is not in the group"
    work.wait()
