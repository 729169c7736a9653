"""The journal: `metrics.jsonl` in the run folder, one JSON object per event.

It is always written and is the source of everything said later about the run (curves, `compare`, MLflow),
so it must survive what ends a run: each event is flushed to the system before the next, a resumed run
continues the same file, and a last line that a crash cut short is removed on resuming and skipped on
reading. JSON has no numbers for "not a number" and the infinities; they are written as the strings "NaN",
"Infinity" and "-Infinity", which `float` reads.
"""

import json
import math
from pathlib import Path

from petractl.errors import DataError
from petractl.events import Event

JOURNAL_NAME = "metrics.jsonl"


class Journal:
    """The listener that appends every event to the journal of a run folder."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / JOURNAL_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _repair_end(self.path)
        self._file = self.path.open("a", encoding="utf-8", newline="\n")

    def handle(self, event: Event, record: dict[str, object]) -> None:
        """Append one event and hand it to the system."""
        self._file.write(encode_record(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


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
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _plain(value: object) -> object:
    if not isinstance(value, str | int | float | dict | list | tuple | None):
        value = value.item() if hasattr(value, "item") else str(value)  # numpy's and torch's scalars; paths
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
