"""Where a worker's words go: the terminal belongs to rank 0, everybody else writes to a log of its own.

logs/stage-02.log    logs/replica-1-stage-02.log    logs/launcher.log (what torch's launcher has to say)
"""

import contextlib
import logging
import os
import re
import sys
from pathlib import Path

from petractl.processes.report import is_child_of_petractl

LAUNCHER_LOG = "launcher.log"
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class LogHandler(logging.FileHandler):
    """Writes log records to a file; says in one line, once, that the disk has no room for them."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Keep a full disk from filling the terminal with tracebacks."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(
                    f"warning: {self.baseFilename} cannot be written: {error.strerror or error}\n"
                )


def log_name(title: str) -> str:
    """Return a worker's log file by its title: "stage 2 of replica 1" gives "replica-1-stage-02.log"."""
    stage, _, replica = title.partition(" of ")
    padded = re.sub(r"\d+", lambda found: f"{int(found[0]):02d}", stage)
    words = " ".join(part for part in (replica, padded) if part)
    return re.sub(r"[^A-Za-z0-9]+", "-", words).strip("-") + ".log"


def redirect_output(log_dir: Path, rank: int, title: str) -> Path:
    """Send the log records of this process to its log file, and, except on rank 0, its output too.

    Only what `run_workers` started leaves the terminal: torchrun has options of its own for that. Files are
    appended to, since a run can be resumed. Returns the log file.

    Raises:
        OSError: it cannot be written.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    path = log_dir / log_name(title)
    if rank > 0 and is_child_of_petractl():
        _write_to(path)
    handler = LogHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(min(root.level or logging.INFO, logging.INFO))
    return path


def _write_to(path: Path) -> None:
    """Let stdout and stderr, also those of libraries below Python, end in a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(line_buffering=True)
