"""One call of the command line for fuzzing: in process, bounded in time and memory, and judged.

A call ends well if it ends by itself with exit code 0, 1 or 2, and says in words what is wrong where it is
not 0. What is raised goes on as it is, so that a failure names the line that it comes from. The time is that
of the processor, so that a busy machine fails nothing; what waits for ever is ended by pytest's own limit.
"""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from typer.testing import CliRunner

from petractl.cli.app import app

CPU_LIMIT_S = 30
_MEMORY_LIMIT = 6 << 30  # bytes above what the process has
_EXIT_CODES = (0, 1, 2)
_WORDS = ("error:", "Error:", "error ", "not allowed", "failed")


class TookTooLong(Exception):  # noqa: N818 (what happened is the name)
    """A call has computed for longer than any of its kind should."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a call ended, and what it wrote."""

    code: int
    out: str
    err: str


def call(*arguments: str) -> Ended:
    """Call `petractl` with these arguments, and check that it ends as it should."""
    with _bounded():
        result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    ended = Ended(result.exit_code, result.stdout, result.stderr)
    assert ended.code in _EXIT_CODES, f"exit code {ended.code}: {ended.err}"
    assert "Traceback" not in ended.out + ended.err, ended.err
    if ended.code:
        assert any(word in ended.out + ended.err for word in _WORDS), f"exit code {ended.code} without a word"
    return ended


def sets(*overrides: str) -> list[str]:
    """Return overrides as arguments."""
    return [part for text in overrides for part in ("--set", text)]


@contextmanager
def _bounded() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, _stop)
    resource.setrlimit(resource.RLIMIT_AS, (_size() + _MEMORY_LIMIT, hard))
    signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _stop(number: int, frame: FrameType | None) -> None:
    raise TookTooLong(f"more than {CPU_LIMIT_S} s of processor time")


def _size() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
