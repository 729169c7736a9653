"""Sets that torchvision knows how to download: its addresses and checksums, our unpacking and reading.

torchvision's own readers are not used (they unpickle the CIFAR batches). A set is downloaded beside its place
and moved there when it is whole, under a lock, so that an interruption leaves nothing that looks like a set,
and processes on one machine download once.
"""

import contextlib
import fcntl
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

from petractl.errors import DataError


class SetMissing(DataError):  # noqa: N818 (what happened is the name)
    """The set is not where it was looked for (as opposed to: something is wrong with it)."""


def fetch(name: str, *, into: Path, is_there: Callable[[], bool]) -> None:
    """Download the set `name` into the folder `into`, unless `is_there` says that another process has.

    Raises `DataError` where that fails: no network, a wrong checksum, a full disk.
    """
    staging = into.parent / f".{into.name}.download"
    try:
        into.mkdir(parents=True, exist_ok=True)
        with _locked(into.parent / f".{into.name}.lock"):
            if is_there():
                return
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            # Standard output is for data: torchvision says there what it does.
            with contextlib.redirect_stdout(sys.stderr):
                _DOWNLOADS[name](staging)
            for path in sorted(staging.iterdir()):
                path.replace(into / path.name)
    except (OSError, RuntimeError, HTTPException, tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{name} could not be downloaded: {error}",
            where="data.download",
            hint=f"try again, or download it by hand into {into}",
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _cifar10(folder: Path) -> None:
    from torchvision.datasets import CIFAR10

    _archive(CIFAR10, folder)


def _cifar100(folder: Path) -> None:
    from torchvision.datasets import CIFAR100

    _archive(CIFAR100, folder)


def _archive(known: Any, folder: Path) -> None:
    from torchvision.datasets.utils import download_and_extract_archive

    download_and_extract_archive(
        known.url, str(folder), filename=known.filename, md5=known.tgz_md5, remove_finished=True
    )


def _fashion_mnist(folder: Path) -> None:
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.utils import download_url

    for filename, checksum in FashionMNIST.resources:
        download_url(FashionMNIST.mirrors[0] + filename, str(folder), filename=filename, md5=checksum)


_DOWNLOADS: dict[str, Callable[[Path], None]] = {
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "fashion-mnist": _fashion_mnist,
}
