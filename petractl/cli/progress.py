"""How far a long piece of work is: a bar on a terminal, a line now and then anywhere else; on stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from petractl.data.writing.watching import Watch

LINE_EVERY_S = 10.0


@contextmanager
def shown_progress() -> "Iterator[Watch]":
    """Show what the watch is told, as long as the block lasts."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _Bars(bars)


class _Lines:
    """A line every ten seconds: what is quick says nothing."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._what, self._done, self._total = "", 0, 0
        self._said_s = time.monotonic()

    def begin(self, what: str, total: int) -> None:
        with self._lock:
            self._what, self._done, self._total = what, 0, total
            self._said_s = time.monotonic()

    def advance(self, samples: int) -> None:
        with self._lock:
            self._done += samples
            now = time.monotonic()
            if now - self._said_s >= LINE_EVERY_S:
                self._said_s = now
                sys.stderr.write(f"{self._what}: {self._done} of {self._total} samples\n")


class _Bars:
    """A bar for each piece of work."""

    def __init__(self, progress: "Progress") -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def begin(self, what: str, total: int) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(what, total=total)

    def advance(self, samples: int) -> None:
        if self._task is not None:
            self._progress.advance(self._task, samples)
