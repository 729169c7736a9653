"""What a message costs on the device at hand: its copy into a buffer, and its way to the neighbour.

The copy (`pack`) and the reading of the header (`unpack`) are done by the stages themselves and add to their
operations; the way is gloo's, over the loopback interface, and overlaps with whatever the stages do. Both are
measured with the engine's carrier and real messages, small and large, in under half a second.

Between GPUs nothing is measured here: that takes two of them. Give their links as a --device-spec.
"""

import logging
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from petractl.engine import wire
from petractl.engine.carriers import HostCarrier, MessageSize, Route
from petractl.engine.messages import Activation
from petractl.planning.times import Link

_LOGGER = logging.getLogger(__name__)
_SMALL, _LARGE = 16, 2**21  # float32 values
_REPEATS = 9
_TIMEOUT = timedelta(seconds=10)
_FREE = Link()


@dataclass(frozen=True, slots=True)
class MessageCost:
    """What a message takes of its sender and its receiver, and its way between them; nothing if unknown."""

    pack_s: float = 0.0
    """Of the sender, whatever the size."""
    unpack_s: float = 0.0
    """Of the receiver."""
    byte_s: float = 0.0
    """Of the sender, for each byte."""
    link: Link = _FREE

    def sending_s(self, message_bytes: int) -> float:
        """Return the sender's seconds."""
        return self.pack_s + self.byte_s * message_bytes


FREE_MESSAGES = MessageCost()


@cache
def measure_messages(device: torch.device) -> MessageCost:
    """Return what messages cost between two processes of this machine; on a CPU, else nothing."""
    if device.type != "cpu":
        return FREE_MESSAGES
    small, large = 4 * _SMALL, 4 * _LARGE
    pack_small_s, unpack_s = _handling_s(_SMALL)
    pack_large_s, _ = _handling_s(_LARGE)
    byte_s = max(0.0, pack_large_s - pack_small_s) / (large - small)
    return MessageCost(pack_small_s, unpack_s, byte_s, _loopback(small, large))


def _handling_s(values: int) -> tuple[float, float]:
    """Return the seconds of packing and of unpacking a message of so many values."""
    message = Activation(0, (torch.zeros(1, values),), torch.zeros(1, dtype=torch.int64))
    payload = wire.payload_bytes([((1, values), torch.float32), ((1,), torch.int64)], number_format="float32")
    size = MessageSize(8 * wire.header_words(2), payload)
    # Neither copying nor reading asks for the way.
    carrier = HostCarrier(Route(0, None), size, upwards=True)  # type: ignore[arg-type]
    pack = _median_s(lambda: carrier.pack(message))
    parcel = carrier.pack(message)
    return pack, _median_s(lambda: carrier.unpack(parcel))


def _loopback(small: int, large: int) -> Link:
    """Return gloo's way between two threads of this process: as between processes, through a socket."""
    try:
        store = torch._C._distributed_c10d.HashStore()
        with ThreadPoolExecutor(2) as threads:
            ends = threads.map(lambda rank: dist.ProcessGroupGloo(store, rank, 2, _TIMEOUT), range(2))
            sender, receiver = ends
        small_s, large_s = (_way_s(sender, receiver, nbytes) for nbytes in (small, large))
    except (RuntimeError, AttributeError) as error:
        _LOGGER.warning("the way of a message is not known and counts nothing: %s", error)
        return _FREE
    return Link(small_s, (large - small) / max(1e-9, large_s - small_s))


def _way_s(sender: Any, receiver: Any, nbytes: int) -> float:
    out, into = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)

    def send() -> Tensor:
        arrival = receiver.recv([into], 0, 0)
        sender.send([out], 1, 0).wait()
        arrival.wait()
        return into

    return _median_s(send)


def _median_s(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPEATS + 1):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])
