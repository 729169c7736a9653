"""How far a sweep is, on stderr: a line as a cell begins and ends, and on a terminal a bar below them."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from petractl.sweep.cells import Cell

_NAMES_SHOWN = 3

Say = Callable[[str], None]


class SweepProgress:
    """Tells what becomes of the cells; `refresh` writes the table, `look` looks after MLflow."""

    def __init__(
        self,
        places: "dict[str, int]",
        *,
        logs: Path,
        say: Say,
        show: Callable[[int, Sequence[str]], None],
        refresh: "Callable[[Sequence[str], dict[str, str]], None]",
        look: Callable[[], None],
    ) -> None:
        self._places = places
        self._logs = logs
        self._say = say
        self._show = show
        self._refresh = refresh
        self._look = look
        self._at_work: list[str] = []
        self._failures: dict[str, str] = {}
        self._done = 0

    def began(self, cell: "Cell") -> None:
        """Tell that a cell is being run."""
        record = cell.record()
        self._at_work.append(cell.name)
        how = "started"
        if record.epochs_done:
            how = f"goes on after epoch {record.epochs_done} of {record.epochs}"
        self._tell(cell, how)
        self._show(self._done, self._at_work)

    def ended(self, cell: "Cell", failure: str) -> None:
        """Tell how a cell has ended."""
        self._at_work.remove(cell.name)
        self._done += 1
        if failure:
            self._failures[cell.name] = failure
            words = failure if failure == "interrupted" else f"failed: {failure} ({self._log(cell)})"
            self._tell(cell, words)
        else:
            self._tell(cell, _in_words(cell))
        self._show(self._done, self._at_work)
        self._refresh(self._at_work, self._failures)

    def passed(self, running: "Sequence[Cell]") -> None:
        """Look after MLflow."""
        self._look()

    def stopping(self, running: "Sequence[Cell]") -> None:
        """Tell that the cells that are running were told to stop."""
        if running:
            count = "1 cell" if len(running) == 1 else f"{len(running)} cells"
            self._say(f"stopping: {count} may save; once more to kill them")

    def _log(self, cell: "Cell") -> str:
        return str(self._logs / f"{cell.name}.log")

    def _tell(self, cell: "Cell", words: str) -> None:
        self._say(f"cell {self._places[cell.name]} of {len(self._places)}: {cell.name}: {words}")


def _in_words(cell: "Cell") -> str:
    record = cell.record()
    top1 = "" if record.last_top1 is None else f", top-1 {record.last_top1:.2f} %"
    time = "" if record.seconds is None else f" ({record.seconds:.0f} s)"
    return f"finished{top1}{time}"


@contextmanager
def progress_shown(total: int) -> "Iterator[tuple[Say, Callable[[int, Sequence[str]], None]]]":
    """Yield what says a line, and what shows how many cells have ended and which are at work."""
    if not sys.stderr.isatty():
        yield _write_line, lambda done, names: None
        return
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    columns = (
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.description}", markup=False),
    )
    with progress.Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=total)

        def show(done: int, names: Sequence[str]) -> None:
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            bars.update(task, completed=done, description="  ".join(names[:_NAMES_SHOWN]) + more)

        yield lambda line: console.print(line, markup=False, soft_wrap=True), show


def _write_line(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
