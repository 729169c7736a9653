"""Checkpoints: a folder of safetensors named by unit, and a manifest with checksums that commits them.

Everything is written to a temporary folder and synced; renaming that folder is the last step, so that a
checkpoint exists whole or not at all. In a run of several processes each writes the tensors of its stages.
Loading runs no code: tensors are safetensors, the rest is JSON. Names are those of units, never of stages, so
that a run can go on with another partition.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from petractl.errors import RunError

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint: groups of tensors by name ("model", "optimizer"), and plain values."""

    path: Path
    epoch: int
    tensors: Mapping[str, dict[str, Tensor]]
    state: Mapping[str, Any]


class Draft:
    """A checkpoint in the making: one process begins it, each writes its tensors, one commits all of it.

    Raises `RunError` where the disk refuses; older checkpoints are untouched.
    """

    def __init__(self, folder: Path, *, epoch: int) -> None:
        self.target = folder / f"epoch-{epoch:04d}"
        self._folder = folder
        self._epoch = epoch
        self._temporary = folder / f".writing-{self.target.name}"

    def begin(self) -> None:
        """Make room for it."""
        with self._refusals_told():
            self._folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary.mkdir()

    def write(self, tensors: Mapping[str, Mapping[str, Tensor]], *, part: str = "") -> dict[str, str]:
        """Write groups of tensors and return the checksums of their files.

        `part` parts the files of several processes.
        """
        sums = {}
        with self._refusals_told():
            for group, named in tensors.items():
                path = self._temporary / f"{group}{f'.{part}' if part else ''}.safetensors"
                save_file({key: value.detach().contiguous() for key, value in named.items()}, path)
                path.chmod(0o666 & ~_umask())  # for whoever may read the rest of the run folder
                sums[path.name] = _sha256(path)
                _sync(path)
        return sums

    def commit(self, files: Mapping[str, str], *, state: Mapping[str, Any]) -> Path:
        """Write the manifest over these files and put the checkpoint in its place; returns that."""
        with self._refusals_told():
            manifest = {"format": FORMAT, "epoch": self._epoch, "files": dict(files), "state": dict(state)}
            (self._temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            _sync(self._temporary / MANIFEST)
            _sync(self._temporary)
            shutil.rmtree(self.target, ignore_errors=True)
            self._temporary.rename(self.target)
            _sync(self._folder)
        return self.target

    def discard(self) -> None:
        """Give up: delete what is written so far."""
        shutil.rmtree(self._temporary, ignore_errors=True)

    @contextmanager
    def _refusals_told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"the checkpoint could not be written: {error}",
                where=str(self.target),
                hint="make room or give a folder that can be written; earlier checkpoints are as they were",
            ) from error


def save_checkpoint(
    folder: Path, *, epoch: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Write `folder/epoch-NNNN` and return it.

    Raises:
        RunError: the disk refuses; older checkpoints are untouched.
    """
    draft = Draft(folder, epoch=epoch)
    try:
        draft.begin()
        return draft.commit(draft.write(tensors), state=state)
    except BaseException:
        draft.discard()
        raise


def load_checkpoint(path: Path, *, wanted: Callable[[str], bool] | None = None) -> Checkpoint:
    """Read a checkpoint after checking its files against the manifest.

    With `wanted` only those tensors, and of the files only those that have one.

    Raises:
        RunError: a file is missing, damaged or not of this format.
    """
    everything, wanted = wanted is None, wanted or (lambda name: True)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise _damaged(path, f"its format is {manifest['format']}, this version reads {FORMAT}")
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, expected in manifest["files"].items():
            if Path(name).name != name:
                raise _damaged(path, f"{name} is not what the manifest says")
            group = tensors.setdefault(name.split(".")[0], {})
            if not (path / name).is_file():
                raise _damaged(path, f"{name} is missing")
            if not everything and not _has_any(path / name, wanted):
                continue
            if _sha256(path / name) != expected:
                raise _damaged(path, f"{name} is not what the manifest says")
            with safe_open(path / name, framework="pt") as file:
                group |= {key: file.get_tensor(key) for key in file.keys() if wanted(key)}  # noqa: SIM118
        return Checkpoint(path, int(manifest["epoch"]), tensors, manifest["state"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise _damaged(path, f"it cannot be read ({type(error).__name__}: {error})") from error


def checkpoint_paths(folder: Path) -> list[Path]:
    """Return the committed checkpoints, oldest first."""
    found = [path.parent for path in folder.glob("epoch-*/" + MANIFEST)]
    return sorted((path for path in found if _epoch(path) is not None), key=lambda path: _epoch(path) or 0)


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[RunError]]:
    """Return the newest checkpoint that is whole, and what is wrong with newer ones."""
    errors: list[RunError] = []
    for path in reversed(checkpoint_paths(folder)):
        try:
            return load_checkpoint(path), errors
        except RunError as error:
            errors.append(error)
    return None, errors


def prune_checkpoints(folder: Path, *, newest_epoch: int, keep_last: int, best_epoch: int | None) -> None:
    """Delete all but the best and the last `keep_last` up to `newest_epoch`, the one just saved.

    Later ones are damaged, else the run would have gone on from there: they will be written anew, and until
    then they must not push out those that are whole.
    """
    paths = [path for path in checkpoint_paths(folder) if (_epoch(path) or 0) <= newest_epoch]
    kept = {path.name for path in paths[-keep_last:]} | {f"epoch-{best_epoch or 0:04d}"}
    for path in paths:
        if path.name not in kept:
            # Without its manifest a folder is no checkpoint: an interrupted deletion leaves no half one
            # behind.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def _epoch(path: Path) -> int | None:
    digits = path.name.removeprefix("epoch-")
    return int(digits) if digits.isdecimal() else None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _has_any(path: Path, wanted: Callable[[str], bool]) -> bool:
    with safe_open(path, framework="pt") as file:
        return any(wanted(key) for key in file.keys())  # noqa: SIM118


def _damaged(path: Path, what: str) -> RunError:
    return RunError(
        what, where=str(path), hint="`petractl resume` goes on from an earlier one, if one is whole"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
