"""How often processes start again, and after what; no process is started here."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from petractl import launch
from petractl.errors import RunError, UserError
from petractl.processes import WorkersFailed
from petractl.run_folder import RunFolder
from petractl.tracking.journal import JOURNAL_NAME, read_journal
from petractl.worker import Start

STARTED = '{"event":"run_started","time":1.0,"recipe_name":"x"}\n'


class Workers:
    """Stands for the processes: each start writes what a session would, then ends as it is told to."""

    def __init__(self, folder: Path, *ends: int | Exception) -> None:
        self.starts: list[Start] = []
        self.shutdowns: list[float] = []
        self._folder, self._ends = folder, list(ends)

    def __call__(self, command, *, titles, log_dir, environment, shutdown_s) -> int:
        self.starts.append(Start.from_json(environment["PETRACTL_START"]))
        self.shutdowns.append(shutdown_s)
        with (self._folder / JOURNAL_NAME).open("a") as journal:
            journal.write(STARTED)
        end = self._ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end


def died(can_restart: bool = True) -> WorkersFailed:
    return WorkersFailed("stage 1 (rank 1) was killed by SIGKILL", can_restart=can_restart)


@pytest.fixture
def train(tmp_path: Path, monkeypatch):
    """Return a function that trains with so many restarts allowed, by workers that end as given."""

    def start(most: int, *ends: int | Exception, stop_deadline: float = 5.0) -> tuple[int, Workers]:
        folder = RunFolder(tmp_path)
        workers = Workers(tmp_path, *ends)
        monkeypatch.setattr(launch, "run_workers", workers)
        first = Start(str(tmp_path), "x", num_places=2, num_replicas=1, info={}, warnings=[["k", "w", "h"]])
        recipe = SimpleNamespace(
            engine=SimpleNamespace(max_restarts=most), run=SimpleNamespace(stop_deadline=stop_deadline)
        )
        ready = SimpleNamespace(folder=folder, start=first, plan=SimpleNamespace(recipe=recipe), built=None)
        return launch._train(ready, interrupts=None), workers

    return start


def events(folder: Path) -> list[str]:
    return [str(record["event"]) for record in read_journal(folder)]


def test_processes_start_again_until_they_are_done_and_warnings_are_told_once(
    train, tmp_path, capsys
) -> None:
    code, workers = train(3, died(), died(), 0)
    assert code == 0
    again = ["run_started", "run_failed", "run_restarted"]
    assert events(tmp_path) == [*again, *again, "run_started"]
    assert [start.warnings for start in workers.starts] == [[["k", "w", "h"]], [], []]
    assert "restart 2 of 3: stage 1 (rank 1) was killed by SIGKILL" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("most", "end"), [(0, died()), (3, died(can_restart=False)), (3, RunError("cannot be killed"))]
)
def test_what_must_not_start_again_ends_the_run_and_is_journalled(train, tmp_path, most: int, end) -> None:
    with pytest.raises(type(end)):
        train(most, end)
    assert events(tmp_path) == ["run_started", "run_failed"]


def test_restarts_are_used_up(train, tmp_path) -> None:
    with pytest.raises(WorkersFailed):
        train(1, died(), died())
    assert events(tmp_path) == ["run_started", "run_failed", "run_restarted", "run_started", "run_failed"]


def test_an_interruption_and_a_user_s_error_are_final(train, tmp_path) -> None:
    assert train(3, 130)[0] == 130
    with pytest.raises(UserError):
        train(3, UserError("no such data"))
    assert "run_restarted" not in events(tmp_path)


def test_an_interruption_while_nothing_runs_says_how_to_go_on(train, tmp_path, monkeypatch, capsys) -> None:
    def interrupted(*_: object, **__: object) -> Start:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "restarted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(3, died())
    assert capsys.readouterr().err == f"hint: continue with: petractl resume {tmp_path}\n"


def test_without_room_in_the_journal_they_start_again_all_the_same(train, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("petractl.restarts.Journal", refuses)
    assert train(1, died(), 0)[0] == 0


def refuses(*_: object) -> None:
    raise RunError("the journal cannot be written")


@pytest.mark.parametrize(("deadline", "shutdown_s"), [(0.0, 15.0), (60.0, 75.0)])
def test_processes_that_stop_may_take_as_long_as_they_are_given(
    train, deadline: float, shutdown_s: float
) -> None:
    assert train(0, 0, stop_deadline=deadline)[1].shutdowns == [shutdown_s]
