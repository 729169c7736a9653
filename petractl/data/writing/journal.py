"""The journal of a build: what is being built, and which shards are finished.

It lies in the destination as long as the build is not. Its first line says the settings and what the source
was; a build that goes on must agree with all of it, or its shards would mix two orders. Every finished shard
adds a line with its checksum, by which it is recognised. The journal is locked while a process is at it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

from petractl.data.writing.shard_file import Skipped, WrittenShard, sync_folder
from petractl.errors import UserError

JOURNAL_NAME = ".build.jsonl"
SOURCE_FACTS = "source facts"
"""By this key a build's description says what its source was, for nobody to read."""


class Journal:
    """The open journal of one build; `finished` are the shards that it had when it was opened."""

    def __init__(self, path: Path, descriptor: int, finished: dict[str, WrittenShard]) -> None:
        self.path = path
        self.finished = finished
        self._descriptor = descriptor
        self._lock = Lock()

    def add(self, shard: WrittenShard) -> None:
        """Write down a finished shard; from any thread."""
        with self._lock:
            _append(self._descriptor, asdict(shard))

    def remove(self) -> None:
        """Take the journal away: the index says all of it now."""
        self.path.unlink()
        sync_folder(self.path.parent)


@contextmanager
def open_journal(folder: Path, build: Mapping[str, Any]) -> Iterator[Journal]:
    """Open or begin the journal of a build, described by plain values, and hold it.

    Raises `UserError` where another process holds it, or where it is that of another build.
    """
    path = folder / JOURNAL_NAME
    descriptor = _locked(path)
    try:
        with os.fdopen(os.dup(descriptor), "rb") as file:
            lines = file.read().splitlines(keepends=True)
        rows = list(_rows(lines))
        wanted = json.loads(json.dumps(build))
        if rows:
            _compare(path, rows[0], wanted)
        # A line that was cut off by a crash is not taken up, nor is anything written behind it.
        os.ftruncate(descriptor, sum(map(len, lines[: len(rows)])))
        if not rows:
            _append(descriptor, wanted)
            sync_folder(folder)
        yield Journal(path, descriptor, {row["name"]: _shard(row) for row in rows[1:]})
    finally:
        os.close(descriptor)


def _locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have taken the file away in between.
            if _is_file(descriptor, path):
                return descriptor
        except OSError:
            os.close(descriptor)
            raise UserError(
                "another process is building shards here", where=str(path.parent), hint="wait for it"
            ) from None
        os.close(descriptor)


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _rows(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n") or not isinstance(row, dict):
            return
        yield row


def _append(descriptor: int, row: Mapping[str, Any]) -> None:
    line = json.dumps(row).encode() + b"\n"
    while line:
        line = line[os.write(descriptor, line) :]
    os.fsync(descriptor)


def _shard(row: Mapping[str, Any]) -> WrittenShard:
    size = row["image_size"]
    return WrittenShard(
        name=row["name"],
        samples=row["samples"],
        bytes=row["bytes"],
        sha256=row["sha256"],
        image_size=(size[0], size[1]) if size else None,
        skipped=tuple(Skipped(**skipped) for skipped in row["skipped"]),
    )


def _compare(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if not differing:
        return
    key = differing[0]
    what = f"its {key.replace('_', ' ')} is {_short(before.get(key))}, not {_short(now.get(key))}"
    go_on = "repeat the command that began it"
    if key == SOURCE_FACTS:
        what = "its source has changed since: files were added, removed, renamed or replaced"
        go_on = "put them back as they were (their times too)"
    raise UserError(
        f"an unfinished build is here, and {what}",
        where=str(path.parent),
        hint=f"{go_on}, give another folder, or remove {path} and its shards to begin anew",
    )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
