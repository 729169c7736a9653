"""A run that goes on by itself after one of its processes was killed, or failed.

All processes of a run start again together, from the last whole checkpoint: what the others did since then
belongs to messages that are lost. `petractl run` does it as often as `engine.max_restarts` allows; under
torchrun it is torchrun that starts them again. Either way the journal tells of it, between the failure and
the new beginning, and so nobody has to guess why an epoch stands in it twice.
"""

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from petractl import checkpoint
from petractl.engine.trainer import TrainingState
from petractl.errors import DataError, Problem, RunError
from petractl.events import (
    Event,
    RunFailed,
    RunFinished,
    RunInterrupted,
    RunRestarted,
    RunStarted,
    as_record,
)
from petractl.run_folder import RunFolder
from petractl.session import state_of
from petractl.tracking.journal import JOURNAL_NAME, Journal, read_journal
from petractl.tracking.masking import mask_credentials
from petractl.worker import Start

_SILENT = "its processes ended without a word"
_ENDS = (RunFinished.name, RunInterrupted.name, RunFailed.name)


_LATEST_S = 1e12  # seconds since 1970


@dataclass(frozen=True, slots=True)
class Told:
    """What the journal of a run tells: its recipe, when it began, and how its last session ended.

    `ending` is the last record of an end, None while there is none; `recipe_name` is "" and `began_s` None
    where no session has begun.
    """

    recipe_name: str = ""
    began_s: float | None = None
    ending: dict[str, object] | None = None

    @property
    def is_finished(self) -> bool:
        """Tell whether all epochs are done, and told."""
        return self.ending is not None and self.ending["event"] == RunFinished.name


def told_by_journal(folder: RunFolder) -> Told:
    """Return what the journal tells; one that is missing or damaged tells nothing."""
    told = Told()
    try:
        records = read_journal(folder.path / JOURNAL_NAME)
    except (DataError, OSError):
        return told
    for record in records:
        event, when = record.get("event"), record.get("time")
        if event == RunStarted.name:
            # A damaged journal may hold an integer that no float can.
            began_s = None
            if isinstance(when, (int, float)) and abs(when) < _LATEST_S:
                began_s = float(when)
            told = Told(
                recipe_name=told.recipe_name or str(record.get("recipe_name", "")),
                began_s=began_s if told.began_s is None else told.began_s,
            )
        elif event in _ENDS:
            told = replace(told, ending=record)
    return told


def note_failure(folder: RunFolder, error: BaseException | str) -> None:
    """Journal that a run has failed, where its own processes had no time to do so."""
    told = told_by_journal(folder)
    if told.began_s is None or told.ending is not None:
        return  # it has not begun, or has said how it ended
    what = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else error
    if isinstance(error, RunError):
        what = error.what
    _append(folder, RunFailed(message=mask_credentials(what)))


def restarted(start: Start, *, reason: str, restart: int, of: int) -> Start:
    """Return how the processes of a run start again; the journal and the terminal are told.

    Raises:
        RunError: there are checkpoints, but none of them is whole; or a newer one is of another version.
    """
    folder = RunFolder(Path(start.run_dir))
    saved, damaged = newest_whole_checkpoint(folder)
    state = state_of(saved)
    tell_restart(folder, state, reason=reason, restart=restart, of=of)
    return replace(
        start,
        checkpoint=str(saved.path) if saved is not None else "",
        is_new=False,
        warnings=[[w.key, w.what, w.hint] for w in lost_checkpoints(damaged, state)],
        resolved=folder.proposed,
    )


def tell_restart(folder: RunFolder, state: TrainingState, *, reason: str, restart: int, of: int) -> None:
    """Write into the journal, and to stderr, that all processes of a run start again."""
    first_line = mask_credentials(reason.splitlines()[0] if reason else _SILENT)
    event = RunRestarted(
        restart=restart,
        of=of,
        reason=first_line,
        epoch=state.epochs_done + 1,
        microbatch=state.microbatches_done,
    )
    _append(folder, event)
    sys.stderr.write(f"restart {restart} of {of}: {first_line}\nall processes go on {place_of(state)}\n")
    sys.stderr.flush()


def tell_restart_by_torchrun(folder: RunFolder, state: TrainingState, *, restart: int, of: int) -> None:
    """Tell that torchrun has started all processes again; the reason is what the journal has of it."""
    note_failure(folder, _SILENT)
    ending = told_by_journal(folder).ending or {}
    reason = str(ending.get("message") or ("it was told to stop" if ending else _SILENT))
    tell_restart(folder, state, reason=reason, restart=restart, of=of)


def newest_whole_checkpoint(folder: RunFolder) -> tuple[checkpoint.Checkpoint | None, list[RunError]]:
    """Return the newest whole checkpoint, None where there is none at all, and what is wrong with newer ones.

    Raises:
        RunError: there are checkpoints, but none of them is whole; or a newer one is of another version.
    """
    saved, damaged = checkpoint.newest_checkpoint(folder.checkpoints)
    for error in damaged:
        if isinstance(error, checkpoint.OtherVersion):
            raise error
    if saved is None and damaged:
        raise RunError(
            f"no checkpoint is whole: {'; '.join(f'{e.where}: {e.what}' for e in damaged)}",
            where=str(folder.path),
            hint=f"to train again from the start, delete {folder.checkpoints}",
        )
    return saved, damaged


def lost_checkpoints(damaged: Sequence[RunError], state: TrainingState) -> list[Problem]:
    """Return what a run that goes on has lost, and where it goes on instead."""
    return [Problem("", f"{error.where}: {error.what}: it goes on {place_of(state)}") for error in damaged]


def place_of(state: TrainingState) -> str:
    """Return in words where a run goes on."""
    if state.microbatches_done:
        return f"in epoch {state.epochs_done + 1}, after {state.microbatches_done} of its microbatches"
    return f"after epoch {state.epochs_done}" if state.epochs_done else "from the start"


def _append(folder: RunFolder, event: Event) -> None:
    """Append an event to a journal that nobody else is writing; without room for it, so be it."""
    with contextlib.suppress(OSError, RunError):
        journal = Journal(folder.path)
        try:
            journal.handle(event, as_record(event, time=time.time()))
        finally:
            journal.close()
