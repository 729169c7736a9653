"""The disk that runs are written to, and the memory that processes share.

A checkpoint is written, synced to the disk, renamed and locked: just that is done here, with a file that is
gone afterwards. The folder itself is not made; its nearest parent stands for it.
"""

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from petractl.doctor.check import Check, failure, ok, warning

SHARED_MEMORY = Path("/dev/shm")

_GIB = 2**30
_LITTLE_BYTES = 5 * _GIB
_TOO_LITTLE_BYTES = _GIB // 4
_SLOW_SYNC_S = 0.25
_SYNCED_BYTES = 2**20
_SYNCS = 5
_LITTLE_SHARED_BYTES = _GIB
_DISK, _SHARED = "disk", "shared memory"


def check_disk(directory: Path) -> Check:
    """Look at the folder of runs: whether it can be written, its room, and how fast it syncs."""
    place = nearest_folder(directory)
    if place is None:
        return failure(_DISK, f"{directory} is not a folder", "give another run.directory")
    try:
        sync_s = _try_out(place)
        free = shutil.disk_usage(place).free
    except OSError as error:
        what = f"{directory} cannot be written: {error.strerror or error}"
        return failure(_DISK, what, "give a folder of yours, on a disk with room: run.directory, or --dir")
    return judge_disk(directory, free=free, sync_s=sync_s)


def judge_disk(directory: Path, *, free: int, sync_s: float) -> Check:
    """Return what there is to say of so many free bytes, and of so long for a MiB to reach the disk."""
    what = f"{directory}: {free / _GIB:,.1f} GiB free, 1 MiB is on the disk in {1000 * sync_s:.1f} ms"
    if free < _TOO_LITTLE_BYTES:
        return failure(_DISK, what, "make room: checkpoints would fail")
    if free < _LITTLE_BYTES:
        return warning(_DISK, what, "make room, or keep fewer checkpoints (run.keep_last)")
    if sync_s > _SLOW_SYNC_S:
        return warning(
            _DISK, what, "slow: checkpoint more rarely (run.checkpoint_every), or use a local disk"
        )
    return ok(_DISK, what)


def check_shared_memory(place: Path = SHARED_MEMORY) -> Check:
    """Look at the memory through which workers that decode images, and NCCL, hand data over."""
    try:
        usage = shutil.disk_usage(place)
    except OSError as error:
        what = f"{place}: {error.strerror}"
        return warning(
            _SHARED, what, "workers that decode photographs need it: data.workers = 0 does without"
        )
    return judge_shared_memory(place, total=usage.total, free=usage.free)


def judge_shared_memory(place: Path, *, total: int, free: int) -> Check:
    """Return what there is to say of so many bytes."""
    what = f"{free / _GIB:,.2f} of {total / _GIB:,.2f} GiB free in {place}"
    if free >= _LITTLE_SHARED_BYTES:
        return ok(_SHARED, what)
    hint = "little for workers that decode photographs: docker run --shm-size=8g, or data.workers = 0"
    return warning(_SHARED, what, hint)


def nearest_folder(directory: Path) -> Path | None:
    """Return the folder itself or the nearest parent that is there, None where a file is in the way."""
    path = directory.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path if path.is_dir() else None


def _try_out(folder: Path) -> float:
    """Do what a checkpoint does; returns the median of seconds until a MiB is on the disk."""
    took = []
    with tempfile.TemporaryDirectory(prefix=".petractl-doctor-", dir=folder) as scratch:
        path = Path(scratch) / "written"
        for _ in range(_SYNCS):
            with path.open("wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.write(os.urandom(_SYNCED_BYTES))
                file.flush()
                started = time.perf_counter()
                os.fsync(file.fileno())
                took.append(time.perf_counter() - started)
            path.replace(path.with_suffix(".moved"))
    return sorted(took)[len(took) // 2]
