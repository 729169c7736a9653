"""Messages between stages of one process: a mailbox for each direction of each cut.

A message is handed over, not copied: nothing that a stage sends is changed afterwards.
"""

from collections import deque
from typing import Generic, TypeVar

from petractl.engine.messages import Activation, Gradient

M = TypeVar("M", Activation, Gradient)


class Mailbox(Generic[M]):
    """First in, first out; a receiver names the microbatch that it expects."""

    def __init__(self) -> None:
        self._messages: deque[M] = deque()

    def send(self, message: M) -> None:
        """Leave a message; never blocks."""
        self._messages.append(message)

    def ready(self) -> bool:
        """Tell whether a message waits."""
        return bool(self._messages)

    def receive(self, microbatch: int) -> M:
        """Take the oldest message, which must be of this microbatch."""
        message = self._messages.popleft()
        assert message.microbatch == microbatch, f"expected {microbatch}, got {message.microbatch}"
        return message
