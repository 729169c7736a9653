"""Credentials must not reach a log, a journal or a tracking server: they are replaced by ``***``."""

import re
from collections.abc import Sequence

_SECRET_NAME = r"(?:password|passwd|pwd|token|secret|api[_-]?key|access[_-]?key|credentials?)"
# The user part of an address, up to the last @ of the word: a password may itself hold @ or /.
_USER_PART = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s\"'<>]*@")
_NAMED_VALUE = re.compile(rf"({_SECRET_NAME}\b[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,}}\]]+", re.IGNORECASE)
_SECRET_OPTION = re.compile(rf"--?[\w.-]*{_SECRET_NAME}", re.IGNORECASE)


def mask_credentials(text: str) -> str:
    """Return the text with the user part of addresses and the values of password-like names replaced."""
    return _NAMED_VALUE.sub(r"\1***", _USER_PART.sub(r"\1***@", text))


def mask_arguments(arguments: Sequence[str]) -> list[str]:
    """Return command-line arguments without credentials, also where the value is an argument of its own."""
    masked = [mask_credentials(argument) for argument in arguments]
    for i, argument in enumerate(arguments[:-1]):
        if _SECRET_OPTION.fullmatch(argument):
            masked[i + 1] = "***"
    return masked
