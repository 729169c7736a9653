"""A few files kept open for reading, however many are asked for.

Opening a file for each sample costs more than reading it on a network's disk, and a set can have more shards
than a process may open. A file that is let go stays open until the last thread that reads it is done.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from threading import Lock

from petractl.data.sample_table import FileStamp, file_stamp

MOST = 64


class OpenFile:
    """A file open for reading at any place, by any thread; closed when nothing refers to it any more."""

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        # A named pipe would otherwise wait for its other end.
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self.stamp: FileStamp = file_stamp(os.fstat(self._descriptor))

    def read(self, size: int, offset: int) -> bytes:
        """Return `size` bytes from `offset`, fewer at the file's end."""
        content = os.pread(self._descriptor, size, offset)
        while 0 < len(content) < size:
            more = os.pread(self._descriptor, size - len(content), offset + len(content))
            if not more:
                break
            content += more
        return content

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


class OpenFiles:
    """The files used last."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, OpenFile] = OrderedDict()
        self._lock = Lock()

    def get(self, path: Path) -> OpenFile:
        """Return a file, opened if it is not; raises `OSError`."""
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = OpenFile(path)
            self._files.move_to_end(path)
            while len(self._files) > MOST:
                self._files.popitem(last=False)
        return file

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[()]]:
        """Another process opens its own."""
        return OpenFiles, ()

    def close(self) -> None:
        """Let go of all of them."""
        with self._lock:
            self._files.clear()
