"""The process that sends a run to MLflow while it is running: `python -m petractl.tracking.mlflow_worker`.

It reads its settings as one JSON line from stdin, then follows the journal of the run folder about once a
second until stdin says "close" or ends (so a run that is killed still gets its status). It tells on stdout,
one JSON object a line, that it is getting on, a warning, or that all is done; everything else goes to
stderr, without credentials. A server that fails is tried again, more and more rarely, with whatever has
gathered.
"""

import contextlib
import io
import json
import logging
import os
import select
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NoReturn, Protocol

from petractl.tracking.journal import JournalTail
from petractl.tracking.masking import mask_credentials
from petractl.tracking.mlflow_run import MlflowRun, TrackingSettings, final_status, metric_points

_POLL_S = 1.0
_LONGEST_PAUSE_S = 60.0
_REASON_CHARACTERS = 300


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


def follow(settings: TrackingSettings, commands: Commands, reporter: Reporter) -> bool:
    """Send the journal as it grows, until the run is over; return whether everything was sent."""
    run = MlflowRun(settings, progress=lambda: reporter.tell("progress"))
    tail = JournalTail(Path(settings.run_dir))
    everything: list[dict[str, object]] = []  # what matters here; the progress within an epoch does not
    sent = 0
    pause_s = 0.0  # nothing to wait for before the first try
    last_reason = ""
    closing = False
    while not closing:
        closing = commands.closing(pause_s)
        everything += [record for record in tail.read() if _matters(record)]
        try:
            run.send(everything[sent:])
            sent = len(everything)
            pause_s = _POLL_S
            if closing:
                run.finish(final_status(everything))
        except Exception as error:
            pause_s = min(_LONGEST_PAUSE_S, max(2.0, 2.0 * pause_s))
            if reason(error) != last_reason:  # a server that is down for days must not fill the log
                last_reason = reason(error)
                traceback.print_exc()
            reporter.tell("warning", reason(error))
            if closing:
                return False
    return True


def reason(error: Exception) -> str:
    """Return why MLflow failed, on one line, without credentials."""
    text = " ".join(mask_credentials(str(error)).split()) or type(error).__name__
    return text if len(text) <= _REASON_CHARACTERS else text[: _REASON_CHARACTERS - 3] + "..."


def _matters(record: dict[str, object]) -> bool:
    return bool(metric_points(record)) or str(record["event"]).startswith("run_")


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
    start_s = time.monotonic()
    complete = follow(settings, StdinCommands(0), reporter)
    reporter.tell("done" if complete else "incomplete", f"{time.monotonic() - start_s:.1f} s")
    return 0 if complete else 1


def end(code: int) -> NoReturn:
    """End the process. Not by sys.exit: threads of a client that waits for a server must not hold it."""
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end(serve(follow))
