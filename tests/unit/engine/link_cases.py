"""What two processes do in the tests of links: rank 0 is stage 0, rank 1 is stage 1, with gloo in between.

A case is a function of (rank, line) that returns what it found; both ranks run every case, in one launch.
"""

import gc
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from petractl.engine import wire
from petractl.engine.carriers import Carrier, HostCarrier, MessageSize, NcclCarrier, Route, StagedCarrier
from petractl.engine.links import POSTED_AHEAD, Inbox, Outbox, Place
from petractl.engine.messages import Activation, Gradient
from petractl.errors import RunError

PLACES = (Place("stage 0", 0), Place("stage 1", 1))
ROWS = 8
WIDTH = 6
PATIENCE_S = 30.0
"""For what must come; the tests of what does not come have limits of their own."""

Found = dict[str, Any]


class Line:
    """The way between the two: makes links, each pair of them with a tag of its own."""

    def __init__(self, rank: int, group: dist.ProcessGroup) -> None:
        self.rank = rank
        self.group = group
        self.payloads: dist.ProcessGroup = dist.new_group([0, 1])
        self._tag = 0

    def carrier(self, *, upwards: bool = True, number_format: str = "float32", kind: str = "host") -> Carrier:
        """Return the next carrier, for up to two tensors a row of WIDTH and the labels."""
        self._tag += 1
        route = Route(1 - self.rank, self.group, self._tag)
        shapes = [((ROWS, WIDTH), torch.float64), ((ROWS, WIDTH), torch.float64), ((ROWS,), torch.int64)]
        # Without rounding in the sum: a format may only make a message smaller.
        payload = wire.payload_bytes(shapes, number_format="float32")
        size = MessageSize(8 * wire.header_words(4), payload, number_format)
        if kind == "staged":
            return StagedCarrier(route, size, upwards=upwards, device=torch.device("cpu"))
        if kind == "nccl":  # its twin on the CPU: another gloo group in NCCL's place
            route = Route(1 - self.rank, self.payloads, header_group=self.group, tag=self._tag)
            return NcclCarrier(route, size, upwards=upwards, device=torch.device("cpu"))
        return HostCarrier(route, size, upwards=upwards)

    def outbox(self, carrier: Carrier, *, limit: int = 0) -> Outbox[Any]:
        """Return a sender to the other."""
        return Outbox(carrier, owner=PLACES[self.rank], peer=PLACES[1 - self.rank], limit=limit)

    def inbox(self, carrier: Carrier) -> Inbox[Any]:
        """Return a receiver from the other."""
        return Inbox(carrier, owner=PLACES[self.rank], peer=PLACES[1 - self.rank])

    def barrier(self) -> None:
        """Wait for the other."""
        dist.barrier(self.group)


def activation(i: int, *, rows: int = ROWS) -> Activation:
    """Return the message of a microbatch, the same on both sides."""
    g = torch.Generator().manual_seed(i)
    return Activation(i, (torch.randn(rows, WIDTH, generator=g),), torch.randint(0, 9, (rows,), generator=g))


def gradient(i: int, *, with_streams: bool) -> Gradient:
    """Return a message downwards."""
    g = torch.Generator().manual_seed(i)
    streams = (torch.randn(ROWS, WIDTH, generator=g),) if with_streams else None
    return Gradient(i, streams, (torch.randn(ROWS, WIDTH, generator=g, dtype=torch.float64),))


def strided(i: int) -> Activation:
    """Return a message with another layout of its streams for every i."""
    g = torch.Generator().manual_seed(i)
    x = torch.randn(2, 2, 3, 4, generator=g)
    whole = torch.randn(4, 6, generator=g)
    streams = [
        (x.to(memory_format=torch.channels_last),),
        (x.permute(3, 0, 2, 1), whole.t()),
        tuple(whole.chunk(2, dim=1)),
        (torch.randn(1, 5, generator=g).expand(4, 5), whole[::2]),
        (torch.zeros(0, 3), whole[1:, 2]),
    ]
    return Activation(i, streams[i], torch.arange(3))


LAYOUTS = 5
KINDS = ("host", "staged", "nccl")


def same(found: wire.Message, expected: wire.Message) -> bool:
    """Tell whether two messages have the same bits, dtypes and strides."""
    pairs = list(zip(wire.tensors_of(found), wire.tensors_of(expected), strict=True))
    return (
        type(found) is type(expected)
        and found.microbatch == expected.microbatch
        and (not isinstance(found, Gradient) or (found.streams is None) == (expected.streams is None))
        and all(torch.equal(a, b) and a.dtype is b.dtype and a.stride() == b.stride() for a, b in pairs)
    )


def transfer(line: Line, carrier: Carrier, messages: list[Any]) -> list[Any]:
    """Send messages from stage 0 to stage 1; return what arrives."""
    if line.rank == 0:
        outbox = line.outbox(carrier)
        for message in messages:
            outbox.send(message)
        outbox.flush(timeout_s=PATIENCE_S)
        outbox.close()
        return []
    inbox = line.inbox(carrier)
    inbox.expect(len(messages))
    found = [inbox.receive(m.microbatch, operation="F", timeout_s=PATIENCE_S) for m in messages]
    inbox.close()
    return found


def messages_arrive_as_sent(line: Line) -> Found:
    """Send ragged, strided and downward messages, by every carrier."""
    found = {}
    for kind in KINDS:
        ragged = [activation(i, rows=rows) for i, rows in enumerate((ROWS, 5, 1, ROWS))]
        layouts = [strided(i) for i in range(LAYOUTS)]
        downwards = [gradient(i, with_streams=i % 2 == 0) for i in range(4)]
        for name, messages in (("ragged", ragged), ("layouts", layouts), ("downwards", downwards)):
            carrier = line.carrier(upwards=name != "downwards", kind=kind)
            arrived = transfer(line, carrier, messages)
            pairs = zip(arrived, messages, strict=False)
            found[f"{name}, {kind}"] = [same(a, b) for a, b in pairs]
    return found


def messages_are_rounded(line: Line) -> Found:
    """Send in smaller numbers: what arrives has the bits of `rounded`."""
    found = {}
    for kind in KINDS:
        for number_format in ("bfloat16", "float16", "int8"):
            messages = [activation(0), activation(1, rows=3), strided(0), strided(3)]
            carrier = line.carrier(number_format=number_format, kind=kind)
            arrived = transfer(line, carrier, messages)
            expected = [wire.rounded(m, number_format=number_format) for m in messages]
            found[f"{number_format}, {kind}"] = [same(a, b) for a, b in zip(arrived, expected, strict=False)]
    return found


def links_are_apart(line: Line) -> Found:
    """Two links of one direction, read in another order than they were written."""
    carriers = [line.carrier() for _ in range(2)]
    if line.rank == 0:
        boxes = [line.outbox(carrier) for carrier in carriers]
        for i in range(3):
            boxes[0].send(activation(i))
        for i in range(3):
            boxes[1].send(activation(10 + i))
        for box in boxes:
            box.flush(timeout_s=PATIENCE_S)
            box.close()
        return {}
    inboxes = [line.inbox(carrier) for carrier in carriers]
    arrived = []
    for inbox, start in ((inboxes[1], 10), (inboxes[0], 0)):
        inbox.expect(3)
        arrived += [inbox.receive(start + i, operation="F", timeout_s=PATIENCE_S) for i in range(3)]
        inbox.close()
    return {"same": [same(m, activation(m.microbatch)) for m in arrived]}


def buffers_are_reused(line: Line) -> Found:
    """Many messages, first given up at once, then kept; then kept ones are given up."""
    count, kept_count = 30, 6
    carrier = line.carrier()
    if line.rank == 0:
        outbox = line.outbox(carrier)
        for i in range(count + kept_count + count):
            outbox.send(activation(i))
            line.barrier()
        outbox.close()
        return {"allocated": allocated(carrier)}
    inbox = line.inbox(carrier)
    inbox.expect(count + kept_count + count)

    def receive(i: int) -> Activation:
        message: Activation = inbox.receive(i, operation="F", timeout_s=PATIENCE_S)
        line.barrier()  # no message lies in the queue
        return message

    for i in range(count):
        receive(i)
    unkept = allocated(carrier)
    # Of some only a view of a view, of others only the labels: each holds its buffer.
    views: list[Tensor] = []
    for i in range(count, count + kept_count):
        message = receive(i)
        views.append(message.streams[0][1:, ::2].t() if i % 2 else message.labels[2:])
    del message
    intact_after = []
    for i in range(count + kept_count, count + kept_count + count):
        receive(i)
    for n, view in enumerate(views):
        expected = activation(count + n)
        original = expected.streams[0][1:, ::2].t() if (count + n) % 2 else expected.labels[2:]
        intact_after.append(torch.equal(view, original))
    kept = allocated(carrier)
    views.clear()
    gc.collect()
    inbox.close()
    return {"unkept": unkept, "kept": kept, "intact": intact_after, "kept_count": kept_count}


def allocated(carrier: Carrier) -> int:
    """Return the number of buffers that a carrier has made."""
    assert isinstance(carrier, HostCarrier)
    return carrier._pool.allocated


def sends_do_not_wait(line: Line) -> Found:
    """Send to somebody who does not receive yet; and with a limit."""
    free, limited = line.carrier(), line.carrier()
    count, limit = 20, 3
    if line.rank == 0:
        outbox, bounded = line.outbox(free), line.outbox(limited, limit=limit)
        started = time.perf_counter()
        for i in range(count):
            outbox.send(activation(i))
        seconds = time.perf_counter() - started
        for i in range(limit):
            bounded.send(activation(i), timeout_s=PATIENCE_S)
        found = {"seconds": seconds, "bytes": outbox.bytes_sent, "nbytes": free.size.nbytes}
        found["blocked"] = outcome(lambda: bounded.send(activation(limit), timeout_s=0.3))
        found["flush"] = outcome(lambda: bounded.flush(timeout_s=0.3))
        line.barrier()
        bounded.send(activation(limit), timeout_s=PATIENCE_S)  # the one that was refused
        bounded.flush(timeout_s=PATIENCE_S)
        outbox.flush(timeout_s=PATIENCE_S)
        for box in (outbox, bounded):
            box.close()
        return {**found, "sent": bounded.sent}
    line.barrier()
    inbox, other = line.inbox(free), line.inbox(limited)
    inbox.expect(count)
    other.expect(limit + 1)
    arrived = [inbox.receive(i, operation="F", timeout_s=PATIENCE_S) for i in range(count)]
    arrived += [other.receive(i, operation="F", timeout_s=PATIENCE_S) for i in range(limit + 1)]
    for box in (inbox, other):
        box.close()
    return {"same": [same(m, activation(m.microbatch)) for m in arrived]}


def waits_are_bounded(line: Line) -> Found:
    """Wait for a message that comes too late; then take it all the same, and refuse the wrong one."""
    carrier = line.carrier()
    if line.rank == 0:
        outbox = line.outbox(carrier)
        line.barrier()
        time.sleep(0.2)
        for i in (7, 8):
            outbox.send(activation(i))
        outbox.flush(timeout_s=PATIENCE_S)
        outbox.close()
        return {}
    inbox = line.inbox(carrier)
    inbox.expect(2)
    started = time.perf_counter()
    stalled = outcome(lambda: inbox.receive(7, operation="F 7", timeout_s=0.3))
    seconds = time.perf_counter() - started
    line.barrier()
    before = inbox.waited_s
    late = inbox.receive(7, operation="F 7", timeout_s=PATIENCE_S)
    waited = inbox.waited_s - before
    wrong = outcome(lambda: inbox.receive(9, operation="F 9", timeout_s=PATIENCE_S))
    inbox.close()
    return {
        "stalled": stalled,
        "seconds": seconds,
        "late": same(late, activation(7)),
        "waited": waited,
        "wrong": wrong,
    }


def epochs_follow_each_other(line: Line) -> Found:
    """Expect messages epoch by epoch, an empty one too, on one link; then its thread ends."""
    counts = (3, 0, POSTED_AHEAD, 1)
    carrier = line.carrier()
    if line.rank == 0:
        outbox = line.outbox(carrier)
        for count in counts:
            for i in range(count):
                outbox.send(activation(i))
            outbox.flush(timeout_s=PATIENCE_S)
            line.barrier()
        outbox.close()
        return {"ended": ended(outbox._thread)}
    inbox = line.inbox(carrier)
    arrived = []
    for count in counts:
        inbox.expect(count)
        arrived += [inbox.receive(i, operation="F", timeout_s=PATIENCE_S) for i in range(count)]
        line.barrier()
    inbox.close()
    return {"same": [same(m, activation(m.microbatch)) for m in arrived], "ended": ended(inbox._thread)}


def ended(thread: threading.Thread) -> bool:
    """Tell whether a thread ends."""
    thread.join(PATIENCE_S)
    return not thread.is_alive()


def outcome(call: Callable[[], Any]) -> tuple[str, str, int | None]:
    """Return how a call fails: the error's class, what it says, and the rank it waits for."""
    try:
        call()
    except RunError as error:
        return type(error).__name__, error.what, getattr(error, "waiting_for", None)
    return "", "", None


def the_other_dies(line: Line) -> Found:
    """Stage 1 is killed while stage 0 waits for a message, and has some to send."""
    up, down = line.carrier(), line.carrier(upwards=False)
    if line.rank == 1:
        inbox = line.inbox(up)
        inbox.expect(1)
        inbox.receive(0, operation="F 0", timeout_s=PATIENCE_S)
        line.barrier()
        os._exit(0)
    outbox, inbox = line.outbox(up), line.inbox(down)
    outbox.send(activation(0))
    inbox.expect(1)
    line.barrier()
    started = time.perf_counter()
    found = {"receive": outcome(lambda: inbox.receive(0, operation="B 0", timeout_s=PATIENCE_S))}
    outbox.send(activation(1))
    found["flush"] = outcome(lambda: outbox.flush(timeout_s=PATIENCE_S))
    found["send"] = outcome(lambda: outbox.send(activation(2)))
    return {**found, "seconds": time.perf_counter() - started}


CASES = (
    messages_arrive_as_sent,
    messages_are_rounded,
    links_are_apart,
    buffers_are_reused,
    sends_do_not_wait,
    waits_are_bounded,
    epochs_follow_each_other,
)


def run_cases(rank: int, folder: str) -> None:
    """Run every case; the last one ends stage 1."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    group = dist.group.WORLD
    assert group is not None
    line = Line(rank, group)
    found = {}
    for case in CASES:
        found[case.__name__] = case(line)
        line.barrier()
    path = Path(folder) / f"{rank}.pt"
    torch.save(found, path)
    found["the_other_dies"] = the_other_dies(line)
    torch.save(found, path)
    os._exit(0)  # a group that has lost a member says no goodbyes
