"""Links: one direction of the way between a stage and a neighbour, each with a thread of its own.

The training thread hands messages over and takes them out of a queue; the thread behind it waits for the
network. So a send never blocks training, receives are posted ahead, a wait can be timed, bounded and
interrupted (a process blocked inside gloo answers no signal), and packing, sending and computing overlap.

A receiver is told how many messages will come (`expect`), since a receive posted for one that never comes
would outlive the epoch.
"""

import queue
import re
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from petractl.engine.carriers import Carrier, Parcel
from petractl.engine.messages import Activation, Gradient
from petractl.errors import PeerLost, RunError, Stalled
from petractl.one_thread import compute_alone

M = TypeVar("M", Activation, Gradient)

POSTED_AHEAD = 2
_POLL_S = 1.0
_STALL_HINT = "F and B: forward and backward of a microbatch; engine.stall_timeout is the limit"


@dataclass(frozen=True, slots=True)
class Place:
    """A process as messages for people name it."""

    title: str
    rank: int

    def __str__(self) -> str:
        return f"{self.title} (rank {self.rank})"


class Outbox(Generic[M]):
    """Sends messages to one neighbour in the order in which it gets them; `send` never waits.

    `limit` is the number of messages after which `send` waits after all: for evaluation, in which nothing
    comes back that would hold a fast stage.
    """

    def __init__(self, carrier: Carrier, *, owner: Place, peer: Place, limit: int = 0) -> None:
        self._carrier = carrier
        self._owner = owner
        self._peer = peer
        self._limit = limit
        self.sent = 0
        self._done = 0
        self._changed = threading.Condition()
        self._parcels: queue.SimpleQueue[Parcel | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = _start(self._run, f"send to {peer}")

    @property
    def bytes_sent(self) -> int:
        """The bytes handed over so far."""
        return self.sent * self._carrier.size.nbytes

    def send(self, message: M, *, timeout_s: float = 0.0) -> None:
        """Hand a message over; it may not be changed, but need not be kept.

        Raises:
            PeerLost: the neighbour is gone.
        """
        if self._limit:
            self._wait_until(lambda: self.sent - self._done < self._limit, timeout_s)
        self._raise_error()
        self._parcels.put(self._carrier.pack(message))
        self.sent += 1

    def flush(self, *, timeout_s: float = 0.0) -> None:
        """Wait until every message is with the neighbour."""
        self._wait_until(lambda: self._done == self.sent, timeout_s)

    def close(self) -> None:
        """End the thread, after what it has to send."""
        self._parcels.put(None)

    @property
    def lost(self) -> int | None:
        """The neighbour's rank where the connection to it has broken."""
        return None if self._error is None else self._peer.rank

    def _run(self) -> None:
        self._carrier.enter_thread()
        while (parcel := self._parcels.get()) is not None:
            try:
                self._carrier.send(parcel)
            except BaseException as error:
                self._error = error
                with self._changed:
                    self._changed.notify_all()
                return
            parcel = None  # the buffer goes back before the next message is waited for
            with self._changed:
                self._done += 1
                self._changed.notify_all()

    def _wait_until(self, condition: Any, timeout_s: float) -> None:
        started = time.monotonic()
        with self._changed:
            while not condition():
                self._raise_error()
                self._changed.wait(_POLL_S)
                if timeout_s and not condition() and time.monotonic() - started > timeout_s:
                    raise Stalled(
                        f"{self._owner} has waited {timeout_s:g} s for {self._peer} to take a message",
                        hint=_STALL_HINT,
                        waiting_for=self._peer.rank,
                    )

    def _raise_error(self) -> None:
        if self._error is not None:
            raise _lost(self._owner, self._peer, self._error)


class Inbox(Generic[M]):
    """Receives messages from one neighbour, posted ahead."""

    def __init__(self, carrier: Carrier, *, owner: Place, peer: Place, ahead: int = POSTED_AHEAD) -> None:
        self._carrier = carrier
        self._owner = owner
        self._peer = peer
        self._ahead = ahead
        self.waited_s = 0.0
        self._is_broken = False
        self._expected: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._arrived: queue.SimpleQueue[Parcel | BaseException] = queue.SimpleQueue()
        self._thread = _start(self._run, f"receive from {peer}")

    def expect(self, count: int) -> None:
        """Begin to receive `count` more messages."""
        if count:
            self._expected.put(count)

    def receive(self, microbatch: int, *, operation: str, timeout_s: float = 0.0) -> M:
        """Take the next message, which must be of this microbatch; `operation` is what waits for it ("F 3").

        Raises:
            Stalled: it has not come within `timeout_s` seconds (0: no limit).
            PeerLost: the neighbour is gone.
        """
        started = time.perf_counter()
        parcel = self._take(started, operation, timeout_s)
        self.waited_s += time.perf_counter() - started
        if isinstance(parcel, BaseException):
            raise _lost(self._owner, self._peer, parcel)
        message = cast(M, self._carrier.unpack(parcel))
        if message.microbatch != microbatch:
            raise RunError(f"{self._owner} expected {operation}, got microbatch {message.microbatch}")
        return message

    @property
    def lost(self) -> int | None:
        """The neighbour's rank where the connection to it has broken."""
        return self._peer.rank if self._is_broken else None

    def close(self) -> None:
        """End the thread when nothing more is expected."""
        self._expected.put(-1)

    def _take(self, started: float, operation: str, timeout_s: float) -> Parcel | BaseException:
        while True:
            left = timeout_s - (time.perf_counter() - started) if timeout_s else _POLL_S
            try:
                return self._arrived.get(timeout=max(0.0, min(left, _POLL_S)))
            except queue.Empty:
                if timeout_s and left <= _POLL_S:
                    raise Stalled(
                        f"{self._owner} has waited {timeout_s:g} s for {operation} from {self._peer}",
                        hint=_STALL_HINT,
                        waiting_for=self._peer.rank,
                    ) from None

    def _run(self) -> None:
        posted: deque[tuple[Parcel, Any]] = deque()
        try:
            self._carrier.enter_thread()
            while (count := self._expected.get()) >= 0:
                while count or posted:
                    while count and len(posted) < self._ahead:
                        posted.append(self._carrier.post())
                        count -= 1
                    parcel, work = posted.popleft()
                    self._carrier.complete(parcel, work)
                    self._arrived.put(parcel)
                    del parcel, work
        except BaseException as error:
            self._is_broken = True
            self._arrived.put(error)


def _lost(owner: Place, peer: Place, error: BaseException) -> RunError:
    if isinstance(error, RunError):
        return error
    return PeerLost(f"{owner} lost the connection to {peer} ({reason_of(error)})")


def reason_of(error: BaseException) -> str:
    """Return what a backend says, without the place in its source."""
    text = str(error).strip().splitlines()
    return re.sub(r"^\[[^]]*\]\s*", "", text[0]) if text else type(error).__name__


def _start(target: Any, name: str) -> threading.Thread:
    # A daemon: a thread that waits for a dead neighbour must not keep the process.
    def run() -> None:
        compute_alone()
        target()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
