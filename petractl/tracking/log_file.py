"""The events of one process as text, one line each: `logs/stage-NN.log`.

With a process per stage, only one of them has the journal and the console. What each of the others did, and
when, must be there to be read after something went wrong, without a tool. Other writers may append to the
same file (warnings of libraries), so every line is written whole and handed to the system at once.
"""

import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from petractl.events import Event, StepsDone
from petractl.tracking.masking import mask_credentials

_STEPS_EVERY_S = 60.0
_FIRST = ("event", "time", "epoch", "update", "stage")  # what the line begins with, in words of its own


class LogFile:
    """The listener that appends a line for each event to a log; progress once a minute.

    The file and its folder are made if they are not there.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", newline="\n")
        self._clock = clock
        self._last_steps_s: float | None = None

    def handle(self, event: Event, record: dict[str, object]) -> None:
        """Append one event."""
        if isinstance(event, StepsDone) and not self._is_time_for_steps():
            return
        self._file.write(log_line(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _is_time_for_steps(self) -> bool:
        now = self._clock()
        if self._last_steps_s is not None and now - self._last_steps_s < _STEPS_EVERY_S:
            return False
        self._last_steps_s = now
        return True


def log_line(record: Mapping[str, object]) -> str:
    """Return a journal record as one line: local time, the event's words, then key=value; nulls left out."""
    seconds = record["time"]
    assert isinstance(seconds, int | float), "the bus writes the time"
    # As `logging` writes it: both stand in the same file.
    when = datetime.fromtimestamp(seconds).isoformat(sep=" ", timespec="milliseconds").replace(".", ",")
    words = [when, str(record["event"]).replace("_", " ")]
    words += [f"{key} {record[key]}" for key in ("epoch", "update", "stage") if record.get(key) is not None]
    own = {key: value for key, value in record.items() if key not in _FIRST and value is not None}
    words += [f"{key}={_text(value)}" for key, value in own.items()]
    return "  ".join(words)


def _text(value: object) -> str:
    if isinstance(value, list):
        return str(len(value))  # the plan's stages: the journal has them in full
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return " | ".join(mask_credentials(str(value)).splitlines())
