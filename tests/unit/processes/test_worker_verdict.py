"""Who is to blame: every case made by hand, no process."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from petractl.errors import RunError, UserError
from petractl.processes.report import Kind, Report
from petractl.processes.verdict import Ending, WorkersFailed, exit_code


def done(rank: int) -> Ending:
    return Ending(title=f"stage {rank}", rank=rank, exit_code=0, seen_at=9.0)


def killed(rank: int, *, at: float, by: int = signal.SIGKILL, stopped: bool = False) -> Ending:
    return Ending(title=f"stage {rank}", rank=rank, exit_code=-by, seen_at=at, was_stopped=stopped)


def told(
    rank: int,
    kind: Kind,
    *,
    at: float,
    what: str = "",
    waiting_for: int | None = None,
    stopped: bool = False,
    explained: bool = True,
    stands: bool = False,
    stacks: str = "",
) -> Ending:
    report = Report(
        kind=kind,
        title=f"stage {rank}",
        rank=rank,
        what=what or kind,
        time=at,
        waiting_for=waiting_for,
        explained=explained,
        stands=stands,
        traceback="Traceback (most recent call last):\n  own\n",
        hint="do this",
    )
    return Ending(
        title=f"stage {rank}",
        rank=rank,
        exit_code=report.exit_code,
        seen_at=at + 0.1,
        report=report,
        was_stopped=stopped,
        stacks=stacks,
    )


def message(endings: list[Ending], *, interrupted_at: float | None = None) -> list[str]:
    with pytest.raises(RunError) as caught:
        exit_code(endings, interrupted_at=interrupted_at)
    return str(caught.value).splitlines()


def test_all_done_is_0() -> None:
    assert exit_code([done(0), done(1)]) == 0


def test_an_error_comes_first_with_its_traceback_though_others_report_before_it() -> None:
    lines = message(
        [told(0, "lost", at=1.0), told(1, "error", at=2.0, what="ValueError: bad", explained=False)]
    )
    assert lines[:3] == [
        "stage 1 (rank 1): ValueError: bad",
        "Traceback (most recent call last):",
        "  own",
    ]
    assert lines[3] == "stage 0 (rank 0): lost"


def test_what_explains_itself_has_no_traceback() -> None:
    lines = message([told(0, "error", at=1.0, what="out of memory"), done(1)])
    assert lines == ["stage 0 (rank 0): out of memory", "hint: do this"]


def test_of_two_errors_the_first_in_time_is_the_cause() -> None:
    lines = message([told(0, "error", at=2.0, what="late"), told(1, "error", at=1.0, what="early")])
    assert lines[:2] == ["stage 1 (rank 1): early", "stage 0 (rank 0): late"]


def test_a_kill_is_the_cause_though_it_is_seen_last() -> None:
    lines = message([told(0, "lost", at=1.0), told(1, "lost", at=1.1), killed(2, at=1.2)])
    assert lines[0] == "stage 2 (rank 2) was killed by SIGKILL"
    assert "out of memory" in lines[-1]


def test_a_fault_names_its_signal_and_where_it_stood() -> None:
    ending = killed(1, at=1.0, by=signal.SIGSEGV)
    stacks = (
        "main thread 0x00a1\nFatal Python error\n\n"
        "Thread 0x00b2 (most recent call first):\n  File other\n\n"
        "Current thread 0x00a1 (most recent call first):\n  File inner\n  File outer\n"
    )
    ending = Ending(title="stage 1", rank=1, exit_code=ending.exit_code, seen_at=1.0, stacks=stacks)
    assert message([done(0), ending]) == [
        "stage 1 (rank 1) was killed by SIGSEGV",
        "it stood here:",
        "  File inner",
        "  File outer",
    ]


def test_an_end_without_a_report_shows_its_last_words() -> None:
    ending = Ending(
        title="stage 1", rank=1, exit_code=3, seen_at=1.0, output="a\nImportError: x\n", log=Path("l")
    )
    assert message([done(0), ending]) == [
        "stage 1 (rank 1) ended with exit code 3 and left no report",
        "a",
        "ImportError: x",
        "hint: its log is l",
    ]


def test_the_users_error_is_one() -> None:
    with pytest.raises(UserError, match="no such file") as caught:
        exit_code([told(0, "lost", at=1.0), told(1, "user", at=2.0, what="no such file")])
    assert caught.value.what == "no such file\n(found by stage 1 (rank 1))"
    assert caught.value.hint == "do this"


def test_of_a_stall_the_one_that_is_silent_is_to_blame() -> None:
    victims = [told(0, "stalled", at=1.0, waiting_for=1), told(2, "stalled", at=1.1, waiting_for=1)]
    lines = message([victims[0], killed(1, at=4.0, stopped=True), victims[1], told(3, "lost", at=1.2)])
    assert lines[0] == "stage 1 (rank 1) did not go on: stage 0 (rank 0) and stage 2 (rank 2) waited for it"
    assert lines[1:4] == [
        "stage 0 (rank 0): stalled",
        "stage 2 (rank 2): stalled",
        "stage 3 (rank 3): lost",
    ]


def test_the_silent_one_is_found_behind_one_that_lost_its_neighbour() -> None:
    """Stage 2 waited for stage 1 too, but stage 3 gave up first and took it along."""
    endings = [
        told(0, "lost", at=1.3),
        told(1, "interrupted", at=4.0, stopped=True),
        told(2, "lost", at=1.1),
        told(3, "stalled", at=1.0, waiting_for=2),
    ]
    assert message(endings)[0] == "stage 1 (rank 1) did not go on: stage 3 (rank 3) waited for it"


def test_a_circle_of_waiting_blames_the_first_to_say_so() -> None:
    endings = [
        told(0, "stalled", at=1.0, waiting_for=1, what="has waited for stage 1"),
        told(1, "stalled", at=1.1, waiting_for=0),
    ]
    assert message(endings)[0] == "stage 0 (rank 0): has waited for stage 1"


def test_a_chain_of_waiting_ends_at_the_cause() -> None:
    endings = [
        told(0, "stalled", at=1.0, waiting_for=1),
        told(1, "stalled", at=1.1, waiting_for=2),
        told(2, "lost", at=1.2),
    ]
    assert message(endings)[0] == "stage 2 (rank 2) did not go on: stage 1 (rank 1) waited for it"


def test_what_a_stopped_worker_says_is_not_the_cause_of_a_stall() -> None:
    endings = [told(0, "stalled", at=1.0, waiting_for=1), told(1, "error", at=4.0, stopped=True)]
    assert message(endings)[0].startswith("stage 1 (rank 1) did not go on")


def test_an_error_that_was_being_told_when_the_worker_was_stopped_outweighs_lost_neighbours() -> None:
    endings = [told(0, "error", at=4.0, what="disk", stopped=True), told(1, "lost", at=1.0)]
    assert message(endings)[0] == "stage 0 (rank 0): disk"


def test_only_lost_neighbours_is_a_failure_too() -> None:
    assert message([told(0, "lost", at=1.0), told(1, "lost", at=1.1)])[0] == "stage 0 (rank 0): lost"


def test_an_interruption_is_130() -> None:
    endings = [
        told(0, "interrupted", at=2.0, stopped=True),
        killed(1, at=2.0, by=signal.SIGTERM, stopped=True),
    ]
    assert exit_code(endings, interrupted_at=1.0) == 130


def test_rank_0_that_was_done_all_the_same_is_0() -> None:
    assert exit_code([done(0), killed(1, at=2.0, by=signal.SIGTERM, stopped=True)], interrupted_at=1.0) == 0


def test_what_fails_after_an_interruption_is_no_failure() -> None:
    endings = [
        told(0, "interrupted", at=2.0, stopped=True),
        told(1, "error", at=1.5),
        told(2, "lost", at=1.4),
    ]
    assert exit_code(endings, interrupted_at=1.0) == 130


def test_who_could_not_save_at_an_interruption_is_told_and_not_started_again() -> None:
    endings = [
        told(0, "interrupted", at=2.0, stopped=True),
        told(1, "error", at=1.5, what="the disk is full", stands=True),
    ]
    with pytest.raises(WorkersFailed, match="the disk is full") as caught:
        exit_code(endings, interrupted_at=1.0)
    assert not caught.value.can_restart


def test_what_failed_before_an_interruption_is_told() -> None:
    endings = [told(0, "interrupted", at=2.0, stopped=True), told(1, "error", at=0.5, what="bad")]
    assert message(endings, interrupted_at=1.0)[0] == "stage 1 (rank 1): bad"


def test_a_worker_that_alone_is_told_to_stop_interrupts_the_run() -> None:
    """A scheduler signals every process of a job, in any order."""
    endings = [told(0, "interrupted", at=2.0), told(1, "lost", at=1.9)]
    assert exit_code(endings) == 130


def test_a_worker_that_a_scheduler_stopped_before_it_could_answer_is_no_failure() -> None:
    assert (
        exit_code([told(0, "interrupted", at=2.0), killed(1, at=0.9, by=signal.SIGTERM)], interrupted_at=1.0)
        == 130
    )


@pytest.mark.parametrize(
    ("ending", "can_restart"),
    [
        (killed(1, at=1.0), True),
        (Ending(title="stage 1", rank=1, exit_code=3, seen_at=1.0), True),
        (told(1, "stalled", at=1.0, waiting_for=1), True),
        (told(1, "lost", at=1.0), True),
        (told(1, "error", at=1.0, explained=False), True),
        (told(1, "error", at=1.0, what="out of memory"), False),
    ],
)
def test_what_a_stage_knows_the_reason_of_is_not_tried_again(ending: Ending, can_restart: bool) -> None:
    with pytest.raises(WorkersFailed) as caught:
        exit_code([told(0, "lost", at=2.0), ending])
    assert caught.value.can_restart == can_restart


def test_who_was_told_to_stop_is_not_started_again() -> None:
    with pytest.raises(WorkersFailed) as caught:
        exit_code([told(0, "interrupted", at=2.0), killed(1, at=1.0)], interrupted_at=2.0)
    assert not caught.value.can_restart
