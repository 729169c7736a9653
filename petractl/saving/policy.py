"""When a run is saved: every so many updates, every so long, and when it is told to stop.

The process where images enter decides, as each microbatch comes in (`engine.cut`). What depends on the update
alone every replica decides for itself, with the same result. What depends on a clock, a signal or a file only
the first process knows: it tells the other replicas through the store, before an update that all of them
wait for, and all act on it after that update. Times are those of a clock that cannot be set.
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

    def look(self) -> bool:
        """Return whether the run is to stop; who learns of it tells the others."""
        if not self.cause:
            self.cause = self._cause()
        if self.cause and not self._is_told:
            self._is_told = True
            self._board.tell(_STOP_KEY, self.cause)
        return bool(self.cause)

    def _cause(self) -> str:
        signalled = self._signalled()
        if signalled:
            return signalled
        now = self._clock()
        if now - self._looked_at < LOOK_EVERY_S:
            return ""
        self._looked_at = now
        if _signature(self._notice) not in (None, self._notice_at_start):
            return f"the notice {self._notice}"
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
        self._told = False

    def begin(self, epoch: int) -> None:
        """Hear that an epoch begins, counted from 0."""
        self._epoch = epoch
        self._agreed = 0
        self._told = False

    def decide(self, microbatch: int) -> int:
        """Return the flags of a cut after this microbatch of the epoch, 0 for none."""
        in_flight_end = ((microbatch + self._ahead) // self._k + 1) * self._k
        if self._num_replicas > 1 and in_flight_end >= self._rows:
            # Replicas may have different microbatches in an epoch's last group: none may be in flight.
            return 0
        closes = (microbatch + 1) % self._k == 0 or microbatch + 1 == self._rows
        flags = self._due_by_updates(microbatch) if closes else 0
        if self._num_replicas == 1:
            flags |= self._wanted(closes=closes)
        else:
            flags |= self._agreed
            self._agreed = 0
        if flags:
            self._saved_at = self._clock()
        return flags

    def before_update(self, microbatch: int) -> None:
        """Tell the other replicas what is wanted, before the update that all wait for."""
        if self._num_replicas > 1 and self._replica == 0 and not self._told:
            wanted = self._wanted(closes=True)
            if wanted:
                self._told = bool(wanted & STOP)
                self._board.tell(self._key(microbatch), str(wanted))

    def after_update(self, microbatch: int) -> None:
        """Find out what the first replica has told before this update."""
        if self._num_replicas > 1:
            told = self._board.ask(self._key(microbatch))
            self._agreed |= int(told) if told else 0

    def _key(self, microbatch: int) -> str:
        return f"cut/{self._epoch}/{microbatch}"

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
        is_due = self._interval.seconds and self._clock() - self._saved_at >= self._interval.seconds
        return SAVE if is_due and closes else 0
