"""Credentials must not reach a log, a journal or a tracking server: they are replaced by ``***``."""

import re
from collections.abc import Sequence

_SECRET_NAME = (
    r"(?:password|passwd|passphrase|pwd|token|secret|api[_-]?key|(?:access|account|private)[_-]?key"
    r"|signature|(?<![A-Za-z])sig|credentials?)"
)
# The user part of an address, up to the last @ of the word: a password may itself hold @, / or a quote, and
# in the address of a database spaces as well. Lengths have limits, so that no text takes long.
_USER_PART = re.compile(
    r"(?<![A-Za-z0-9+.-])([A-Za-z0-9+.-]+://)(?:(?:[^\s\"\\]|\\.){0,4000}@|[^\s/:@\"]{0,400}:[^\"\n/@]{0,400}@)"
)
_NAMED_VALUE = re.compile(rf"({_SECRET_NAME}\b[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,}}\]]+", re.IGNORECASE)
_HEADER = re.compile(
    r"(\bauthorization[\"']?\s*[=:]\s*[\"']?|\bbearer\s+)(?:(?:basic|bearer)\s+)?[^\s\"',]+", re.I
)
_SECRET_OPTION = re.compile(rf"--?[\w.-]*{_SECRET_NAME}", re.IGNORECASE)


def mask_credentials(text: str) -> str:
    """Return the text with the user part of addresses and the values of password-like names replaced."""
    without_users = _USER_PART.sub(r"\1***@", text)
    return _NAMED_VALUE.sub(r"\1***", _HEADER.sub(r"\1***", without_users))


def mask_arguments(arguments: Sequence[str]) -> list[str]:
    """Return command-line arguments without credentials, also where the value is an argument of its own."""
    masked = [mask_credentials(argument) for argument in arguments]
    for i, argument in enumerate(arguments[:-1]):
        if _SECRET_OPTION.fullmatch(argument):
            masked[i + 1] = "***"
    return masked
