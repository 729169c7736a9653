"""Ctrl-C and SIGTERM: both stop a run in the same way, and neither spoils its end.

Either becomes a `KeyboardInterrupt`, from the first import to the last file. Once all epochs are done and
saved there is nothing left to stop: the first signal is then answered in words, and the second obeyed.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """The state of interruption of one command; `finishing` is set when everything is saved."""

    def __init__(self) -> None:
        self.finishing = False
        self._answered = False

    @contextmanager
    def handled(self) -> Iterator["Interrupts"]:
        """Handle both signals within the block; elsewhere than in the main thread they are someone else's."""
        try:
            before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        except ValueError:
            yield self
            return
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.finishing and not self._answered:
            self._answered = True
            sys.stderr.write("all epochs are done and saved, finishing; once more to stop at once\n")
            return
        if not self._answered:
            self._answered = True
            sys.stderr.write("stopping\n")
        raise KeyboardInterrupt


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
