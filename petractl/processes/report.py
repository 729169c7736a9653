"""What a worker leaves behind when it fails: one file that its parent reads, in torch's own format.

The file is the one that torch's elastic launcher names in TORCHELASTIC_ERROR_FILE, so a plain torchrun shows
the error too; the object "petractl" in it is what our own launcher reads. Beside it lies a file of stacks:
the Python stack of a worker that died by a fault, or that was asked (SIGUSR1) where it stands.
"""

import contextlib
import ctypes
import dataclasses
import faulthandler
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from petractl.errors import PeerLost, RunError, Stalled, Stopped, UserError, refusal

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
LAUNCHER_VARIABLE = "PETRACTL_LAUNCHER"
_TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"
STACK_SUFFIX = ".stacks"

Kind = Literal["error", "user", "lost", "stalled", "interrupted"]

_PR_SET_PDEATHSIG = 1
_CONSEQUENCE_DELAY_S = 2
# Where the engine has no name for a broken connection, torch has: these say that another process is gone.
_TRANSPORT_ERRORS = frozenset({"DistBackendError", "DistNetworkError", "DistStoreError"})
_TRANSPORT_MARKS = ("gloo/transport", "Connection closed by peer", "Connection reset by peer")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How a worker ended, in its own words.

    `kind` is "lost" where another process was gone, "stalled" where a message did not come (from the rank
    `waiting_for`). `explained`: `what` says it all, and nobody needs the traceback. `stands`: it is no
    consequence of the others' ends. `time` is of the clock
    that runs evenly, the same for all processes of a machine: the other one may be set in the meantime.
    """

    kind: Kind
    title: str
    rank: int
    what: str
    where: str = ""
    hint: str = ""
    traceback: str = ""
    time: float = 0.0
    waiting_for: int | None = None
    explained: bool = False
    stands: bool = False

    @property
    def place(self) -> str:
        """The worker as people are told of it."""
        return f"{self.title} (rank {self.rank})"

    @property
    def exit_code(self) -> int:
        """The exit code that goes with it."""
        return {"user": EXIT_USER_ERROR, "interrupted": EXIT_INTERRUPTED}.get(self.kind, EXIT_FAILED)

    def in_words(self) -> str:
        """Return what the worker says where no launcher of ours says it; empty for an interruption."""
        if self.kind == "interrupted":
            return ""
        place = "" if self.what.startswith(self.place) else f"{self.place}: "
        head = f"error: {place}{f'{self.where}: ' if self.where else ''}{self.what}"
        if self.kind == "lost":
            return head.splitlines()[0]
        parts = [head, "" if self.explained else self.traceback.rstrip()]
        return "\n".join(part for part in [*parts, f"hint: {self.hint}" if self.hint else ""] if part)


def is_child_of_petractl() -> bool:
    """Tell whether this process was started by `run_workers` (not by a plain torchrun, nor alone)."""
    return LAUNCHER_VARIABLE in os.environ


def die_with_parent() -> None:
    """Have the kernel kill this process as soon as its parent is gone, however it went (Linux only).

    Call it first thing in a worker. A parent that was gone before is noticed too, if it was `run_workers`.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    launcher = os.environ.get(LAUNCHER_VARIABLE, "")
    if launcher.isdecimal() and os.getppid() != int(launcher):
        os._exit(EXIT_FAILED)


def die_with_launcher() -> None:
    """Bind this process's life to whoever launched it: us, or torchrun; not to a shell, srun or mpirun."""
    if is_child_of_petractl() or _TORCHRUN_VARIABLE in os.environ:
        die_with_parent()


@contextlib.contextmanager
def reported(title: str, rank: int) -> Iterator[None]:
    """Report whatever ends the block but its own end, then end the process, with 1, 2 or 130.

    The process ends by `os._exit` once everything is flushed: a thread that waits for a neighbour could hold
    back an orderly end for ever. `SystemExit` with 0 passes; with 130 it is an interruption.
    """
    _keep_stacks()
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            raise
        if error.__traceback__ is not None:
            error.__traceback__ = error.__traceback__.tb_next  # this frame tells nobody anything
        report = report_of(error, title=title, rank=rank)
        _tell(report)
        end_process(report.exit_code)


def report_of(error: BaseException, *, title: str, rank: int) -> Report:
    """Return the report of an exception that ended a worker."""
    if isinstance(error, KeyboardInterrupt) and isinstance(error.__context__, Exception):
        # Told to stop while it was about to end anyway: what counts is what it was ending of.
        error = error.__context__ if not isinstance(error.__context__, Stopped) else error
    trace = "".join(traceback.format_exception(error))
    kind = kind_of(error)
    head = Report(kind=kind, title=title, rank=rank, what="", traceback=trace, time=time.monotonic())
    if kind == "interrupted":
        return dataclasses.replace(head, what="was interrupted", explained=True)
    if isinstance(error, (UserError, RunError)):
        waiting_for = error.waiting_for if isinstance(error, Stalled) else None
        return dataclasses.replace(
            head,
            what=error.what,
            where=error.where,
            hint=error.hint,
            waiting_for=waiting_for,
            explained=True,
            stands=isinstance(error, RunError) and error.stands,
        )
    if isinstance(error, OSError) and kind == "error" and refusal(error):
        return dataclasses.replace(head, what=refusal(error), explained=True)
    if isinstance(error, SystemExit):
        return dataclasses.replace(head, what=f"ended itself with exit code {error.code}")
    text = str(error).strip()
    name = type(error).__name__
    what = f"lost another process ({name}: {text})" if kind == "lost" else f"{name}: {text}" if text else name
    return dataclasses.replace(head, what=what)


def write_report(report: Report, path: Path) -> None:
    """Write a report so that both torch's launcher and ours can read it, in one step."""
    # torch takes the smallest time, in whole seconds, for the cause: what is a consequence comes later.
    is_consequence = report.kind in ("lost", "interrupted")
    passed_s = time.monotonic() - report.time
    seconds = int(time.time() - passed_s) + (_CONSEQUENCE_DELAY_S if is_consequence else 0)
    stack = report.what if report.explained else report.traceback
    about = {"py_callstack": stack, "timestamp": str(seconds)}
    record = {
        "message": {"message": report.what, "extraInfo": about},
        "petractl": dataclasses.asdict(report),
    }
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(record), encoding="utf-8")
    temporary.replace(path)


def read_report(path: Path) -> Report | None:
    """Return a worker's report; None if it left none."""
    try:
        return Report(**json.loads(path.read_text(encoding="utf-8"))["petractl"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def kind_of(error: BaseException) -> Kind:
    """Return what an exception means for the run; see `Report`."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, SystemExit) and error.code == EXIT_INTERRUPTED:
        return "interrupted"
    if isinstance(error, UserError):
        return "user"
    if isinstance(error, Stalled):
        return "stalled"
    return "lost" if isinstance(error, PeerLost) or _is_of_transport(error) else "error"


def _is_of_transport(error: BaseException) -> bool:
    if any(kind.__name__ in _TRANSPORT_ERRORS for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _TRANSPORT_MARKS)


def _tell(report: Report) -> None:
    """Write the report, and say it where nobody else will: a launcher of ours speaks for all its workers."""
    path = os.environ.get(ERROR_FILE_VARIABLE, "")
    with contextlib.suppress(OSError):
        if path:
            write_report(report, Path(path))
    if report.kind == "interrupted":
        _logger.info("interrupted")
    elif logging.getLogger().handlers:
        _logger.error("%s\n%s", report.what, report.traceback)
    words = report.in_words()
    if words and not is_child_of_petractl():
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"{words}\n")


def end_process(code: int) -> NoReturn:
    """End this process at once with everything flushed, whatever threads still wait for others."""
    for flush in (logging.shutdown, sys.stdout.flush, sys.stderr.flush):
        with contextlib.suppress(Exception):
            flush()
    # Where the fork server of the data's workers has its sockets; nobody else removes it after `_exit`.
    folder = multiprocessing.current_process()._config.get("tempdir")  # type: ignore[attr-defined]
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(code)


def _keep_stacks() -> None:
    """Have stacks written beside the error file: by a fault of this process, and whenever it is asked.

    It stays so until the process ends: a question that comes late must not kill what has just ended well.
    """
    path = os.environ.get(ERROR_FILE_VARIABLE, "")
    if not path or not hasattr(faulthandler, "register"):
        return
    try:
        file = open(f"{path}{STACK_SUFFIX}", "w", encoding="utf-8")  # noqa: SIM115 (as long as the process)
    except OSError:
        return
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
    faulthandler.enable(file=file, all_threads=True)
    # Written last: who finds it knows that it may ask.
    file.write(f"main thread 0x{threading.main_thread().ident or 0:016x}\n")
    file.flush()
