"""Asks a question in a process of its own, which may hang or die of the answer: a driver, a server.

The question is a module of petractl that reads its input, a JSON object, from stdin and writes its answer as
the last line of stdout. Input goes by stdin because arguments are seen by every user of the machine.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from petractl.processes.safe_path import safe_path

_LONGEST = 300  # characters of what it said


class NoAnswerError(Exception):
    """The process ended without an answer, or did not end; the message says how."""


def ask(
    module: str,
    question: Mapping[str, object],
    *,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return a module's answer.

    Raises:
        NoAnswerError: there was none within `timeout_s`; the process is gone then.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", module],
            input=json.dumps(question),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env={**os.environ, **safe_path(), **(environment or {})},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"no answer within {timeout_s:g} s") from None
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        answer = None
    if done.returncode or not isinstance(answer, dict):
        raise NoAnswerError(last_words(done.stderr) or f"it ended with {done.returncode}")
    return answer


def last_words(text: str) -> str:
    """Return the last line of what a process said, which in Python names the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:_LONGEST] if lines else ""
