"""Runs the cells of a sweep, a few at a time, each as a `petractl run` or `petractl resume` of its own.

One loop in one thread starts, waits and stops: the kernel ties a child to the thread that started it. The
children have sessions of their own, so that Ctrl-C reaches the sweep alone, which hands it to each of them
once: every run then saves as it does by itself. A second Ctrl-C kills them.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol

from petractl.processes.safe_path import safe_path
from petractl.sweep.cells import Cell, State
from petractl.sweep.tether import EXIT_INTERRUPTED, tethered
from petractl.tracking.masking import mask_credentials

THREADS_VARIABLE = "OMP_NUM_THREADS"
PETRACTL = (sys.executable, "-m", "petractl")

_POLL_S = 0.1
_LONGEST_WAIT_S = 60.0  # for a run that another process is still ending
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Job:
    """A cell to run or to resume: by which recipe, with how many threads, and where its output goes."""

    cell: Cell
    recipe: Path
    log: Path
    threads: int | None = None
    """Threads for each process; None: as the environment has it."""

    @property
    def arguments(self) -> list[str]:
        """What petractl is told to do."""
        if self.cell.state is not State.NEW:
            return ["resume", str(self.cell.folder)]
        sets = [word for override in self.cell.overrides for word in ("--set", override)]
        return ["run", str(self.recipe), "--dir", str(self.cell.folder), *sets]


class Watcher(Protocol):
    """Hears how a sweep goes on; called from the loop, so each call must return soon."""

    def began(self, cell: Cell) -> None:
        """A cell is being run."""

    def ended(self, cell: Cell, failure: str) -> None:
        """A cell's process has ended; `failure` is "" for a run that has finished."""

    def passed(self, running: Sequence[Cell]) -> None:
        """Some time has passed."""

    def stopping(self, running: Sequence[Cell]) -> None:
        """The sweep was told to stop: so were the cells that are running."""


@dataclass(slots=True)
class Outcome:
    """How the cells ended: why some failed, by name, and whether the sweep was stopped before its end."""

    failures: dict[str, str] = field(default_factory=dict)
    is_interrupted: bool = False


@dataclass(slots=True)
class _Child:
    job: Job
    process: subprocess.Popen[bytes]
    log_start: int  # bytes of the log that earlier sessions have written


class Runner:
    """Runs jobs in order, at most `num_parallel` at a time."""

    def __init__(self, jobs: Sequence[Job], *, num_parallel: int, watcher: Watcher) -> None:
        self._waiting = list(jobs)
        self._num_parallel = num_parallel
        self._watcher = watcher
        self._running: list[_Child] = []
        self._outcome = Outcome()
        self._signals = 0
        self._signals_obeyed = 0
        self._held_since_s: dict[str, float] = {}

    def run(self) -> Outcome:
        """Run everything; after a signal, only wait for what is running."""
        with self._signals_counted():
            try:
                while self._running or (self._waiting and not self._signals):
                    self._start_some()
                    time.sleep(_POLL_S)
                    self._obey_signals()
                    self._reap()
                    self._watcher.passed([child.job.cell for child in self._running])
            finally:
                self._stop(signal.SIGTERM)  # nothing is running here unless the loop itself has failed
        self._outcome.is_interrupted = self._signals > 0
        return self._outcome

    def _start_some(self) -> None:
        while not self._signals and self._waiting and len(self._running) < self._num_parallel:
            job = self._next_job()
            if job is None:
                return
            self._waiting.remove(job)
            self._running.append(_start(job))
            self._watcher.began(job.cell)

    def _next_job(self) -> Job | None:
        """Return the first job whose folder is free: a run of a killed sweep may still be saving."""
        now = time.monotonic()
        for job in list(self._waiting):
            if not job.cell.is_held():
                return job
            since = self._held_since_s.setdefault(job.cell.name, now)
            if now - since > _LONGEST_WAIT_S:
                return job  # `resume` says best what is wrong
        return None

    def _reap(self) -> None:
        for child in list(self._running):
            code = child.process.poll()
            if code is None:
                continue
            self._running.remove(child)
            failure = "" if code == 0 else _failure(child, code)
            was_stopped = self._signals and child.job.cell.state is not State.FINISHED
            if failure and not was_stopped:
                self._outcome.failures[child.job.cell.name] = failure
            self._watcher.ended(child.job.cell, "interrupted" if failure and was_stopped else failure)

    def _obey_signals(self) -> None:
        if self._signals == self._signals_obeyed:
            return
        if self._signals_obeyed == 0:
            self._watcher.stopping([child.job.cell for child in self._running])
            self._stop(signal.SIGINT)
        else:
            for child in self._running:
                _signal_session(child.process, signal.SIGKILL)
        self._signals_obeyed = self._signals

    def _stop(self, number: signal.Signals) -> None:
        for child in self._running:
            if child.process.poll() is None:
                child.process.send_signal(number)

    @contextmanager
    def _signals_counted(self) -> Iterator[None]:
        """Count Ctrl-C and SIGTERM within the block; elsewhere than in the main thread they are not ours."""

        def count(number: int, frame: FrameType | None) -> None:
            self._signals += 1

        try:
            before = {number: signal.signal(number, count) for number in _SIGNALS}
        except ValueError:
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _start(job: Job) -> _Child:
    job.cell.clear()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    arguments = job.arguments
    with job.log.open("ab") as log:
        words = mask_credentials(shlex.join(["petractl", *arguments]))
        log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {words}\n".encode())
        log.flush()
        log_start = log.tell()
        process = subprocess.Popen(
            tethered([*PETRACTL, *arguments]),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(job, os.environ),
            start_new_session=True,
        )
        return _Child(job, process, log_start)


def _environment(job: Job, inherited: Mapping[str, str]) -> dict[str, str]:
    own = {} if job.threads is None else {THREADS_VARIABLE: str(job.threads)}
    return {**inherited, **safe_path(), **own}


def _signal_session(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)


def _failure(child: _Child, code: int) -> str:
    """Return why a run has failed: the error it told, else what its journal says, else its last words."""
    if code == EXIT_INTERRUPTED:
        return "was interrupted"
    if code < 0:
        name = signal.Signals(-code).name if -code in list(signal.Signals) else str(-code)
        return f"was killed by {name}" + (" (was there memory enough?)" if code == -signal.SIGKILL else "")
    with child.job.log.open("rb") as log:
        log.seek(child.log_start)
        text = log.read().decode(errors="replace")
    record = child.job.cell.record()
    told = record.failure.strip() if record.state == "failed" and record.failure else ""
    last_words = text.strip().splitlines()[-1:] or [f"ended with exit code {code}"]
    return last_error(text) or told.partition("\n")[0] or last_words[0].strip()


def last_error(text: str) -> str:
    """Return the last error that a command has told, on one line; "" if there is none."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    places = [place for place, line in enumerate(lines) if line.startswith("error:")]
    if not places:
        return ""
    told = lines[places[-1]].removeprefix("error:").strip()
    if re.search(r"\d+ problems? in the recipe$", told) and len(lines) > places[-1] + 1:
        told += f": {lines[places[-1] + 1].strip()}"
    return told
