"""The words of a run: plan, epoch line, progress line and summary, as plain ASCII text.

Pure functions of events, so that what a person reads is tested without a terminal; `console` decides where
and how it is shown.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from petractl.events import (
    EpochTrained,
    Evaluated,
    PlanMade,
    RunFinished,
    RunStarted,
    StageCounted,
    StepsDone,
)

STAGE_COLUMNS = (
    "stage",
    "units",
    "parameters",
    "{} per image",
    "keeps",
    "W lookahead",
    "staleness in updates",
)
TEXT_COLUMNS = ("units", "keeps")  # the others are numbers, aligned right
NARROW_COLUMNS = (0, 1, 4, 5)  # what a narrow terminal has room for


def title_line(started: RunStarted) -> str:
    """Return what runs: "digits_revnet18: revnet18 on digits by petra"."""
    line = f"{started.recipe_name}: {started.model} on {started.dataset} by {started.method}"
    if started.resumed_from_epoch is not None:
        line += f", resumed after epoch {started.resumed_from_epoch}"
    return line


def stage_table(plan: PlanMade) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the header and one row for each stage."""
    unit, size = _flops_unit(max((stage.flops for stage in plan.stages), default=0.0))
    header = tuple(column.format(unit) for column in STAGE_COLUMNS)
    rows: list[tuple[str, ...]] = [
        (
            str(stage.index),
            stage.units,
            f"{stage.parameters:,}",
            f"{stage.flops / size:,.2f}",
            stage.keeps,
            str(stage.lookahead),
            _short(stage.staleness_updates),
        )
        for stage in plan.stages
    ]
    return header, rows


def narrow(
    header: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the stage table with the columns for which a narrow terminal has room, the lookahead as "W"."""
    table = [tuple(row[i] for i in NARROW_COLUMNS) for row in (header, *rows)]
    return tuple(column.partition(" ")[0] for column in table[0]), table[1:]


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as lines of text with aligned columns."""
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if column in TEXT_COLUMNS else cell.rjust(width)
            for column, cell, width in zip(header, row, widths, strict=True)
        )
        return "  ".join(cells).rstrip()

    return [line(row) for row in table]


def plan_facts(plan: PlanMade) -> list[tuple[str, str]]:
    """Return the plan's batch arithmetic and settings as (label, text)."""
    flops = sum(stage.flops for stage in plan.stages)
    unit, size = _flops_unit(flops)
    total_updates = plan.epochs * plan.updates_per_epoch
    return [
        (
            "batch",
            f"{plan.microbatch_size} per microbatch x k {plan.accumulation}"
            f" = {plan.samples_per_update:,} per update",
        ),
        ("epoch", f"{many(plan.steps_per_epoch, 'microbatch')} = {many(plan.updates_per_epoch, 'update')}"),
        ("run", f"{many(plan.epochs, 'epoch')} = {many(total_updates, 'update')}"),
        ("data", f"{many(plan.train_samples, 'sample')} to train on, {plan.val_samples:,} to test on"),
        (
            "model",
            f"{many(plan.parameters, 'parameter')}, {_short(flops / size)} {unit} per image (forward)",
        ),
        ("method", f"{plan.method}; keeps between forward and backward: {_kept(plan)}"),
        ("schedule", f"{plan.schedule}; {many(len(plan.stages), 'stage')}, {_staleness(plan)}"),
        ("compute", f"{plan.device}, {many(plan.threads, 'thread')}, {plan.precision}"),
    ]


def epoch_line(trained: EpochTrained, epochs: int, evaluations: Sequence[Evaluated] = ()) -> str:
    """Return the line that is kept for an epoch."""
    parts = [epoch_label(trained.epoch, epochs), f"loss {trained.loss:.3f}", f"top-1 {trained.top1:.1f} %"]
    parts += [f"{evaluated.split} top-1 {evaluated.top1:.1f} %" for evaluated in evaluations]
    parts += [f"{_speed(trained.images_per_s)}", f"lr {trained.lr:.4g}"]
    return "  ".join(parts)


def progress_line(steps: StepsDone, epochs: int, eta_s: float | None) -> str:
    """Return the progress within an epoch as one line of text."""
    return "  ".join((epoch_label(steps.epoch, epochs), *progress_fields(steps, eta_s)))


def progress_fields(steps: StepsDone, eta_s: float | None, *, narrow: bool = False) -> tuple[str, ...]:
    """Return microbatches, loss, top-1, speed and time to go; `narrow` leaves out a word."""
    return (
        f"{steps.microbatches:,}/{steps.of:,}" + ("" if narrow else " microbatches"),
        f"loss {steps.loss:.3f}",
        f"top-1 {steps.top1:.1f} %",
        _speed(steps.images_per_s),
        f"{duration(eta_s)} left" if eta_s is not None else "",
    )


def epoch_label(epoch: int, epochs: int) -> str:
    """Return "epoch  3/20", as wide for every epoch of the run."""
    return f"epoch {epoch:>{len(str(epochs))}}/{epochs}" if epochs else f"epoch {epoch}"


def duration(seconds: float) -> str:
    """Return a time for people: "8.4 s", "3 min 05 s", "2 h 07 min"."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


@dataclass(slots=True)
class Counts:
    """Sums the stages' counts over the epochs that this process trained."""

    _stages: dict[int, Counter[str]] = field(default_factory=dict)

    def add(self, counted: StageCounted) -> None:
        """Add one stage's counts of one epoch."""
        sums = self._stages.setdefault(counted.stage, Counter())
        sums.update(microbatches=counted.microbatches, forwards=counted.forwards, backwards=counted.backwards)
        sums.update(updates=counted.updates, partial=counted.partial_groups)

    def proof(self) -> str:
        """Return the proof that nothing was dropped, or what is not equal; "" if nothing was counted."""
        if not self._stages:
            return ""
        entered = max(sums["microbatches"] for sums in self._stages.values())
        wrong = [
            f"stage {stage}: {sums['microbatches']:,} in, "
            f"{sums['forwards']:,} forwards, {sums['backwards']:,} backwards"
            for stage, sums in sorted(self._stages.items())
            if not sums["microbatches"] == sums["forwards"] == sums["backwards"] == entered
        ]
        if wrong:
            return "NOT EQUAL: " + "; ".join(wrong)
        where = "on 1 stage" if len(self._stages) == 1 else f"on each of {len(self._stages)} stages"
        return f"{many(entered, 'microbatch')} in = forwards = backwards {where}; {self._updates()}"

    def _updates(self) -> str:
        updates = max(sums["updates"] for sums in self._stages.values())
        partial = max(sums["partial"] for sums in self._stages.values())
        return many(updates, "update") + (f", {partial:,} of them from a partial group" if partial else "")


def results(finished: RunFinished, best: Evaluated | None, last: Evaluated | None) -> list[tuple[str, str]]:
    """Return what the run reached as (label, text); `best` and `last` are evaluations seen, if any."""
    split = last.split if last else best.split if best else "test"
    facts = []
    if finished.final_top1 is not None:
        text = f"{finished.final_top1:.2f} %"
        if finished.best_top1 is not None and finished.best_epoch is not None:
            text += f" (best {finished.best_top1:.2f} % in epoch {finished.best_epoch})"
        facts.append((f"{split} top-1", text))
    if finished.final_top5 is not None:
        text = f"{finished.final_top5:.2f} %"
        if best is not None and best.epoch == finished.best_epoch:
            text += f" ({best.top5:.2f} % in epoch {best.epoch})"
        facts.append((f"{split} top-5", text))
    if finished.final_loss is not None:
        facts.append((f"{split} loss", f"{finished.final_loss:.4f}"))
    facts.append(("time", f"{duration(finished.seconds)}, {_speed(finished.images_per_s)} in training"))
    if finished.peak_memory_bytes is not None:
        facts.append(("memory", f"{finished.peak_memory_bytes / 2**30:.2f} GiB at most"))
    return facts


def labelled(facts: Sequence[tuple[str, str]], *, indent: str = "  ") -> list[str]:
    """Return facts as lines with the labels aligned."""
    width = max((len(label) for label, _ in facts), default=0)
    return [f"{indent}{label:<{width}}  {text}" for label, text in facts]


def _kept(plan: PlanMade) -> str:
    stages_by_what: Mapping[str, int] = Counter(stage.keeps for stage in plan.stages)
    if len(stages_by_what) == 1:
        return next(iter(stages_by_what))
    return ", ".join(f"{what} ({many(count, 'stage')})" for what, count in stages_by_what.items())


def _staleness(plan: PlanMade) -> str:
    most = max((stage.staleness_updates for stage in plan.stages), default=0.0)
    return f"gradients up to {_short(most)} updates late" if most else "no gradient is late"


def _flops_unit(flops: float) -> tuple[str, float]:
    return ("GFLOPs", 1e9) if flops >= 1e9 else ("MFLOPs", 1e6)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.3g}"


def _speed(images_per_s: float) -> str:
    return f"{images_per_s:,.0f} images/s" if images_per_s >= 10 else f"{images_per_s:.2f} images/s"


def many(count: int, noun: str) -> str:
    """Return a count with its noun: "1 epoch", "1,437 samples"."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun}{'es' if noun.endswith('tch') else 's'}"
