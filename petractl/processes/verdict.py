"""How a group of workers ended, and which of them is to blame: a pure function of what each left behind.

When one process of a pipeline fails, all others lose a neighbour within milliseconds, and often report first.
So what counts is what happened, then when: an error of its own, or a death by a signal, comes before a stall,
and a stall before a lost connection. Of a stall the ones that report it are the victims: to blame is the one
that they wait for and that says nothing.
"""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from petractl.errors import RunError, UserError
from petractl.processes.report import EXIT_INTERRUPTED, Report

EndKind = Literal["done", "interrupted", "stopped", "user", "error", "killed", "exited", "stalled", "lost"]

# What outweighs what; within one line the first in time is the cause.
_WEIGHTS: dict[EndKind, float] = {"user": 3, "error": 3, "killed": 3, "exited": 3, "stalled": 2, "lost": 1}
_WEIGHT_OF_STOPPED = 1.5
_STOP_SIGNALS = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
_SHOWN_STACK_LINES = 12
_SHOWN_OUTPUT_LINES = 20
_LINE_LENGTH = 160

_LOST = re.compile(r"(.*?lost the (?:connection to .+? \(rank \d+\)|other processes)).*", re.DOTALL)


class WorkersFailed(RunError):  # noqa: N818 (what happened is the name)
    """A worker failed (exit code 1); `can_restart`: started again, the workers may well get further.

    They would not where a worker knows why it failed (no memory, no room on the disk, a loss that is not a
    number), and must not where they were told to stop.
    """

    def __init__(self, what: str, *, hint: str = "", can_restart: bool) -> None:
        self.can_restart = can_restart
        super().__init__(what, hint=hint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """The end of one worker, as its parent saw it.

    `exit_code` is negative for a signal. `was_stopped`: it ran until the parent ended it. `stacks` and
    `output` (what it wrote before it had a log) may be empty; `log` is None where there is none.
    """

    title: str
    rank: int
    exit_code: int
    seen_at: float
    report: Report | None = None
    was_stopped: bool = False
    stacks: str = ""
    output: str = ""
    log: Path | None = None

    @property
    def place(self) -> str:
        """The worker as people are told of it."""
        return f"{self.title} (rank {self.rank})"

    @property
    def kind(self) -> EndKind:
        """What kind of an end it was."""
        if self.exit_code == 0:
            return "done"
        if self.report is not None and self.report.kind != "interrupted":
            return self.report.kind
        if self.was_stopped:
            return "stopped"
        if self.report is not None or self.exit_code == EXIT_INTERRUPTED:
            return "interrupted"
        return "killed" if self.exit_code < 0 else "exited"

    @property
    def time(self) -> float:
        """When it happened, on the clock of `time.monotonic`."""
        return self.report.time if self.report is not None else self.seen_at


def exit_code(endings: Sequence[Ending], *, interrupted_at: float | None = None) -> int:
    """Return 0, or 130 where the workers were told to stop; `interrupted_at` is when the parent was told so.

    Raises:
        UserError, WorkersFailed: a worker failed; the message names the first, and how it took the others
            along.
    """
    failed = sorted((e for e in endings if e.kind in _WEIGHTS), key=_gravity)
    told_at = _told_to_stop_at(endings, interrupted_at)
    if interrupted_at is not None:
        failed = [e for e in failed if e.exit_code not in _STOP_SIGNALS]
    if told_at is not None:
        # What fails after that fails because the others are leaving, unless it says otherwise.
        failed = [e for e in failed if (e.time < told_at and e.kind != "lost") or _stands(e)]
    if failed:
        raise _failure(failed[0], endings, was_stopped=told_at is not None)
    # Rank 0 is done only when everything is saved.
    return 0 if endings[0].kind == "done" else EXIT_INTERRUPTED


def _told_to_stop_at(endings: Sequence[Ending], interrupted_at: float | None) -> float | None:
    """Return when the first was told to stop: a scheduler may tell the workers, and not the parent."""
    times = [e.time for e in endings if e.kind == "interrupted"]
    return min([*times, *([] if interrupted_at is None else [interrupted_at])], default=None)


def _gravity(ending: Ending) -> tuple[float, float, int]:
    weight = _WEIGHTS[ending.kind]
    # What a worker says that had to be stopped may come of the stopping.
    return (-min(weight, _WEIGHT_OF_STOPPED) if ending.was_stopped else -weight, ending.time, ending.rank)


def _failure(cause: Ending, endings: Sequence[Ending], *, was_stopped: bool) -> UserError | WorkersFailed:
    if cause.kind == "user":
        return _user_error(cause)
    can_restart = not was_stopped and not _knows_why(cause)
    if cause.kind == "stalled":
        culprit = _culprit_of_stall(cause, endings)
        if culprit is not None:
            lines, hint = _silence(cause, culprit, endings)
            return WorkersFailed("\n".join(lines), hint=hint, can_restart=can_restart)
    headline, details = _said_of(cause)
    others = [_line(e) for e in endings if e is not cause and _is_telling(e)]
    what = "\n".join([headline, *details, *others])
    return WorkersFailed(what, hint=_hint(cause), can_restart=can_restart)


def _knows_why(cause: Ending) -> bool:
    """Tell whether a worker failed for a reason that it would meet again."""
    return cause.kind == "error" and cause.report is not None and cause.report.explained


def _stands(ending: Ending) -> bool:
    return ending.report is not None and ending.report.stands


def _user_error(cause: Ending) -> UserError:
    report = cause.report
    assert report is not None
    return UserError(f"{report.what}\n(found by {cause.place})", where=report.where, hint=report.hint)


def _said_of(cause: Ending) -> tuple[str, list[str]]:
    """Return the headline of a failure, and its own traceback or last words."""
    report = cause.report
    if report is not None:
        return _line(cause, whole=True), [] if report.explained else [report.traceback.rstrip()]
    if cause.kind == "killed":
        return _line(cause), _stack(cause, "it stood here:")
    last = cause.output.strip().splitlines()[-_SHOWN_OUTPUT_LINES:]
    return _line(cause), last


def _silence(stalled: Ending, culprit: Ending, endings: Sequence[Ending]) -> tuple[list[str], str]:
    """Return what is told of a stall, and the hint."""
    victims = [e for e in endings if e.kind == "stalled" and e is not culprit]
    waited = [e.place for e in victims if e.report and e.report.waiting_for == culprit.rank] or [
        e.place for e in victims
    ]
    lines = [f"{culprit.place} did not go on: {_listed(waited)} waited for it"]
    lines += _stack(culprit, "it stood here:")
    lines += [_line(e) for e in endings if e is not culprit and _is_telling(e)]
    hints = [stalled.report.hint if stalled.report else "", _log_hint(culprit)]
    return lines, "; ".join(hint for hint in hints if hint)


def _culprit_of_stall(stalled: Ending, endings: Sequence[Ending]) -> Ending | None:
    """Return who holds all the others up; None where they wait for each other in a circle.

    Best is one that was waited for and ran on in silence; then any that ran on in silence (who waited for it
    may have lost another neighbour first); then the end of the chain of those who wait.
    """
    by_rank = {e.rank: e for e in endings}
    waited_for = {e.report.waiting_for for e in endings if e.kind == "stalled" and e.report}
    silent = [e for e in endings if e.kind == "stopped"]
    for group in ([e for e in silent if e.rank in waited_for], silent):
        if group:
            return group[0]
    seen, here = {stalled.rank}, stalled
    while here.kind == "stalled" and here.report is not None:
        rank = here.report.waiting_for
        if rank is None or rank in seen or rank not in by_rank:
            return None
        seen.add(rank)
        here = by_rank[rank]
    return here


def _is_telling(ending: Ending) -> bool:
    return ending.kind not in ("done", "interrupted")


def _line(ending: Ending, *, whole: bool = False) -> str:
    """Return one line on an ending; `whole` keeps all that its report says."""
    report = ending.report
    if report is not None and report.kind != "interrupted":
        said = f"{report.where}: {report.what}" if report.where else report.what
        if not whole and report.kind == "lost":
            said = _LOST.sub(r"\1", said)  # what the backend says of it tells nobody anything
        if not whole:
            said = _shortened(said)
        return said if said.startswith(ending.place) else f"{ending.place}: {said}"
    if ending.was_stopped:
        return f"{ending.place} was stopped"
    if ending.exit_code < 0:
        return f"{ending.place} was killed by {_signal_name(-ending.exit_code)}"
    return f"{ending.place} ended with exit code {ending.exit_code} and left no report"


def _shortened(text: str) -> str:
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line if len(line) <= _LINE_LENGTH else f"{line[: _LINE_LENGTH - 3]}..."


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _stack(ending: Ending, heading: str) -> list[str]:
    """Return the last dump of the main thread's stack, the innermost call first, if there is one."""
    found = re.match(r"main thread (0x[0-9a-f]+)\n", ending.stacks)
    if found is None:
        return []
    blocks = re.split(r"^(?=(?:Current t|T)hread 0x)", ending.stacks[found.end() :], flags=re.MULTILINE)
    own = [block for block in blocks if found[1] in block.partition("\n")[0]]
    if not own:
        return []
    lines = [line for line in own[-1].splitlines()[1:] if line.startswith("  File ")]
    return [heading, *lines[:_SHOWN_STACK_LINES]] if lines else []


def _hint(cause: Ending) -> str:
    hints = [cause.report.hint if cause.report is not None else ""]
    if cause.exit_code == -signal.SIGKILL:
        hints.append(
            "if nobody killed it, the machine was out of memory (`dmesg` tells): lower data.batch_size"
        )
    if cause.report is None or not cause.report.explained:
        hints.append(_log_hint(cause))
    return "; ".join(hint for hint in hints if hint)


def _log_hint(ending: Ending) -> str:
    return f"its log is {ending.log}" if ending.log is not None else ""


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
