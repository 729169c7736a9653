"""The run folder: one run, all of its files, nothing of it anywhere else.

<directory>/<time>-<recipe>/
  recipe.toml       the recipe as given          environment.json   versions and machine
  resolved.toml     every key, cuts chosen       metrics.jsonl      the journal
  checkpoints/      last and best                plots/  logs/
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petractl.errors import RunError, UserError
from petractl.tracking.masking import mask_credentials

RECIPE = "recipe.toml"
RESOLVED = "resolved.toml"
RESUMING = ".resuming.toml"
ENVIRONMENT = "environment.json"
LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The places of a run's files."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def resolved(self) -> Path:
        """The recipe with every key, and the cuts that were chosen."""
        return self.path / RESOLVED

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder: two processes must not write one run.

        Raises:
            UserError: another process holds it, it cannot be written, or a link in it leads elsewhere.
        """
        self._check_links()
        try:
            opened = (self.path / LOCK).open("a")
        except OSError as error:
            raise UserError(
                f"cannot be written: {error.strerror or error}",
                where=str(self.path),
                hint="give a folder that can be written, or copy this one to such a place",
            ) from None
        with opened as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    "another process is training in this folder",
                    where=str(self.path),
                    hint="wait for it or stop it; it can be resumed then",
                ) from None
            yield

    def _check_links(self) -> None:
        """Refuse links that lead out of the folder: what is written, or deleted, would not be the run's.

        A folder that came from somebody else could have any file of the user's overwritten.
        """
        root = self.path.resolve()
        for folder, folders, files in os.walk(self.path):
            for name in (*folders, *files):
                path = Path(folder, name)
                if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
                    raise UserError(
                        "this link leads out of the run folder",
                        where=str(path),
                        hint="put the whole folder on the other disk instead: --dir, or run.directory",
                    )

    def write_start(self, *, recipe: str, resolved: str, environment: dict[str, Any]) -> None:
        """Write what is known before the first step.

        Raises:
            RunError: the folder cannot be written.
        """
        try:
            for name in ("checkpoints", "plots", "logs"):
                (self.path / name).mkdir(exist_ok=True)
            _write_text(self.path / RECIPE, recipe)
            (self.path / ENVIRONMENT).write_text(json.dumps(environment, indent=1) + "\n")
            self.write_resolved(resolved)
        except OSError as error:
            raise RunError(
                f"cannot be written: {error.strerror or error}",
                where=str(self.path),
                hint="give another folder with --dir, or make room",
            ) from error

    def write_resolved(self, text: str) -> None:
        """Replace resolved.toml in one step."""
        temporary = self.path / f".{RESOLVED}"
        _write_text(temporary, text)
        temporary.replace(self.resolved)

    def propose_resolved(self, text: str) -> None:
        """Write by what recipe a resumed run is to go on, beside the one that it has.

        Raises:
            RunError: the folder cannot be written.
        """
        try:
            _write_text(self.path / RESUMING, text)
        except OSError as error:
            raise RunError(
                f"cannot be written: {error.strerror or error}",
                where=str(self.path),
                hint="make room, or let it be written; the run is as it was",
            ) from error

    def adopt_resolved(self) -> None:
        """Put what was proposed in place of resolved.toml: the run goes on by it."""
        (self.path / RESUMING).replace(self.resolved)

    @property
    def proposed(self) -> str:
        """The name of the file by whose recipe the run is to go on."""
        return RESUMING if (self.path / RESUMING).is_file() else RESOLVED


def create_run_folder(directory: Path | None, *, parent: str, recipe_name: str) -> RunFolder:
    """Make the folder of a new run: `directory` itself, or `<parent>/<time>-<recipe>`.

    Raises:
        UserError: it exists and is not empty, or cannot be made.
    """
    _check_name(directory or Path(parent))
    try:
        if directory is None:
            return RunFolder(_new_folder(Path(parent), recipe_name))
        if directory.exists() and not directory.is_dir():
            raise UserError("this is a file", where=str(directory), hint="give a new folder with --dir")
        directory.mkdir(parents=True, exist_ok=True)
        occupied = any(directory.iterdir())
    except OSError as error:
        raise UserError(
            f"cannot be made: {error.strerror or error}",
            where=str(directory or parent),
            hint="give a folder that can be written, with --dir or run.directory",
        ) from None
    if occupied:
        raise UserError(
            "the folder is not empty",
            where=str(directory),
            hint=f"give a new one, or continue that run: petractl resume {directory}",
        )
    return RunFolder(directory)


def _check_name(path: Path) -> None:
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(
            "the folder's name is not UTF-8, and checkpoints could not be read there",
            where=ascii(str(path))[1:-1],
            hint="give another one with --dir or run.directory",
        ) from None


def open_run_folder(path: Path) -> RunFolder:
    """Return the folder of an existing run.

    Raises:
        UserError: there is none.
    """
    folder = RunFolder(path)
    if not folder.resolved.is_file() and (path / RECIPE).is_file():
        raise UserError(
            f"its {RESOLVED} is missing",
            where=str(path),
            hint=f"put it back, or train again: petractl run {path / RECIPE}",
        )
    if not folder.resolved.is_file():
        raise UserError(
            "this is no run folder" if path.is_dir() else "there is no such folder",
            where=str(path),
            hint=f"a run folder has a {RESOLVED}; `petractl ls runs` lists them",
        )
    return folder


def _write_text(path: Path, text: str) -> None:
    """Write a file of the run; where it holds a password, for the user's eyes only."""
    if mask_credentials(text) != text:
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8")


def _new_folder(parent: Path, recipe_name: str) -> Path:
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", recipe_name).strip(".-") or "run"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    parent.mkdir(parents=True, exist_ok=True)
    for count in range(1, 1000):
        path = parent / (f"{stamp}-{stem}" if count == 1 else f"{stamp}-{stem}-{count}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise UserError("a thousand runs began in this second", where=str(parent))
