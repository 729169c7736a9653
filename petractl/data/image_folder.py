"""Photographs in folders, one folder per class, as torchvision's `ImageFolder` reads them.

Classes are numbered in the order of their folders' names, images lie in them at any depth. Those of a test
set are numbered by the training set's names, so that a class that it lacks shifts no label. Links are
followed, hidden files passed over; the names of a million images are kept as one block per class.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from petractl.data.encoded import IMAGE_ENTRIES, BadSample, Encoded, bad_size
from petractl.data.places import is_shard, listing
from petractl.errors import DataError


class ImageFolder:
    """The images of a folder; see `EncodedSamples`. Made by `open_image_folder`."""

    def __init__(
        self, root: Path, *, class_names: Sequence[str], files: Sequence[NDArray[np.bytes_]]
    ) -> None:
        """`files` are the paths of each class's images below its folder."""
        self.class_names = tuple(class_names)
        self.classes = len(self.class_names)
        self.places = (str(root),)
        self.image_size: tuple[int, int] | None = None
        self._root = root
        self._files = tuple(files)
        self._ends = tuple(accumulate(len(names) for names in files))
        self.sizes = (self._ends[-1],)

    def read(self, index: int) -> Encoded:
        """Return a sample; raises `BadSample` for a file that is no longer there or cannot be read."""
        label = bisect_right(self._ends, index)
        files = self._files[label]
        name = os.fsdecode(bytes(files[index - self._ends[label] + len(files)]))
        key = f"{self.class_names[label]}/{name}"
        try:
            image = _content(self._root / key)
        except OSError as error:
            raise BadSample(self.places[0], key, f"it cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise BadSample(self.places[0], key, str(error)) from None
        return Encoded(key=key, image=image, label=label, place=self.places[0])

    def close(self) -> None:
        """Do nothing: no file stays open."""


def open_image_folder(
    root: Path, *, where: str, extensions: Sequence[str] = IMAGE_ENTRIES, class_names: Sequence[str] = ()
) -> ImageFolder:
    """Find the images of a folder of classes; none of them is opened.

    `where` is the recipe's key for messages; `class_names` number the classes, none: the folder's own. Raises
    `DataError` for a folder without classes, a class without images, and a class that `class_names` lack.
    """
    try:
        return _open(root, where, extensions=extensions, class_names=class_names)
    except OSError as error:
        raise DataError(
            f"{error.filename} cannot be read: {error.strerror}", where=where, hint="check its permissions"
        ) from error


def class_folders(root: Path) -> tuple[str, ...]:
    """Return the names of the classes that a folder holds, in their order; none where there is no folder."""
    return tuple(sorted(entry.name for entry in root.iterdir() if _is_class(entry))) if root.is_dir() else ()


def is_image_folder(path: Path) -> bool:
    """Whether a folder holds folders, and no shard."""
    entries = list(path.iterdir()) if path.is_dir() else []
    return any(_is_class(entry) for entry in entries) and not any(is_shard(entry) for entry in entries)


def _open(root: Path, where: str, *, extensions: Sequence[str], class_names: Sequence[str]) -> ImageFolder:
    if not root.is_dir():
        raise DataError(f"there is no folder {root}", where=where, hint=listing(root.parent))
    here = class_folders(root)
    if not here:
        raise DataError(f"{root} holds no folder of a class", where=where, hint=listing(root))
    strange = sorted(set(here) - set(class_names)) if class_names else []
    if strange:
        raise DataError(
            f"{root / strange[0]} is no class of the training data",
            where=where,
            hint=f"its {len(class_names)} classes are {_some(class_names)}",
        )
    names = tuple(class_names) or here
    endings = tuple("." + extension.lower() for extension in extensions)
    files = [_images(root / name, endings) if name in here else [] for name in names]
    empty = [name for name, images in zip(names, files, strict=True) if not images]
    if len(empty) == len(names) or (empty and not class_names):
        raise DataError(
            f"{root / empty[0]} holds no image ({', '.join(endings)})",
            where=where,
            hint="take the folder away, fill it, or name other endings in data.image_entries",
        )
    return ImageFolder(root, class_names=names, files=[np.array(images, np.bytes_) for images in files])


def _images(folder: Path, endings: tuple[str, ...]) -> list[bytes]:
    """Return the paths of a class's images below its folder, sorted."""
    base = len(os.fsencode(folder)) + 1
    return sorted(os.fsencode(path)[base:] for path in _walk(str(folder), endings, ()))


def _walk(folder: str, endings: tuple[str, ...], above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Yield images below a folder; a link to a folder that it lies in is not followed."""
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, endings, (*above, identity))
            elif entry.name.lower().endswith(endings):
                yield entry.path


def _content(path: Path) -> bytes:
    """Return a file's bytes; raises `OSError`, and `ValueError` for what is no file to be read."""
    # A named pipe would otherwise wait for its other end.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if reason := bad_size(status.st_size):
            raise ValueError(reason)
        return file.readall()


def _is_class(entry: Path) -> bool:
    return not entry.name.startswith(".") and entry.is_dir()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
