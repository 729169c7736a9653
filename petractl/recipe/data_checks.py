"""The checks of [data]: which keys a set has a use for, and which contradict each other."""

from collections.abc import Iterator, Sequence

from petractl.recipe.findings import Conflict, IdleKey, conflict, shown
from petractl.recipe.schema import (
    DATASET_NAMES,
    DATASETS_WITHOUT_FILES,
    DOWNLOADABLE_DATASETS,
    PHOTOGRAPH_DATASETS,
    Recipe,
)

PHOTOGRAPH_SIDE = 224

_PHOTOGRAPH_KEYS = (
    "resize",
    "crop",
    "crop_scale",
    "decoder",
    "shuffle_buffer",
    "image_entries",
    "label_entry",
    "on_error",
    "max_skipped",
    "cache",
    "allow_pipe",
)
_DATASETS_OF_KEY: dict[str, tuple[str, ...]] = {
    "train": tuple(name for name in DATASET_NAMES if name not in DATASETS_WITHOUT_FILES),
    "val": tuple(name for name in DATASET_NAMES if name not in DATASETS_WITHOUT_FILES),
    "download": DOWNLOADABLE_DATASETS,
    "image_size": (*PHOTOGRAPH_DATASETS, "fake"),
    "classes": (*PHOTOGRAPH_DATASETS, "fake"),
    "channels": ("fake",),
    "fake_samples": ("fake",),
    "augment": tuple(name for name in DATASET_NAMES if name != "fake"),
    **dict.fromkeys(_PHOTOGRAPH_KEYS, PHOTOGRAPH_DATASETS),
}
"""The keys of [data] that matter to some sets only, and those sets."""


def data_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """Yield the contradictions between keys of [data]."""
    data = recipe.data
    if data.name in DATASETS_WITHOUT_FILES:
        for key, value in (("train", data.train), ("val", data.val)):
            if value:
                yield conflict(
                    f'"{data.name}" reads no files, but {shown(value)} is given',
                    "take it out, or name the data set in data.name",
                    f"data.{key}",
                    "data.name",
                )
    if data.name in PHOTOGRAPH_DATASETS:
        yield from _photograph_conflicts(recipe)


def _photograph_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    data = recipe.data
    side = data.image_size or PHOTOGRAPH_SIDE
    # Without image_size a set of small images has a side of its own.
    if 0 < data.resize < side and (data.image_size or data.crop == "random-resized"):
        yield conflict(
            f"{data.resize} is less than the side of what is cut out of it, {side} (data.image_size)",
            f"give at least {side}, or 0 for the usual margin",
            "data.resize",
            "data.image_size",
            "data.crop",
            "data.name",
        )
    if data.resident and data.crop == "random-resized":
        yield conflict(
            '"random-resized" cuts from the whole photograph, but with data.resident = true '
            "images are kept at one size",
            'set data.crop = "pad" or "auto", or data.resident = false',
            "data.crop",
            "data.resident",
        )


def idle_data_keys(recipe: Recipe) -> Iterator[IdleKey]:
    """Yield the keys of [data] that have no effect in this recipe."""
    data = recipe.data
    for key, names in _DATASETS_OF_KEY.items():
        if data.name not in names:
            yield IdleKey(f"data.{key}", f"data.name = {shown(data.name)}", _listed(names))
    if data.name in DOWNLOADABLE_DATASETS and (data.train or data.val):
        place = "train" if data.train else "val"
        yield IdleKey("data.download", f"data.{place}", "sets in their usual place, data/<name>")
    if data.name in PHOTOGRAPH_DATASETS:
        yield from _idle_photograph_keys(recipe)


def _idle_photograph_keys(recipe: Recipe) -> Iterator[IdleKey]:
    data = recipe.data
    kept = "data.resident = true" if data.resident else ""
    padded = kept or ('data.crop = "pad"' if data.crop == "pad" else "")
    if not data.augment:
        yield IdleKey("data.crop", "data.augment = false", "data.augment = true")
        yield IdleKey("data.crop_scale", "data.augment = false", "data.augment = true")
    elif padded:
        yield IdleKey("data.crop_scale", padded, '"random-resized"')
    if kept:
        yield IdleKey("data.shuffle_buffer", kept, "sets that are not kept in memory")
    if data.on_error == "stop":
        yield IdleKey("data.max_skipped", 'data.on_error = "stop"', '"skip"')


def _listed(names: Sequence[str]) -> str:
    quoted = [f'"{name}"' for name in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)
