"""Whether the named data sets are where recipes look for them. Nothing is decoded or downloaded."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from petractl.doctor.check import Check, failure, ok, warning
from petractl.errors import DataError


def check_datasets(asked: Sequence[str]) -> Iterator[Check]:
    """Look for the data sets asked for, which must be there; for all of them if none is."""
    from petractl.data import list_datasets

    for name in asked or list_datasets():
        yield check_dataset(name, is_needed=bool(asked))


def check_dataset(name: str, *, is_needed: bool) -> Check:
    """Look for a data set; one that is missing is a failure where it `is_needed`, else a warning."""
    from petractl.data import describe_data
    from petractl.data.download import SetMissing

    title = f"data {name}"
    try:
        info = describe_data(name, train="", val="")
    except SetMissing as error:
        what = f"not found; a recipe that names no other place looks in {Path('data', name).absolute()}"
        return (failure if is_needed else warning)(title, what, error.hint)
    except DataError as error:
        what = f"{error.where}: {error.what}" if error.where else error.what
        return (failure if is_needed else warning)(title, what, error.hint)
    return ok(title, f"{_count(info.train_samples)} + {_count(info.val_samples)} images, {_place(name)}")


def _count(samples: int) -> str:
    return f"{samples:,}" if samples >= 0 else "uncounted"


def _place(name: str) -> str:
    from petractl.recipe.schema import DATASETS_WITHOUT_FILES

    return "no files needed" if name in DATASETS_WITHOUT_FILES else f"in {Path('data', name).absolute()}"
