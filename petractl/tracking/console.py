"""What a person sees of a run: the plan, its progress, one line per epoch, and the summary.

Plan and progress go to stderr, the summary to stdout. On a terminal there is one live line, redrawn only
when an event comes (no thread of its own takes time from training), and one line stays for each epoch;
anywhere else plain lines that are never wrapped, with one more each minute of an epoch that takes long.
Colour only repeats what the words say, and NO_COLOR switches it off (rich honours it).
"""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from petractl.events import (
    CheckpointSaved,
    EpochStarted,
    EpochTrained,
    Evaluated,
    Event,
    PlanMade,
    RunFailed,
    RunFinished,
    RunInterrupted,
    RunStarted,
    SamplesSkipped,
    StageCounted,
    StageMeasured,
    StepsDone,
    WarningRaised,
)
from petractl.tracking import report
from petractl.tracking.journal import JOURNAL_NAME
from petractl.tracking.plots import CURVES_NAME
from petractl.tracking.terminal import harmless

TIMELINE_NAME = "plots/timeline.png"  # of a run with a trace

_NARROW = 100  # columns; a terminal with fewer gets fewer facts
_BAR_FROM = 116  # columns; a terminal with fewer gets no bar


class _Console(Console):
    """A console whose reader may go: then this listener is switched off, and the run goes on."""

    def on_broken_pipe(self) -> None:
        """Say so; rich itself would end the process."""
        raise BrokenPipeError("nobody reads what the console says")


class ConsoleListener:
    """Shows a run to a person; the summary of a finished run is printed by `close`, when all else has ended.

    `tracking` gives, at the end, the line that tells how to look at the run in MLflow ("" for none).
    `plain_every_s` is the time in seconds between progress lines off a terminal.
    """

    def __init__(
        self,
        *,
        tracking: Callable[[], str] = str,
        stderr: TextIO | None = None,
        stdout: TextIO | None = None,
        plain_every_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._err = _Console(file=stderr or sys.stderr, highlight=False, markup=False, emoji=False)
        self._out = stdout
        self._tracking = tracking
        # FORCE_COLOR makes rich take a file for a terminal; a live line there would be noise.
        self._is_live = self._err.file.isatty() and self._err.is_terminal and not self._err.is_dumb_terminal
        self._is_narrow = self._err.width < _NARROW
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._plain_every_s = plain_every_s
        self._last_plain_s = clock()
        self._clock = clock
        self._remaining = RemainingTime(clock)
        self._started: RunStarted | None = None
        self._plan: PlanMade | None = None
        self._trained: EpochTrained | None = None  # not yet told
        self._counts = report.Counts()
        self._measures = report.Measures()
        self._measured: list[StageMeasured] = []  # of the epoch not yet told
        self._best: Evaluated | None = None
        self._last: Evaluated | None = None
        self._checkpoints: dict[str, CheckpointSaved] = {}
        self._finished: RunFinished | None = None
        self._failed: RunFailed | None = None

    def handle(self, event: Event, record: dict[str, object]) -> None:
        """Show one event."""
        match event:
            case RunStarted():
                self._started = event
                self._say(report.title_line(event), style="bold")
                self._say(f"run folder {event.run_dir}")
            case PlanMade():
                self._plan = event
                self._show_plan(event)
            case EpochStarted():
                self._tell_epoch()
                self._begin_epoch(event)
            case StepsDone():
                self._show_steps(event)
            case EpochTrained():
                self._trained = event
                self._remaining.epoch_trained()
                self._describe(report.epoch_label(event.epoch, self._epochs), facts="evaluating")
            case StageCounted():
                self._counts.add(event)
            case StageMeasured():
                self._measures.add(event)
                self._measured.append(event)
            case Evaluated():
                self._note_evaluation(event)
            case CheckpointSaved():
                self._checkpoints["last"] = event
                if event.best:
                    self._checkpoints["best"] = event
            case SamplesSkipped():
                for line in report.skipped_lines(event):
                    self._say(line, style="yellow")
            case WarningRaised():
                self._say(f"warning: {event.message}", style="yellow")
                if event.hint:
                    self._say(f"hint: {event.hint}")
            case RunFinished():
                self._end_progress()
                self._finished = event
            case RunInterrupted():
                self._end_progress()
                self._say(self._interrupted(event), style="bold")
                self._say(f"hint: continue with: {event.resume_command}")
            case RunFailed():
                self._end_progress()
                self._failed = event  # the message is the command's to tell, with the exit code

    def _interrupted(self, event: RunInterrupted) -> str:
        by = f" by {event.cause}" if event.cause else ""
        if event.epoch == 1 and event.microbatch is None:
            return f"interrupted{by}; nothing was saved yet"
        return f"interrupted{by}; it goes on after {report.moment(event.epoch - 1, event.microbatch)}"

    def tell_waiting(self, line: str) -> None:
        """Tell what the end of the run waits for; before it why it failed, which its command tells later."""
        if self._failed is not None:
            cause, _, _ = self._failed.message.partition("\n")
            self._say(f"failed: {cause}", style="bold")
            self._failed = None
        self._say(line)

    def close(self) -> None:
        """Leave the terminal as it was and print the summary of a finished run on stdout."""
        self._end_progress()
        if self._finished is not None:
            out = self._out or sys.stdout
            out.write(harmless("\n".join(self._summary(self._finished)) + "\n"))
            out.flush()

    @property
    def _epochs(self) -> int:
        return self._plan.epochs if self._plan else 0

    def _say(self, line: str, *, style: str = "") -> None:
        console = self._progress.console if self._progress else self._err
        console.print(Text(harmless(line), style=style), soft_wrap=True)

    def _show_plan(self, plan: PlanMade) -> None:
        header, rows = report.stage_table(plan)
        if self._is_live and self._err.width < _NARROW:
            header, rows = report.narrow(header, rows)
        self._say("")
        if self._is_live:
            table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
            for i, column in enumerate(header):
                justify: Literal["left", "right"] = "left" if column in report.TEXT_COLUMNS else "right"
                widest = 0 if justify == "left" else max(len(row[i]) for row in rows)
                table.add_column(column, justify=justify, overflow="fold", min_width=widest)
            for row in rows:
                table.add_row(*row)
            self._err.print(table)
        else:
            for line in report.aligned(header, rows):
                self._say(line)
            self._say("")
        for line in report.labelled(report.plan_facts(plan), indent=""):
            self._say(line)
        self._say("")

    def _begin_epoch(self, event: EpochStarted) -> None:
        steps = self._plan.steps_per_epoch if self._plan else 0
        self._remaining.epoch_started(event.epoch, epochs=self._epochs, steps_per_epoch=steps)
        if not self._is_live:
            return
        if self._progress is None:
            self._progress = _live_line(self._err)
            self._task = self._progress.add_task("", facts="")
            self._progress.start()
        self._progress.update(self._task, completed=0, total=steps or None)
        self._describe(report.epoch_label(event.epoch, self._epochs))

    def _describe(self, text: str, *, facts: str = "") -> None:
        if self._progress:
            self._progress.update(self._task, description=text, facts=facts, refresh=True)

    def _show_steps(self, event: StepsDone) -> None:
        eta_s = self._remaining.estimate(event.microbatches)
        if self._progress:
            facts = "  ".join(report.progress_fields(event, eta_s, narrow=self._is_narrow)).rstrip()
            self._progress.update(
                self._task, completed=event.microbatches, total=event.of, facts=facts, refresh=True
            )
        elif not self._is_live and self._clock() - self._last_plain_s >= self._plain_every_s:
            self._last_plain_s = self._clock()
            self._say(report.progress_line(event, self._epochs, eta_s).rstrip())

    def _note_evaluation(self, event: Evaluated) -> None:
        self._last = event
        if self._best is None or event.top1 > self._best.top1:
            self._best = event
        self._tell_epoch(event)

    def _tell_epoch(self, *evaluations: Evaluated) -> None:
        """Print the line of the epoch that was trained last, once, with its evaluation if there is one."""
        trained, self._trained = self._trained, None
        measured, self._measured = self._measured, []
        if trained is not None:
            self._last_plain_s = self._clock()
            told = [evaluated for evaluated in evaluations if evaluated.epoch == trained.epoch]
            of_epoch = [stage for stage in measured if stage.epoch == trained.epoch]
            self._say(report.epoch_line(trained, self._epochs, told, of_epoch))

    def _end_progress(self) -> None:
        self._tell_epoch()
        if self._progress:
            self._progress.stop()
            self._progress = None

    def _summary(self, finished: RunFinished) -> list[str]:
        lines = []
        if self._started:
            lines += [
                "",
                f"done: {report.title_line(self._started)}, {report.many(finished.epochs, 'epoch')}",
                "",
            ]
        lines += report.labelled([*report.results(finished, self._best, self._last), *self._proof()])
        if self._started:
            lines += ["", *report.labelled(self._places(Path(self._started.run_dir)))]
            lines += ["", *report.labelled(next_commands(self._started.run_dir))]
        return lines

    def _proof(self) -> list[tuple[str, str]]:
        proof = self._counts.proof()
        resumed = self._started.resumed_from_epoch if self._started else None
        if proof and resumed is not None:
            proof += f" (since epoch {resumed})" if resumed else ""
        facts = (("counts", proof), ("stages", self._measures.summary()))
        return [(label, text) for label, text in facts if text]

    def _places(self, run_dir: Path) -> list[tuple[str, str]]:
        places = [("run folder", str(run_dir))]
        for which, saved in sorted(self._checkpoints.items()):
            places.append((f"{which} checkpoint", f"{saved.path} (epoch {saved.epoch})"))
        if "best" not in self._checkpoints and self._finished and self._finished.best_epoch:
            path = run_dir / "checkpoints" / f"epoch-{self._finished.best_epoch:04d}"
            places.append(("best checkpoint", f"{path} (epoch {self._finished.best_epoch})"))
        if (run_dir / CURVES_NAME).is_file():
            places.append(("curves", str(run_dir / CURVES_NAME)))
        if (run_dir / TIMELINE_NAME).is_file():
            places.append(("timeline", str(run_dir / TIMELINE_NAME)))
        places.append(("journal", str(run_dir / JOURNAL_NAME)))
        if tracking := self._tracking():
            places.append(("MLflow", tracking))
        return places


def next_commands(run_dir: str) -> list[tuple[str, str]]:
    """Return what to do with a finished run."""
    run = shlex.quote(run_dir)
    return [
        ("next", f"petractl eval {run}"),
        ("", f"petractl export {run} --out {shlex.quote(Path(run_dir).name + '.safetensors')}"),
    ]


class RemainingTime:
    """Estimates the time to the end of the run from the mean time per microbatch, evaluations included.

    The first epoch of the process starts the clock; nothing is estimated before a microbatch is done.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start_s: float | None = None
        self._steps_per_epoch = 0
        self._steps_before = 0  # in earlier epochs of this process
        self._epochs_after = 0

    def epoch_started(self, epoch: int, *, epochs: int, steps_per_epoch: int) -> None:
        """Note the start of an epoch of `steps_per_epoch` microbatches."""
        if self._start_s is None:
            self._start_s = self._clock()
        self._steps_per_epoch = steps_per_epoch
        self._epochs_after = max(0, epochs - epoch)

    def epoch_trained(self) -> None:
        """Note that the epoch's microbatches are done."""
        self._steps_before += self._steps_per_epoch

    def estimate(self, microbatches: int) -> float | None:
        """Return the seconds to go, `microbatches` into the epoch; None if unknown."""
        done = self._steps_before + microbatches
        if self._start_s is None or not done or not self._steps_per_epoch:
            return None
        to_do = max(0, self._steps_per_epoch - microbatches) + self._epochs_after * self._steps_per_epoch
        return (self._clock() - self._start_s) / done * to_do


def _live_line(console: Console) -> Progress:
    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False)]
    if console.width >= _BAR_FROM:
        columns.append(BarColumn(bar_width=min(30, console.width - _BAR_FROM + 5)))
    columns.append(TextColumn("{task.fields[facts]}", markup=False))
    return Progress(*columns, console=console, auto_refresh=False, transient=True)
