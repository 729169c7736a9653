"""Whoever wants to see how far a long piece of work is."""

from typing import Protocol


class Watch(Protocol):
    """Told of progress, from any thread."""

    def begin(self, what: str, total: int) -> None:
        """A piece of work of `total` samples begins; the one before it, if any, is done."""
        ...

    def advance(self, samples: int) -> None:
        """So many more are done."""
        ...


class Unwatched:
    """Nobody looks."""

    def begin(self, what: str, total: int) -> None:
        """Say nothing."""

    def advance(self, samples: int) -> None:
        """Say nothing."""
