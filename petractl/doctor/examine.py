"""Everything that the doctor looks at, in order, one after another: what is found is told at once."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from petractl.doctor.check import Check, Status
from petractl.doctor.datasets import check_datasets
from petractl.doctor.disk import check_disk, check_shared_memory
from petractl.doctor.machine import check_gpus, check_python, check_torch
from petractl.doctor.messages import check_messages
from petractl.doctor.tracking import check_tracking


def examine(*, directory: Path, uri: str, data: Sequence[str]) -> Iterator[Check]:
    """Yield what is found: machine, messages between processes, disk, tracking, data.

    `directory` is where runs are made, `uri` the tracking server ("": the store in `directory`), `data` the
    known sets that must be there (none: all are looked for).
    """
    yield check_python()
    torch_found = check_torch()
    yield torch_found
    if torch_found.status is not Status.FAILURE:
        yield from _check_devices()
    yield check_disk(directory)
    yield check_shared_memory()
    yield check_tracking(uri, directory=directory)
    if torch_found.status is not Status.FAILURE:
        yield from check_datasets(data)


def _check_devices() -> Iterator[Check]:
    found, gpus = check_gpus()
    yield found
    yield check_messages("gloo")
    if gpus:
        yield check_messages("nccl", processes=min(gpus, 2))
