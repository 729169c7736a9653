"""What a user can do wrong, and how it is told.

Every error names what is wrong, where, and what to do about it. The command line turns a `UserError` into
exit code 2 and a `RunError` into exit code 1; anything else is a bug of ours and keeps its traceback.
"""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a recipe: the key (``section.key``), what is wrong, and the remedy."""

    key: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        head = f"{self.key}: {self.what}" if self.key else self.what
        return f"{head}\n  hint: {self.hint}" if self.hint else head


class _ExplainedError(Exception):
    """An error with its place and its remedy."""

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        self.what = what
        self.where = where
        self.hint = hint
        head = f"{where}: {what}" if where else what
        super().__init__(f"{head}\nhint: {hint}" if hint else head)


class UserError(_ExplainedError):
    """The user's input is wrong (exit code 2)."""


class DataError(UserError):
    """The data a recipe names are missing or not what the recipe says (exit code 2)."""


class RunError(_ExplainedError):
    """The run failed although its input was right (exit code 1).

    `stands`: it is no consequence of other processes' ends, also where all were told to stop.
    """

    stands = False


class NotSaved(RunError):  # noqa: N818 (what happened is the name)
    """A checkpoint could not be written (exit code 1)."""

    stands = True


class OutOfMemory(RunError):  # noqa: N818 (what happened is the name)
    """The device, or the machine, has too little memory (exit code 1)."""

    stands = True


def refusal(error: OSError) -> str:
    """Return what the system refuses, and for which file, in words; "" where it is no refusal but a bug."""
    if error.errno not in _REFUSALS:
        return ""
    words = "no space left on the device"
    if error.errno != errno.ENOSPC:
        words = (error.strerror or os.strerror(error.errno)).lower()
    return f"{words}: {error.filename}" if error.filename else words


def lack_of_memory(error: Exception) -> str:
    """Return what an error says of too little memory, in a line; "" where it is another error."""
    lines = str(error).splitlines() or [type(error).__name__]
    # torch is not imported here, and its CPU allocator has no type of its own for this.
    lacks = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return lines[0] if lacks or "can't allocate memory" in lines[0] else ""


_REFUSALS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENFILE,
)


class Stopped(Exception):  # noqa: N818 (not an error)
    """The run ends where it can be saved, as it was told to."""


class PeerLost(RunError):  # noqa: N818 (what happened is the name)
    """A process of the world is gone: this one ends because of another's failure (exit code 1).

    It is a consequence: where a cause is known, the report of the run names the cause first.
    """


class Stalled(RunError):  # noqa: N818 (what happened is the name)
    """A message that a stage waits for has not come within the time the recipe allows (exit code 1).

    `waiting_for` is the rank whose message is missing (None where the caller cannot tell): of several stalled
    workers, the one that others wait for and that waits for nobody is where the run stands still.
    """

    def __init__(self, what: str, *, where: str = "", hint: str = "", waiting_for: int | None = None) -> None:
        self.waiting_for = waiting_for
        super().__init__(what, where=where, hint=hint)


class RecipeError(UserError):
    """A recipe with one or more problems, all of them reported together (exit code 2)."""

    def __init__(self, problems: Sequence[Problem], *, where: str = "") -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        title = "1 problem" if count == 1 else f"{count} problems"
        super().__init__("\n".join([f"{title} in the recipe", *map(str, self.problems)]), where=where)
