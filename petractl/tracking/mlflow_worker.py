"""The process that sends a run to MLflow: `python -m petractl.tracking.mlflow_worker`.

It reads its settings as one JSON line from stdin, then follows the journal of the run folder about once a
second until stdin says "close" or ends (so a run that is killed still gets its status, if that takes less
than a minute). It tells on stdout, one JSON object a line, that it is getting on, a warning, what it has sent
and that all is done; everything else goes to stderr, without credentials. A server that fails is tried again,
more and more rarely, with whatever has gathered. A run that is restarted at once may still have the process
of the one that was killed: of several, one sends at a time.
"""

import contextlib
import fcntl
import io
import json
import logging
import os
import re
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, Protocol

from petractl.tracking.journal import JournalTail
from petractl.tracking.masking import mask_credentials
from petractl.tracking.mlflow_metrics import final_status, matters, metric_points, record_time_ms
from petractl.tracking.mlflow_run import MlflowRun, TrackingSettings

LOCK_NAME = ".mlflow.lock"
BUSY = "another process is still sending this run"

_ORPHAN_S = 60.0
_POLL_S = 1.0
_LONGEST_PAUSE_S = 60.0
_REASON_CHARACTERS = 300
_REASONS = (
    (r"too many (\d+) error responses", r"it answers with error \1"),
    (r"Connection refused", "nothing listens there (connection refused)"),
    (r"[Tt]imed out|timeout=", "it has not answered in time"),
    (r"Name or service not known|Failed to resolve|name resolution", "there is no host of this name"),
    (r"database or disk is full|No space left on device", "its disk is full"),
)


class Reporter:
    """Tells the run's process how it goes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def tell(self, kind: str, message: str = "") -> None:
        """Write one report; a reader that is gone does not matter."""
        with contextlib.suppress(OSError):
            self._stream.write(json.dumps({"kind": kind, "message": message}).encode() + b"\n")
            self._stream.flush()


class Commands(Protocol):
    """Tells when the run is over."""

    def closing(self, timeout_s: float) -> bool:
        """Wait at most so long; return whether the run is over."""


class StdinCommands:
    """Takes "close", or the end of stdin, as the end of the run."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._closing = False

    def closing(self, timeout_s: float) -> bool:
        """Wait at most so long; return whether the run is over."""
        if not self._closing and select.select([self._descriptor], [], [], timeout_s)[0]:
            data = os.read(self._descriptor, 4096)
            self._closing = not data or b"close" in data
        return self._closing


class Turn:
    """The right to send a run: one process at a time has it, until it ends."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LOCK_NAME
        self._descriptor = -1

    def take(self) -> bool:
        """Return whether it is ours now. Where no file can be made it is: a folder that cannot be written."""
        if self._descriptor >= 0:
            return True
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def give_back(self) -> None:
        """Let another process have it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass(frozen=True, slots=True)
class Sent:
    """What was sent of a run: of all values in its journal those that its store did not have yet."""

    run_id: str
    values: int
    sent: int


def follow(settings: TrackingSettings, commands: Commands, reporter: Reporter) -> bool:
    """Send the journal as it grows, until the run is over; return whether everything was sent."""
    turn = Turn(Path(settings.run_dir))
    try:
        return _follow(settings, commands, reporter, turn)
    finally:
        turn.give_back()


def _follow(settings: TrackingSettings, commands: Commands, reporter: Reporter, turn: Turn) -> bool:
    run = MlflowRun(settings, progress=lambda: reporter.tell("progress"))
    tail = JournalTail(Path(settings.run_dir))
    everything: list[dict[str, object]] = []  # what matters here; the progress within an epoch does not
    sent = 0
    pause_s = 0.0  # nothing to wait for before the first try
    failures = 0  # in a row
    last_reason = ""
    closing = False
    while not closing:
        closing = commands.closing(pause_s)
        everything += [record for record in tail.read() if matters(record)]
        if not turn.take():
            pause_s = _POLL_S
            continue
        try:
            run.send(everything[sent:])
            sent = len(everything)
            pause_s, failures = _POLL_S, 0
            if closing:
                run.finish(final_status(everything), end_ms=_last_ms(everything))
                reporter.tell("sent", json.dumps(asdict(_summary(run, everything))))
                return True
        except Exception as error:
            pause_s = min(_LONGEST_PAUSE_S, max(2.0, 2.0 * pause_s))
            failures += 1
            if failures == 1 and not closing:
                continue  # a connection that was dropped while nothing was sent, for one
            if reason(error) != last_reason:  # a server that is down for days must not fill the log
                last_reason = reason(error)
                traceback.print_exc()
            reporter.tell("warning", reason(error))
            if closing:
                return False
    reporter.tell("warning", BUSY)
    return False


def _last_ms(records: list[dict[str, object]]) -> int | None:
    return record_time_ms(records[-1]) if records else None


def _summary(run: MlflowRun, records: list[dict[str, object]]) -> Sent:
    values = {point for record in records for point in metric_points(record)}
    return Sent(run_id=run.run_id, values=len(values), sent=run.num_sent)


def reason(error: Exception) -> str:
    """Return why MLflow failed, on one line, without credentials; what its client buries is dug out."""
    for pattern, words in _REASONS:
        found = re.search(pattern, str(error))
        if found:
            return found.expand(words)
    text = " ".join(mask_credentials(str(error)).split()) or type(error).__name__
    return text if len(text) <= _REASON_CHARACTERS else text[: _REASON_CHARACTERS - 3] + "..."


class MaskedStream(io.TextIOBase):
    """A text stream that lets no credentials through."""

    def __init__(self, stream: io.TextIOBase) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text with credentials masked."""
        self._stream.write(mask_credentials(text))
        return len(text)

    def flush(self) -> None:
        """Flush what is beneath."""
        self._stream.flush()


def serve(follow: Callable[[TrackingSettings, Commands, Reporter], bool]) -> int:
    """Serve one run, or one sweep; return the exit code: 0 if everything was sent, 1 if not."""
    # What libraries print must not get between the reports: they keep the pipe, stdout becomes stderr.
    reporter = Reporter(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)
    sys.stdout = sys.stderr = MaskedStream(sys.stderr)  # type: ignore[arg-type]
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    with contextlib.suppress(OSError):
        os.nice(10)  # training comes first
    with open(0, "rb", buffering=0, closefd=False) as stdin:  # unbuffered: must not read past the line
        settings = TrackingSettings(**json.loads(stdin.readline()))
    threading.Thread(target=_end_orphaned, args=(os.getppid(),), daemon=True).start()
    start_s = time.monotonic()
    complete = follow(settings, StdinCommands(0), reporter)
    reporter.tell("done" if complete else "incomplete", f"{time.monotonic() - start_s:.1f} s")
    return 0 if complete else 1


def _end_orphaned(parent: int) -> None:
    """End this process a while after its parent: a server that hangs must not keep it for ever."""
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    time.sleep(_ORPHAN_S)
    os._exit(1)


def end(code: int) -> NoReturn:
    """End the process. Not by sys.exit: threads of a client that waits for a server must not hold it."""
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end(serve(follow))
