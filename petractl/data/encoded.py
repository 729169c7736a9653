"""A set of samples that are not decoded yet, read by number.

Photographs do not fit in memory, and no stream of them can promise an order or take up again at a place. So a
store gives any sample by its number, in any order, from any thread or process; what order they are seen in
is decided elsewhere. A store is pickled as a description of where its samples lie, never with open files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from petractl.errors import DataError

OnError = Literal["stop", "skip"]
"""What a damaged sample does: end the run, or be left out and counted."""

IMAGE_ENTRIES = ("jpg", "jpeg", "png")
LABEL_ENTRY = "cls"

MAX_IMAGE_BYTES = 2**28
"""What is larger is no photograph: it is told as damage, unread."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample: its key, the file of its image as bytes, its label, and the shard or folder it is from."""

    key: str
    image: bytes
    label: int
    place: str


class BadSample(Exception):  # noqa: N818 (what was found is the name)
    """One sample is damaged: the shard or folder it is in, its key, and what is wrong with it.

    No `DataError`, since the reader may leave the sample out and go on. Survives pickling, as it must to come
    from another process.
    """

    def __init__(self, place: str, key: str, reason: str) -> None:
        super().__init__(place, key, reason)
        self.place = place
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.place}: {self.key}: {self.reason}"

    def error(self) -> DataError:
        """Return the error that ends a run."""
        return DataError(
            f"sample {self.key!r}: {self.reason}",
            where=self.place,
            hint='mend it or take it out, or set data.on_error="skip" to leave out such samples, counted',
        )


class EncodedSamples(Protocol):
    """A set of samples that are not decoded; safe to read from several threads, and picklable."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples per shard, in the order of the shards (an image folder is one)."""

    @property
    def classes(self) -> int:
        """Labels are below it."""

    def read(self, index: int) -> Encoded:
        """Return sample `index` of the shards laid end to end.

        Raises `BadSample` for damage to this sample, `DataError` for what is wrong with the set.
        """

    def close(self) -> None:
        """Give back what is open; reading again opens it again."""


def bad_size(size: int) -> str:
    """Return what is wrong with an image of `size` bytes, unread; empty if nothing."""
    if size == 0:
        return "its image is empty (0 bytes)"
    if size > MAX_IMAGE_BYTES:
        return f"its image is {size} bytes, above the limit of {MAX_IMAGE_BYTES}"
    return ""
