"""The journal: `metrics.jsonl` in the run folder, one JSON object per event.

It is always written and is the source of everything said later about the run (curves, `compare`, MLflow),
so it must survive what ends a run: each event is handed to the system before the next, a resumed run
continues the same file, and a last line that a crash cut short is removed on resuming and skipped on
reading. Events for which the disk has no room are kept, and written with the first one for which it has.
JSON has no numbers for "not a number" and the infinities; they are written as the strings "NaN", "Infinity"
and "-Infinity", which `float` reads. Credentials, in an error's message for one, are masked.
"""

import contextlib
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

from petractl.errors import DataError, RunError
from petractl.events import Event
from petractl.tracking.masking import mask_credentials

JOURNAL_NAME = "metrics.jsonl"

_logger = logging.getLogger(__name__)


class Journal:
    """The listener that appends every event to the journal of a run folder.

    `on_warning(message, hint)` is called once when the disk refuses an event; it may emit on the bus. What
    cannot be written until the end is lost, and `close` raises what the disk says.
    """

    def __init__(self, run_dir: Path, *, on_warning: Callable[[str, str], None] | None = None) -> None:
        """Open the journal, and mend its end.

        Raises:
            RunError: it cannot be written.
        """
        self.path = run_dir / JOURNAL_NAME
        self._on_warning = on_warning or _warn
        self._warned = False
        self._waiting = b""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _repair_end(self.path)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise RunError(
                f"the journal cannot be written: {error.strerror or error}",
                where=str(self.path),
                hint="make room, or let it be written; checkpoints are intact",
            ) from error

    def handle(self, event: Event, record: dict[str, object]) -> None:
        """Append one event and hand it to the system; if it does not fit, keep it for the next time."""
        self._waiting += encode_record(record).encode() + b"\n"
        try:
            self._write_waiting()
        except OSError as error:
            if not self._warned:
                self._warned = True
                self._on_warning(
                    f"{self.path} cannot be written: {error.strerror or error}",
                    "make room: what is missing from the journal is kept, and written when there is some",
                )

    def close(self) -> None:
        """Write what has waited for room, and close the file.

        Raises:
            OSError: there is none.
        """
        with contextlib.closing(self._file):
            self._write_waiting()

    def _write_waiting(self) -> None:
        while self._waiting:
            written = self._file.write(self._waiting)
            # What a full disk has taken of a line stays: the rest follows when there is room.
            self._waiting = self._waiting[written or 0 :]


def _warn(message: str, hint: str) -> None:
    _logger.warning("%s (hint: %s)", message, hint)


def encode_record(record: dict[str, object]) -> str:
    """Return a record as one line of valid JSON, without the newline."""
    return json.dumps(_plain(record), allow_nan=False, separators=(",", ":"))


def read_journal(path: Path) -> list[dict[str, object]]:
    """Read all events of a journal, given the file or its run folder.

    A last line that is cut short is skipped. Raises `DataError` if the file is missing or another line is
    not a JSON object.
    """
    if path.is_dir():
        path = path / JOURNAL_NAME
    if not path.is_file():
        raise DataError(
            "no journal", where=str(path), hint="give the folder of a run, which holds metrics.jsonl"
        )
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        record = _decode(line)
        if record is not None:
            records.append(record)
        elif line.strip() and number < len(lines):
            raise DataError("not a JSON object", where=f"{path}:{number}", hint="remove or repair this line")
    return records


class JournalTail:
    """Reads a journal while another process writes it: each call gives the complete lines that are new."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / JOURNAL_NAME
        self._offset = 0  # bytes

    def read(self) -> list[dict[str, object]]:
        """Return the events written since the last call; none if the file is not there yet."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            complete, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(complete) + len(newline)
        return [record for record in map(_decode, complete.split(b"\n")) if record is not None]


def _decode(line: bytes) -> dict[str, object] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _plain(value: object) -> object:
    if not isinstance(value, str | int | float | dict | list | tuple | None):
        value = value.item() if hasattr(value, "item") else str(value)  # numpy's and torch's scalars; paths
    if isinstance(value, str):
        return mask_credentials(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _repair_end(path: Path) -> None:
    """Remove a last line that a crash cut short, so that the next event starts a line of its own."""
    if not path.is_file():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
