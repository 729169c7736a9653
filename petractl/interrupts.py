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
    """The state of interruption of one command; `finishing` is set when everything is saved.

    `announce` is false in a process that is one of several: the first one speaks for all.
    """

    def __init__(self, *, announce: bool = True) -> None:
        self._announce = announce
        self.finishing = False
        self.requested = False
        """A signal has come that was not put off."""
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
            self._say("all epochs are done and saved, finishing; once more to stop at once")
            return
        self.requested = True
        if not self._answered:
            self._answered = True
            self._say("stopping")
        raise KeyboardInterrupt

    def _say(self, words: str) -> None:
        if self._announce:
            sys.stderr.write(f"{words}\n")


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
