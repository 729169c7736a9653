"""The named data sets: one dict, a decorator that fills it, `open_data` and `describe_data` to use it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Unpack

from petractl.data.dataset import AnyData, Source
from petractl.data.request import Asked, Request
from petractl.data.values import DataInfo
from petractl.errors import DataError

Builder = Callable[[Request], Source]

_BUILDERS: dict[str, Builder] = {}


def register_dataset(builder: Builder) -> Builder:
    """Make a builder known by its name, with - for _; the first line of its docstring is its summary."""
    name = builder.__name__.replace("_", "-")
    assert name not in _BUILDERS, name
    _BUILDERS[name] = builder
    return builder


def list_datasets() -> list[str]:
    """Return the names of all sets, sorted."""
    return sorted(_BUILDERS)


def dataset_summary(name: str) -> str:
    """Return one line on the set `name`; raises `DataError` for a name that is not known."""
    return (_builder(name).__doc__ or "").strip().partition("\n")[0]


def open_data(
    name: str,
    *,
    train: str | Sequence[str],
    val: str | Sequence[str],
    seed: int,
    test_only: bool = False,
    **asked: Unpack[Asked],
) -> AnyData:
    """Open the set `name`: read into memory, or (photographs) found and counted.

    `train` and `val` say where it is (path, brace pattern, folder, URL, or a list of these; "": `data/<name>`
    as a rule). `seed` is that of the order and the augmentation (and of the images of 'fake'). `test_only`
    leaves training files unread. The rest is as in `Request`. Raises `DataError` for whatever is unknown,
    missing or damaged.
    """
    request = Request(train=_places(train), val=_places(val), seed=seed, test_only=test_only, **asked)
    return _builder(name)(request).load()


def describe_data(
    name: str,
    *,
    train: str | Sequence[str],
    val: str | Sequence[str],
    test_only: bool = False,
    **asked: Unpack[Asked],
) -> DataInfo:
    """Say what `open_data` would open, without decoding an image or downloading anything.

    The files must be there, unless they may be downloaded. A number of samples is `UNKNOWN` (-1) where
    counting would mean reading very much. Raises `DataError` as `open_data` does, but does not find every
    damage that reading would.
    """
    request = Request(train=_places(train), val=_places(val), test_only=test_only, **asked)
    return _builder(name)(request).describe()


def _builder(name: str) -> Builder:
    if name not in _BUILDERS:
        close = difflib.get_close_matches(name, _BUILDERS, n=1)
        raise DataError(
            f"no data set is called {name!r}",
            where="data.name",
            hint=(f"did you mean {close[0]!r}? " if close else "")
            + f"there are: {', '.join(list_datasets())}",
        )
    return _BUILDERS[name]


def _places(given: str | Sequence[str]) -> tuple[str, ...]:
    return ((given,) if given else ()) if isinstance(given, str) else tuple(given)
