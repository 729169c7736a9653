"""What one look at the machine has found, as data: the command line draws it, a program reads it as JSON.

A failure is something without which a run cannot start or would be refused; a warning is something that some
runs need, or that costs speed. Both say what to do about it.
"""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How it looks."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at: its name, how it looks, what was found, and what to do if it is not well."""

    name: str
    status: Status
    what: str
    hint: str = ""


def ok(name: str, what: str) -> Check:
    """Return that all is well."""
    return Check(name, Status.OK, what)


def warning(name: str, what: str, hint: str) -> Check:
    """Return what some runs will miss."""
    return Check(name, Status.WARNING, what, hint)


def failure(name: str, what: str, hint: str) -> Check:
    """Return what no run can do without."""
    return Check(name, Status.FAILURE, what, hint)
