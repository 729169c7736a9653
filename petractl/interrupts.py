"""Ctrl-C, SIGTERM and SIGHUP: all stop a run in the same way, and none spoils its end.

Each becomes a `KeyboardInterrupt`, from the first import to the last file. While the net is trained and
evaluated (`deferred`) the first one is only noted: the run then saves where it is, within a deadline, and
stops; the second one, or the end of the deadline, interrupts. Once all epochs are done and saved there is
nothing left to stop: the first signal is then answered in words, and the second obeyed.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_SAME_S = 1.0
"""Signals this near to each other are one: a terminal and a launcher may both pass it on."""


@contextmanager
def sigterm_obeyed() -> Iterator[None]:
    """Within the block SIGTERM interrupts as Ctrl-C does: from a command's first line, before its imports."""
    before = signal.getsignal(signal.SIGTERM)
    is_ours = before == signal.SIG_DFL and threading.current_thread() is threading.main_thread()
    if is_ours:
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class Interrupts:
    """The state of interruption of one command; `finishing` is set when everything is saved.

    `announce` is false in a process that is one of several: the first one speaks for all.
    """

    def __init__(self, *, announce: bool = True) -> None:
        self._announce = announce
        self.finishing = False
        self.requested = False
        """A signal has come that was not put off."""
        self.cause = ""
        """Its name."""
        self.is_overdue = False
        """The deadline has passed in which the run should have been saved."""
        self.leaving = False
        """The run has stopped and is being saved: one more signal says nothing new.

        It is this process's own, where another one or a file has told of the stop; or it comes from
        torchrun, which sees the first process end.
        """
        self._answered = False
        self._deadline_s: float | None = None
        self._first_at = 0.0

    @contextmanager
    def handled(self) -> Iterator["Interrupts"]:
        """Handle the signals within the block; elsewhere than in the main thread they are someone else's."""
        try:
            numbers = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN or n != signal.SIGHUP]
            before = {number: signal.signal(number, self._handle) for number in numbers}
            before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._end_deadline)
        except ValueError:
            yield self
            return
        try:
            yield self
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self, deadline_s: float) -> Iterator[None]:
        """Within the block only note the first signal; whoever is in it must end within the deadline.

        The deadline goes on after the block.
        """
        before, self._deadline_s = self._deadline_s, deadline_s
        try:
            yield
        finally:
            self._deadline_s = before

    @contextmanager
    def limited(self, deadline_s: float) -> Iterator[None]:
        """Interrupt what is in the block when the deadline has passed; one that runs already stands."""
        if (
            signal.getitimer(signal.ITIMER_REAL)[0] <= 0
            and threading.current_thread() is threading.main_thread()
        ):
            signal.setitimer(signal.ITIMER_REAL, deadline_s)
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.setitimer(signal.ITIMER_REAL, 0)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.finishing and not self._answered:
            self._answered = True
            self._say("all epochs are done and saved, finishing; once more to stop at once")
            return
        now = time.monotonic()
        if self.leaving:
            self.leaving, self.requested, self._first_at = False, True, now
            return
        if self.requested and now - self._first_at < _SAME_S:
            return
        is_first, self.requested = not self.requested, True
        if is_first:
            self._first_at, self.cause = now, signal.Signals(number).name
        if is_first and self._deadline_s is not None:
            self._answered = True
            signal.setitimer(signal.ITIMER_REAL, self._deadline_s)
            self._say(
                f"stopping: saving where the run is, within {self._deadline_s:g} s; once more to stop now"
            )
            return
        if not self._answered:
            self._answered = True
            self._say("stopping")
        raise KeyboardInterrupt

    def _end_deadline(self, number: int, frame: FrameType | None) -> None:
        if not self.finishing:
            self.is_overdue = True
            raise KeyboardInterrupt

    def _say(self, words: str) -> None:
        if self._announce:
            with suppress(OSError, ValueError):  # nobody may be there to read it
                sys.stderr.write(f"{words}\n")


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last one unless it is ignored: nohup
