"""Files that a command is to write: found out before the work whether they can be."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from petractl.errors import UserError


def check_place(path: Path | None, suffix: str) -> None:
    """Refuse a place that cannot be written to.

    Raises:
        UserError: another suffix, a folder that is not there, or no permission.
    """
    if path is None:
        return
    if path.suffix.lower() != suffix:
        raise UserError(
            f"is not a {suffix[1:].upper()} file", where=str(path), hint=f"end its name with {suffix}"
        )
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise UserError(what, where=str(path), hint="give a file in a folder that exists")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(
            "cannot be written: no permission", where=str(path), hint="give a file in a folder of yours"
        )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong with a file into the user's error; a full disk is told as everywhere."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UserError(f"cannot be written: {error.strerror or error}", where=str(path)) from None
