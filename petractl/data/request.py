"""What is asked of a data set: the keys that decide which images are read and how they become pixels.

A named set is a builder that turns a `Request` into what it opens. A set has no use for most of the keys; one
that would be ignored although it contradicts the set is refused by the checks here.
"""

from dataclasses import dataclass
from typing import Literal, TypedDict

from petractl.data.values import DataInfo
from petractl.errors import DataError

DEFAULT_FAKE_SAMPLES = 1024


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a named set: places (none: the set's own), the seed, sizes (0: the set's own), ...

    With `test_only` a set that lies in files leaves its training files alone, and has no training samples.
    `image_size` is the side of an image as the net sees it, `resize` that of its short side before the crop
    of evaluation. The other fields are explained with the keys of the same name in the recipe.
    """

    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    seed: int = 0
    test_only: bool = False
    fake_samples: int = DEFAULT_FAKE_SAMPLES
    channels: int = 0
    classes: int = 0
    image_size: int = 0
    image_entries: tuple[str, ...] = ("jpg", "jpeg", "png")
    label_entry: str = "cls"
    resize: int = 0
    crop: Literal["auto", "random-resized", "pad"] = "auto"
    crop_scale: float = 0.08
    decoder: Literal["auto", "pillow", "torchvision"] = "auto"
    shuffle_buffer: int = 10_000
    on_error: Literal["stop", "skip"] = "stop"
    max_skipped: int = 100
    allow_pipe: bool = False
    cache: str = ""
    resident: bool = False
    download: bool = False


class Asked(TypedDict, total=False):
    """The fields of a `Request` beside places and seed, as keyword arguments."""

    fake_samples: int
    channels: int
    classes: int
    image_size: int
    image_entries: tuple[str, ...]
    label_entry: str
    resize: int
    crop: Literal["auto", "random-resized", "pad"]
    crop_scale: float
    decoder: Literal["auto", "pillow", "torchvision"]
    shuffle_buffer: int
    on_error: Literal["stop", "skip"]
    max_skipped: int
    allow_pipe: bool
    cache: str
    resident: bool
    download: bool


def require_fixed_shape(request: Request, info: DataInfo) -> None:
    """Raise `DataError` where `request` asks a set of real images for a shape that is not its own."""
    asked = {
        "image_size": (request.image_size, info.height),
        "channels": (request.channels, info.channels),
        "classes": (request.classes, info.classes),
    }
    for key, (value, own) in asked.items():
        if value not in (0, own):
            raise DataError(
                f"{info.name} has {key} {own}, not {value}",
                where=f"data.{key}",
                hint=f"leave data.{key} out: it is for other sets",
            )
    require_real(request, info.name)


def require_real(request: Request, name: str) -> None:
    """Raise `DataError` where `request` asks a set of real images for a number of made-up ones."""
    if request.fake_samples != DEFAULT_FAKE_SAMPLES:
        raise DataError(
            f"{name} is not made up: its number of samples is its own",
            where="data.fake_samples",
            hint="leave data.fake_samples out (only the set 'fake' can be given one)",
        )


def require_no_places(request: Request, name: str) -> None:
    """Raise `DataError` where `request` names files for a set that has none."""
    for key, places in (("train", request.train), ("val", request.val)):
        if places:
            raise DataError(
                f"{name} reads no files, so {', '.join(map(repr, places))} would be ignored",
                where=f"data.{key}",
                hint=f"leave data.{key} out, or name another set in data.name",
            )
