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
    SamplesSkipped,
    StageCounted,
    StageMeasured,
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
AUXILIARY_COLUMN = "auxiliary FLOPs"  # where blocks have one: in percent of the block's own
DEVICE_COLUMN = "device"  # the last one, where there is more than one process
TEXT_COLUMNS = ("units", "keeps", DEVICE_COLUMN)  # the others are numbers, aligned right
NARROW_COLUMNS = ("stage", "units", "keeps", "W lookahead", DEVICE_COLUMN)  # for a narrow terminal


def moment(epochs: int, microbatches: int | None) -> str:
    """Return a place in training: so many whole epochs, and microbatches of the next one."""
    if microbatches:
        return f"microbatch {microbatches} of epoch {epochs + 1}"
    return f"epoch {epochs}"


def title_line(started: RunStarted) -> str:
    """Return what runs: "digits_revnet18: revnet18 on digits by petra"."""
    line = f"{started.recipe_name}: {started.model} on {started.dataset} by {started.method}"
    if started.resumed_from_epoch is not None:
        line += f", resumed after {moment(started.resumed_from_epoch, started.resumed_from_microbatch)}"
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
    if any(stage.auxiliary_percent is not None for stage in plan.stages):
        header = (*header, AUXILIARY_COLUMN)
        shares = [_percent(stage.auxiliary_percent) for stage in plan.stages]
        rows = [(*row, share) for row, share in zip(rows, shares, strict=True)]
    if plan.processes > 1 and any(stage.device for stage in plan.stages):
        header = (*header, DEVICE_COLUMN)
        rows = [(*row, stage.device) for row, stage in zip(rows, plan.stages, strict=True)]
    return header, rows


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1f} %"


def narrow(
    header: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the stage table with the columns for which a narrow terminal has room, the lookahead as "W"."""
    kept = [i for i, column in enumerate(header) if column in NARROW_COLUMNS]
    table = [tuple(row[i] for i in kept) for row in (header, *rows)]
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
            + (f" x replicas {plan.replicas}" if plan.replicas > 1 else "")
            + f" = {plan.samples_per_update:,} per update",
        ),
        (
            "epoch",
            many(plan.steps_per_epoch, "microbatch")
            + (" per replica" if plan.replicas > 1 else "")
            + f" = {many(plan.updates_per_epoch, 'update')}",
        ),
        ("run", f"{many(plan.epochs, 'epoch')} = {many(total_updates, 'update')}"),
        ("data", f"{many(plan.train_samples, 'sample')} to train on, {plan.val_samples:,} to test on"),
        (
            "model",
            f"{many(plan.parameters, 'parameter')}, {_short(flops / size)} {unit} per image (forward)",
        ),
        ("method", f"{plan.method}; keeps between forward and backward: {_kept(plan)}"),
        ("schedule", f"{plan.schedule}; {many(len(plan.stages), 'stage')}, {_staleness(plan)}"),
        *([("processes", _processes(plan))] if plan.processes > 1 else []),
        (
            "compute",
            f"{plan.device}, {many(plan.threads, 'thread')}"
            + (" per process" if plan.processes > 1 else "")
            + f", {plan.precision}",
        ),
    ]


def epoch_line(
    trained: EpochTrained,
    epochs: int,
    evaluations: Sequence[Evaluated] = (),
    measured: Sequence[StageMeasured] = (),
) -> str:
    """Return the line that is kept for an epoch.

    With what its stages were idle, the range of it, and how long it waited for data, if measured.
    """
    parts = [epoch_label(trained.epoch, epochs), f"loss {trained.loss:.3f}", f"top-1 {trained.top1:.1f} %"]
    parts += [f"{evaluated.split} top-1 {evaluated.top1:.1f} %" for evaluated in evaluations]
    if trained.images_per_s is not None:
        parts.append(_speed(trained.images_per_s))
    idle = [stage.idle_percent for stage in measured if stage.idle_percent is not None]
    if idle:
        parts.append(f"idle {_range(min(idle), max(idle))} %")
    parts += _data_wait(trained.data_wait_percent)
    parts.append(f"lr {trained.lr:.4g}")
    return "  ".join(parts)


def progress_line(steps: StepsDone, epochs: int, eta_s: float | None) -> str:
    """Return the progress within an epoch as one line of text."""
    return "  ".join((epoch_label(steps.epoch, epochs), *progress_fields(steps, eta_s)))


def progress_fields(steps: StepsDone, eta_s: float | None, *, narrow: bool = False) -> tuple[str, ...]:
    """Return microbatches, loss, top-1, speed, data wait and time to go; `narrow` leaves out what it can."""
    return (
        f"{steps.microbatches:,}/{steps.of:,}" + ("" if narrow else " microbatches"),
        f"loss {steps.loss:.3f}",
        f"top-1 {steps.top1:.1f} %",
        _speed(steps.images_per_s),
        *([] if narrow else _data_wait(steps.data_wait_percent)),
        f"{duration(eta_s)} left" if eta_s is not None else "",
    )


def skipped_lines(skipped: SamplesSkipped) -> list[str]:
    """Return what was left out, a line for each sample that is named."""
    head = f"epoch {skipped.epoch}: {many(skipped.count, 'bad sample')} left out"
    return [head, *(f"  {sample}" for sample in skipped.samples)]


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
    """Sums the stages' counts over the epochs that this process trained, of every replica apart."""

    _stages: dict[tuple[int, int], Counter[str]] = field(default_factory=dict)  # by (replica, stage)

    def add(self, counted: StageCounted) -> None:
        """Add one stage's counts of one epoch."""
        sums = self._stages.setdefault((counted.replica, counted.stage), Counter())
        sums.update(microbatches=counted.microbatches, forwards=counted.forwards, backwards=counted.backwards)
        sums.update(updates=counted.updates, partial=counted.partial_groups)

    def proof(self) -> str:
        """Return the proof that nothing was dropped, or what is not equal; "" if nothing was counted."""
        if not self._stages:
            return ""
        entered = self._entered()
        wrong = [
            f"{stage_name(stage, replica, replicas=len(entered))}: {sums['microbatches']:,} in, "
            f"{sums['forwards']:,} forwards, {sums['backwards']:,} backwards"
            for (replica, stage), sums in sorted(self._stages.items())
            if not sums["microbatches"] == sums["forwards"] == sums["backwards"] == entered[replica]
        ]
        if wrong:
            return "NOT EQUAL: " + "; ".join(wrong)
        stages = len({stage for _, stage in self._stages})
        where = "on 1 stage" if stages == 1 else f"on each of {stages} stages"
        if len(entered) > 1:
            where += f" of {len(entered)} replicas ({' + '.join(f'{n:,}' for n in entered.values())})"
        total = many(sum(entered.values()), "microbatch")
        return f"{total} in = forwards = backwards {where}; {self._updates()}"

    def _entered(self) -> dict[int, int]:
        """Return the number of microbatches of every replica: the most that one of its stages has seen."""
        entered: dict[int, int] = {}
        for (replica, _), sums in sorted(self._stages.items()):
            entered[replica] = max(entered.get(replica, 0), sums["microbatches"])
        return entered

    def _updates(self) -> str:
        updates = max(sums["updates"] for sums in self._stages.values())
        partial = max(sums["partial"] for sums in self._stages.values())
        return many(updates, "update") + (f", {partial:,} of them from a partial group" if partial else "")


@dataclass(slots=True)
class Measures:
    """Sums what the stages measured over the epochs that this process trained."""

    _seconds: dict[tuple[int, int], float] = field(default_factory=dict)  # by (replica, stage)
    _idle_s: dict[tuple[int, int], float] = field(default_factory=dict)
    _bytes: int | None = None

    def add(self, measured: StageMeasured) -> None:
        """Add one stage's measures of one epoch; what was not measured counts nowhere."""
        key = (measured.replica, measured.stage)
        if measured.idle_percent is not None:
            idle_s = measured.seconds * measured.idle_percent / 100.0
            self._seconds[key] = self._seconds.get(key, 0.0) + measured.seconds
            self._idle_s[key] = self._idle_s.get(key, 0.0) + idle_s
        for sent in (measured.bytes_sent_forward, measured.bytes_sent_backward):
            if sent is not None:
                self._bytes = (self._bytes or 0) + sent

    def summary(self) -> str:
        """Return the stages that were idle least and most, and the bytes sent; "" if nothing was measured."""
        parts = []
        idle = {key: 100.0 * self._idle_s[key] / s for key, s in sorted(self._seconds.items()) if s > 0}
        if idle:
            replicas = len({replica for replica, _ in idle})
            least, most = min(idle, key=lambda key: idle[key]), max(idle, key=lambda key: idle[key])
            ends = [least] if len(idle) == 1 else [least, most]
            told = (f"{idle[k]:.1f} % ({stage_name(k[1], k[0], replicas=replicas)})" for k in ends)
            parts.append("idle " + " to ".join(told))
        if self._bytes is not None:
            parts.append(f"{size(self._bytes)} sent between stages")
        return "; ".join(parts)


def stage_name(stage: int, replica: int = 0, *, replicas: int = 1) -> str:
    """Return "stage 2", or "stage 2 of replica 1" where there are several replicas."""
    return f"stage {stage}" + (f" of replica {replica}" if replicas > 1 else "")


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
    speed = "" if finished.images_per_s is None else f", {_speed(finished.images_per_s)} in training"
    facts.append(("time", f"{duration(finished.seconds)}{speed}"))
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


def _processes(plan: PlanMade) -> str:
    """Return the product: "2 stages x 2 replicas = 4 processes, messages by gloo"."""
    places = plan.processes // plan.replicas
    text = many(len(plan.stages), "stage")
    if places and len(plan.stages) != places:
        text += f" / {len(plan.stages) / places:g} per process"
    if plan.replicas > 1:
        text += f" x {plan.replicas} replicas"
    text += f" = {plan.processes} processes"
    return text + (f", messages by {plan.backend}" if plan.backend else "")


def _staleness(plan: PlanMade) -> str:
    most = max((stage.staleness_updates for stage in plan.stages), default=0.0)
    updates = "update" if most == 1 else "updates"
    return f"gradients up to {_short(most)} {updates} late" if most else "no gradient is late"


def _flops_unit(flops: float) -> tuple[str, float]:
    return ("GFLOPs", 1e9) if flops >= 1e9 else ("MFLOPs", 1e6)


def size(num_bytes: float) -> str:
    """Return a number of bytes for people: "512 B", "1.5 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} TiB"


def _range(least: float, most: float) -> str:
    return f"{least:.0f}" if round(least) == round(most) else f"{least:.0f} to {most:.0f}"


def _data_wait(percent: float | None) -> list[str]:
    return [] if percent is None else [f"data wait {percent:.0f} %"]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.3g}"


def _speed(images_per_s: float) -> str:
    return f"{images_per_s:,.0f} images/s" if images_per_s >= 10 else f"{images_per_s:.2f} images/s"


def many(count: int, noun: str) -> str:
    """Return a count with its noun: "1 epoch", "1,437 samples"."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun}{'es' if noun.endswith('tch') else 's'}"
