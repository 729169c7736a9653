"""When a run is saved: every so many updates, every so long, and when it is told to stop.

The process where images enter decides, as each microbatch comes in (`engine.cut`). What depends on the update
alone every replica decides for itself, with the same result. On what depends on a signal, a file or a clock
(the first replica's) all agree with each update, and act on it after that. What found no place near the end
of an epoch is saved there. Times are those of a clock that cannot be set.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from petractl.engine.cut import SAVE, STOP
from petractl.recipe.interval import Interval

LOOK_EVERY_S = 0.5
_STOP_KEY = "stop"


class Board(Protocol):
    """Where processes leave short texts for each other; `World`, or `Alone`."""

    def tell(self, key: str, value: str) -> None:
        """Leave a text."""
        ...

    def ask(self, key: str) -> str | None:
        """Return what was left last, None if nothing was."""
        ...

    def agree(self, number: int) -> Callable[[], int]:
        """Begin to find the greatest number of the replicas; what is returned waits for it."""
        ...


class StopRequests:
    """Whether the run is to stop: by a signal here, by a notice file here, or by what another process told.

    `signalled` gives the name of a signal, "" while none has come. A notice that is there at the start is an
    old one, of another machine: only its coming, or a change, counts. Files and the board are looked at twice
    a second at most.
    """

    def __init__(
        self,
        *,
        signalled: Callable[[], str],
        board: Board,
        notice: Path | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._signalled = signalled
        self._board = board
        self._notice = notice
        self._notice_at_start = _signature(notice)
        self._clock = clock
        self._looked_at = float("-inf")
        self._is_told = False
        self.cause = ""
        """What asks for the stop, in words; "" while nothing does."""
        self.is_own = False
        """It was a signal or a notice here, and not another process that told of its own."""

    def look(self) -> bool:
        """Return whether the run is to stop; who learns of it tells the others."""
        if not self.cause:
            self.cause = self._cause()
        if self.cause and not self._is_told:
            self._is_told = True
            self._board.tell(_STOP_KEY, self.cause)
        return bool(self.cause)

    def look_again(self) -> str:
        """Return what asks for the stop, in words, however short a time ago the last look was."""
        self._looked_at = float("-inf")
        self.look()
        return self.cause

    def _cause(self) -> str:
        self.is_own = True
        signalled = self._signalled()
        if signalled:
            return signalled
        now = self._clock()
        if now - self._looked_at < LOOK_EVERY_S:
            return ""
        self._looked_at = now
        if _signature(self._notice) not in (None, self._notice_at_start):
            return f"the notice {self._notice}"
        self.is_own = False
        return self._board.ask(_STOP_KEY) or ""


def _signature(path: Path | None) -> tuple[int, int] | None:
    """Return what tells a file from another one in its place; None for no file."""
    try:
        found = path.stat() if path is not None else None
    except (OSError, ValueError):
        return None
    return None if found is None else (found.st_ino, found.st_mtime_ns)


class CutPolicy:
    """Decides on cuts where images enter; see the module's docstring.

    `rows` (microbatches of an epoch) and `accumulation` are the run's, `ahead` the first stage's lookahead.
    Cuts lie on updates, but for a stop, which waits for none.
    """

    def __init__(
        self,
        interval: Interval,
        *,
        rows: int,
        accumulation: int,
        ahead: int,
        replica: int,
        num_replicas: int,
        stops: StopRequests,
        board: Board,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interval = interval
        self._rows = rows
        self._k = accumulation
        self._ahead = ahead
        self._replica = replica
        self._num_replicas = num_replicas
        self._stops = stops
        self._board = board
        self._clock = clock
        self._epoch = 0
        self._saved_at = clock()
        self._agreed = 0
        self._agreement: Callable[[], int] = int

    def begin(self, epoch: int) -> None:
        """Hear that an epoch begins, counted from 0."""
        self._epoch = epoch
        self._agreed = 0

    def decide(self, microbatch: int) -> int:
        """Return the flags of a cut after this microbatch of the epoch, 0 for none."""
        if self._is_closed(microbatch):
            return 0
        closes = self._closes_group(microbatch)
        flags = self._due_by_updates(microbatch) if closes else 0
        if self._num_replicas == 1:
            flags |= self._wanted(closes=closes)
        else:
            flags |= self._agreed
            self._agreed = 0
        if flags:
            self._saved_at = self._clock()
        return flags

    def is_due(self) -> bool:
        """Tell whether a checkpoint is due at the end of an epoch: one that found no place within it.

        By updates every process knows it; by a clock the first one does.
        """
        last = range(max(0, self._rows - self._ahead - 2 * self._k), self._rows)
        is_due = (
            any(self._is_closed(m) and self._closes_group(m) and self._due_by_updates(m) for m in last)
            or self._is_due_by_clock()
        )
        if is_due:
            self._saved_at = self._clock()
        return is_due

    def before_update(self, microbatch: int) -> None:
        """Begin to agree with the other replicas on what is wanted, before the update that all wait for."""
        if self._num_replicas > 1:
            self._agreement = self._board.agree(self._wanted(closes=self._replica == 0))

    def after_update(self, microbatch: int) -> None:
        """Find out what they have agreed on."""
        if self._num_replicas > 1:
            self._agreed |= self._agreement()

    def _is_closed(self, microbatch: int) -> bool:
        """Tell whether no cut may be made: the last group is in flight, in which replicas differ."""
        in_flight_end = ((microbatch + self._ahead) // self._k + 1) * self._k
        return self._num_replicas > 1 and in_flight_end >= self._rows

    def _closes_group(self, microbatch: int) -> bool:
        return (microbatch + 1) % self._k == 0 or microbatch + 1 == self._rows

    def _due_by_updates(self, microbatch: int) -> int:
        every = self._interval.updates
        if not every:
            return 0
        of_epoch = -(-self._rows // self._k)
        made = self._epoch * of_epoch + microbatch // self._k + 1
        return SAVE if made % every == 0 else 0

    def _wanted(self, *, closes: bool) -> int:
        """Return what signals, files and the clock ask for; a stop does not wait for an update."""
        if self._stops.look():
            return SAVE | STOP
        return SAVE if closes and self._is_due_by_clock() else 0

    def _is_due_by_clock(self) -> bool:
        seconds = self._interval.seconds
        return seconds > 0 and self._clock() - self._saved_at >= seconds
