"""A thread that writes while training goes on.

One job after the other, in order; who hands one over while another is under way waits for that one, so that
no more than one copy of a run lies in memory, and a slow disk slows training instead of filling it. What went
wrong is raised in the training thread, at its next call.
"""

import threading
from collections.abc import Callable

from petractl.one_thread import compute_alone

_POLL_S = 0.2


class BackgroundWriter:
    """Runs jobs in a thread of its own."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._job: Callable[[], None] | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Have a job done; waits until the one before is.

        Raises:
            BaseException: what the one before has raised.
        """
        self.wait()
        with self._changed:
            self._job = job
            if self._thread is None:
                # A daemon: a process that fails does not wait for what another will never write.
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    @property
    def is_busy(self) -> bool:
        """Tell whether a job is under way."""
        return self._job is not None

    def check(self) -> None:
        """Raise what a job has raised; does not wait."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait until nothing is under way; raise what a job has raised.

        In small steps: a signal is answered in between.
        """
        with self._changed:
            while self._job is not None:
                self._changed.wait(_POLL_S)
        self.check()

    def _run(self) -> None:
        compute_alone()
        while True:
            with self._changed:
                while self._job is None:
                    self._changed.wait()
                job = self._job
            try:
                job()
            except BaseException as error:
                self._error = error
            del job
            with self._changed:
                self._job = None
                self._changed.notify_all()
