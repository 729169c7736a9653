"""Checkpoints: a folder of safetensors named by unit, and a manifest with checksums that commits them.

Everything is written to a temporary folder and synced; renaming that folder is the last step, so that a
checkpoint exists whole or not at all. In a run of several processes each writes what lives in it and then
announces that in a file beside it: so threads can write while the processes train, and nobody needs a
message. Loading runs no code: tensors are safetensors, the rest is JSON.

    epoch-0003                        after three epochs
    epoch-0004-microbatch-000512      in the fourth, after 512 of its microbatches
        manifest.json                 what belongs to it, checksums, plain values
        model[.stage-NN].safetensors  parameters and buffers; so "optimizer", "auxiliary"
        pipeline.stage-NN[.replica-N].safetensors
                                      of one stage in the middle of an epoch: what is in flight, open averages

Parameters, buffers and the state of optimisers have the names of units, never of stages, so that a run can go
on with another partition. What is in flight belongs to its stage.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from petractl.errors import NotSaved, RunError

FORMAT = 2
READABLE = (1, 2)
MANIFEST = "manifest.json"
PIPELINE = "pipeline"
_OWN_SUM = "sha256"

_NAME = re.compile(r"epoch-([0-9]{1,9})(?:-microbatch-([0-9]{1,12}))?")
_PART = re.compile(r"part-[0-9]{5}\.json")
_WRITING, _REPLACED, _REMOVING = ".writing-", ".replaced-", ".removing-"


@dataclass(frozen=True, slots=True, order=True)
class Moment:
    """Where in training: whole epochs, and microbatches (rows, with replicas) of the next one."""

    epochs: int
    microbatches: int = 0

    @property
    def folder_name(self) -> str:
        """What its checkpoint is called."""
        if not self.microbatches:
            return f"epoch-{self.epochs:04d}"
        return f"epoch-{self.epochs + 1:04d}-microbatch-{self.microbatches:06d}"

    @classmethod
    def of(cls, path: Path) -> "Moment | None":
        """Return the moment of a checkpoint's folder; None if it is something else."""
        found = _NAME.fullmatch(path.name)
        if found is None:
            return None
        return cls(int(found[1])) if found[2] is None else cls(int(found[1]) - 1, int(found[2]))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint: groups of tensors by name ("model", "optimizer"), and plain values.

    `pipelines` are the tensors of stages in the middle of an epoch, by "stage-NN" or "stage-NN.replica-N".
    """

    path: Path
    epoch: int
    tensors: Mapping[str, dict[str, Tensor]]
    state: Mapping[str, Any]
    microbatches: int = 0
    pipelines: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def moment(self) -> Moment:
        """Where in training it was made."""
        return Moment(self.epoch, self.microbatches)


class Draft:
    """A checkpoint in the making: each process writes its tensors and announces them, one commits all of it.

    `token` parts attempts to make the same checkpoint; all processes of a run have the same. Raises
    `RunError` where the disk refuses; older checkpoints are untouched.
    """

    def __init__(self, folder: Path, *, moment: Moment, token: str = "") -> None:
        self.target = folder / moment.folder_name
        self._folder = folder
        self._moment = moment
        self._temporary = folder / f"{_WRITING}{self.target.name}{token and '-'}{token}"

    def write(self, tensors: Mapping[str, Mapping[str, Tensor]], *, part: str = "") -> dict[str, str]:
        """Write groups of tensors and return the checksums of their files.

        `part` parts the files of several processes, or stages.
        """
        sums = {}
        with self._refusals_told():
            self._temporary.mkdir(parents=True, exist_ok=True)
            for group, named in tensors.items():
                path = self._temporary / f"{group}{f'.{part}' if part else ''}.safetensors"
                save_file(_apart(named), path)
                path.chmod(0o666 & ~_umask())  # for whoever may read the rest of the run folder
                sums[path.name] = _sha256(path)
                _sync(path)
        return sums

    def announce(self, rank: int, record: Mapping[str, Any]) -> None:
        """Tell who commits that this process has written everything; `record` is plain values."""
        with self._refusals_told():
            self._temporary.mkdir(parents=True, exist_ok=True)
            path = self._temporary / f"part-{rank:05d}.json"
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(json.dumps(record))
            unfinished.rename(path)

    def announced(self, count: int) -> list[dict[str, Any]] | None:
        """Return what all `count` processes have announced, by rank; None while one is missing."""
        paths = [self._temporary / f"part-{rank:05d}.json" for rank in range(count)]
        if not all(path.is_file() for path in paths):
            return None
        with self._refusals_told():
            return [json.loads(path.read_text()) for path in paths]

    def commit(self, files: Mapping[str, str], *, state: Mapping[str, Any]) -> Path:
        """Write the manifest over these files and put the checkpoint in its place; returns that."""
        with self._refusals_told():
            missing = [name for name in files if not (self._temporary / name).is_file()]
            if missing:
                raise FileNotFoundError(f"{missing[0]} is not there")
            for path in self._temporary.iterdir():
                if _PART.fullmatch(path.name):
                    path.unlink()
            body = {
                "format": FORMAT,
                "epoch": self._moment.epochs,
                "microbatches": self._moment.microbatches,
                "files": dict(files),
                "state": dict(state),
            }
            manifest = {**body, _OWN_SUM: _digest(body)}
            # On one line: with an indent Python would encode it itself, and hold up the training thread.
            (self._temporary / MANIFEST).write_text(json.dumps(manifest) + "\n")
            _sync(self._temporary / MANIFEST)
            _sync(self._temporary)
            self._put_in_place()
        return self.target

    def _put_in_place(self) -> None:
        """Rename the folder; an older one of the same name, damaged or of another try, goes first."""
        replaced = self._folder / f"{_REPLACED}{self.target.name}"
        shutil.rmtree(replaced, ignore_errors=True)
        if self.target.exists():
            self.target.rename(replaced)
        self._temporary.rename(self.target)
        _sync(self._folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def discard(self) -> None:
        """Give up: delete what is written so far."""
        shutil.rmtree(self._temporary, ignore_errors=True)

    @contextmanager
    def _refusals_told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise NotSaved(
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
    draft = Draft(folder, moment=Moment(epoch))
    try:
        return draft.commit(draft.write(tensors), state=state)
    except BaseException:
        draft.discard()
        raise


def discard_unfinished(folder: Path) -> None:
    """Delete what processes that were killed have left of checkpoints; put back what one was replacing."""
    for path in (*folder.glob(f"{_WRITING}*"), *folder.glob(f"{_REMOVING}*")):
        shutil.rmtree(path, ignore_errors=True)
    for path in sorted(folder.glob(f"{_REPLACED}*")):
        target = folder / path.name.removeprefix(_REPLACED)
        if target.exists() or Moment.of(target) is None:
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(target)


def load_checkpoint(
    path: Path,
    *,
    wanted: Callable[[str], bool] | None = None,
    pipeline: Callable[[str], bool] = lambda part: True,
) -> Checkpoint:
    """Read a checkpoint after checking its files against the manifest.

    With `wanted` only those tensors, and of the files only those that have one; `pipeline` chooses the stages
    whose messages and open averages are read.

    Raises:
        RunError: a file is missing, damaged or not of this format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        _check_manifest(path, manifest)
        tensors: dict[str, dict[str, Tensor]] = {}
        pipelines: dict[str, dict[str, Tensor]] = {}
        for name, expected in manifest["files"].items():
            group, _, part = name.removesuffix(".safetensors").partition(".")
            if Path(name).name != name:
                raise _damaged(path, f"{name} is not what the manifest says")
            if not (path / name).is_file():
                raise _damaged(path, f"{name} is missing")
            if group == PIPELINE:
                if pipeline(part):
                    pipelines[part] = _read(path, name, expected, None)
            else:
                tensors.setdefault(group, {}).update(_read(path, name, expected, wanted))
        epoch, microbatches = int(manifest["epoch"]), int(manifest.get("microbatches", 0))
        state = manifest["state"]
        if not isinstance(state, dict) or Moment(epoch, microbatches) != Moment.of(path):
            raise _damaged(path, "its manifest is another checkpoint's")
        return Checkpoint(path, epoch, tensors, state, microbatches, pipelines)
    except (OSError, SafetensorError, *_WRONG_VALUES) as error:
        raise _damaged(path, f"it cannot be read ({type(error).__name__}: {error})") from error


_WRONG_VALUES = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Take the manifest's own checksum out of it, and check it and the format; the first one had none."""
    told, found = manifest.pop(_OWN_SUM, None), manifest["format"]
    if told != (None if found == 1 else _digest(manifest)):
        raise _damaged(path, f"its {MANIFEST} is not what was written")
    if found not in READABLE:
        raise _of_another_version(path, found)


def _digest(body: Mapping[str, Any]) -> str:
    # As it is read again: keys are texts, and JSON keeps every number.
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read(path: Path, name: str, expected: str, wanted: Callable[[str], bool] | None) -> dict[str, Tensor]:
    """Return a file's tensors, or those wanted; a file that has none of these is not looked at further."""
    if wanted is not None and not _has_any(path / name, wanted):
        return {}
    if _sha256(path / name) != expected:
        raise _damaged(path, f"{name} is not what the manifest says")
    with safe_open(path / name, framework="pt") as file:
        keys = [key for key in file.keys() if wanted is None or wanted(key)]  # noqa: SIM118
        return {key: file.get_tensor(key) for key in keys}


def checkpoint_paths(folder: Path) -> list[Path]:
    """Return the committed checkpoints, oldest first."""
    found = [(Moment.of(path), path) for path in folder.glob("epoch-*") if path.is_dir()]
    return [path for _, path in sorted((moment, path) for moment, path in found if moment is not None)]


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[RunError]]:
    """Return the newest checkpoint that is whole, and what is wrong with newer ones."""
    errors: list[RunError] = []
    for path in reversed(checkpoint_paths(folder)):
        try:
            return load_checkpoint(path), errors
        except RunError as error:
            errors.append(error)
    return None, errors


def prune_checkpoints(
    folder: Path,
    *,
    newest: Moment,
    keep_last: int,
    best_epoch: int | None,
    keep: Sequence[Path] = (),
) -> None:
    """Delete all but the best and the last `keep_last` up to `newest`, the one just saved, and `keep`.

    Later ones are damaged, else the run would have gone on from there: they will be written anew, and until
    then they must not push out those that are whole.
    """
    paths = [path for path in checkpoint_paths(folder) if (Moment.of(path) or newest) <= newest]
    kept = {path.name for path in (*paths[-keep_last:], *keep)} | {Moment(best_epoch or 0).folder_name}
    for path in paths:
        if path.name not in kept:
            # Under another name first: an interrupted deletion leaves no half checkpoint behind.
            going = folder / f"{_REMOVING}{path.name}"
            shutil.rmtree(going, ignore_errors=True)
            with suppress(OSError):
                path.rename(going)
            shutil.rmtree(going, ignore_errors=True)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that a file can hold: in order, and none in the memory of another."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        dense = tensor.detach().contiguous()
        storage = dense.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != dense.nbytes:
            dense = dense.clone()
        seen.add(dense.untyped_storage().data_ptr())
        apart[name] = dense
    return apart


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


class OtherVersion(RunError):  # noqa: N818 (what it is is the name)
    """A checkpoint that another version of petractl has made: it is not damaged, and nothing replaces it."""


def _of_another_version(path: Path, found: object) -> OtherVersion:
    return OtherVersion(
        f"its format is {found}, and this version of petractl reads up to {FORMAT}",
        where=str(path),
        hint="a newer petractl made it: go on with that one",
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
