"""What processes leave for each other is there for whoever asks next."""

import torch
from torch.distributed import HashStore

from petractl.engine.world import Seat, World


class SlowStore:
    """Like a client of a TCP store: a set is under way until a question after it is answered."""

    def __init__(self) -> None:
        self.texts: dict[str, bytes] = {}
        self._under_way: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self._under_way[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        self.texts |= self._under_way
        return all(key in self.texts for key in keys)

    def get(self, key: str) -> bytes:
        return self.texts[key]


def world(store: object) -> World:
    return World(
        Seat(),
        store=store,
        device=torch.device("cpu"),
        control=None,  # type: ignore[arg-type]
        forward=None,  # type: ignore[arg-type]
        backward=None,  # type: ignore[arg-type]
        pipeline=None,  # type: ignore[arg-type]
        replicas=None,
        backend="gloo",
    )


def test_what_is_told_is_there_when_tell_returns() -> None:
    """Replicas ask after an update that all have waited for: one that misses a cut trains on alone."""
    store = SlowStore()
    world(store).tell("cut/0/3", "3")
    assert store.texts == {"cut/0/3": b"3"}


def test_what_nobody_told_is_none() -> None:
    store = HashStore()
    assert world(store).ask("a") is None
    world(store).tell("a", "b")
    assert world(store).ask("a") == "b"
