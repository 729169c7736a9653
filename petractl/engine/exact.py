"""Exact pipelines: backpropagation over several processes, by torch's own schedules.

An update is one flush: the microbatches of a group go through all stages and back, then every stage steps its
optimiser with the average. So the result is that of the in-process engine's `sequential`, to rounding.
`torch.distributed.pipelining` orders the work and moves the messages.

    place 0      reads a group of microbatches
                 announces to every place how many samples each has, its layout,
                 and whether the run is saved after the group                          (1)
                 sends the labels to the last place                                    (2)
    all places   run the flush: one schedule for each run of microbatches of one layout
                 average, over replicas too, and update

(1) and (2) use the control group. A schedule is made for a number of microbatches of one shape, so a shorter
group, and a last microbatch that is smaller, get schedules of their own, kept from epoch to epoch.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from petractl.engine.cut import STOP, Cutter, StageCut
from petractl.engine.exact_rules import exact_schedule_problem, flushes
from petractl.engine.exact_stage import (
    Body,
    ExactPart,
    StageFailure,
    WatchedStage,
    as_output,
    failures_escape,
)
from petractl.engine.measures import Measures
from petractl.engine.pipeline import MicrobatchSource, begin_stretch
from petractl.engine.recorder import Recorder
from petractl.engine.schedule import WHOLE_EPOCH, Stretch
from petractl.engine.stage import Loss
from petractl.engine.stopwatch import Stopwatch
from petractl.errors import PeerLost, RunError, Stalled, Stopped

_SIZES_TAG, _LABELS_TAG = 7001, 7002


class PipelineSeat(Protocol):
    """Where this process sits."""

    @property
    def place(self) -> int:
        """Its index in the pipeline."""
        ...

    @property
    def num_places(self) -> int:
        """Processes in the pipeline."""
        ...


class GradientReducer(Protocol):
    """Averages the gradients of all units of this process over the replicas."""

    def finish(self, *, samples: int) -> None:
        """Leave the average in every parameter's gradient; `samples` are this replica's, 0 for none."""
        ...


@dataclass(frozen=True, slots=True)
class _Group:
    """The microbatches of one update, as this place knows them; images at place 0, labels at the last."""

    samples: Sequence[int]
    layouts: Sequence[int]
    flags: int = 0
    """Of the cut after the group, 0 for none."""
    images: Sequence[Tensor] | None = None
    labels: Sequence[Tensor] | None = None

    def runs(self) -> Iterator[tuple[int, slice]]:
        """Yield (layout, positions) of each run of microbatches of one layout."""
        for layout, positions in groupby(range(len(self.layouts)), key=self.layouts.__getitem__):
            found = list(positions)
            yield layout, slice(found[0], found[-1] + 1)


class ExactPipeline:
    """The stages of one process of an exact pipeline; the same calls as the in-process engine's.

    `group` holds the processes of this pipeline and no other, in the order of their places; `ranks` are their
    global ranks; `control` is a gloo group in which they are too. `reducer` is None without replicas, else
    that of all units of all parts, in order. Units are reduced at the end of a group, not during the
    backward: the schedules give no sign of a unit's last gradient.
    """

    def __init__(
        self,
        *,
        parts: Sequence[ExactPart],
        loss: Loss,
        schedule: str,
        accumulation: int,
        seat: PipelineSeat,
        group: dist.ProcessGroup,
        control: dist.ProcessGroup,
        ranks: Sequence[int],
        device: torch.device,
        reducer: GradientReducer | None = None,
        stall_timeout_s: float = 0.0,
    ) -> None:
        self.stages = tuple(parts)
        self.accumulation = accumulation
        self.num_stages = len(parts) * seat.num_places
        self.compute_s: float | None = None
        """Seconds that the last call of `train` computed in this process, updates included."""
        self.wait_s: float | None = None
        """Its other seconds: waiting for neighbours, replicas and data."""
        assert [part.index for part in parts] == list(range(seat.place, self.num_stages, seat.num_places))
        assert dist.get_process_group_ranks(group) == list(ranks), "the group is not this pipeline's"
        problem = exact_schedule_problem(
            schedule, num_stages=self.num_stages, num_places=seat.num_places, accumulation=accumulation
        )
        assert not problem, problem
        self._measures: tuple[Measures, ...] = ()
        self.recorder: Recorder | None = None
        """Set to record when each stage did what."""
        self._loss = loss
        self._schedule = schedule
        self._seat = seat
        self._group = group
        self._reducer = reducer
        self._desk = _Desk(seat=seat, control=control, ranks=ranks, device=device, timeout_s=stall_timeout_s)
        self._stopwatch = Stopwatch(device)
        last = self.num_stages - 1
        self._bodies = [
            Body(
                part,
                is_first=part.index == 0,
                is_last=part.index == last,
                splits_backward=schedule == "zero-bubble",
                device=device,
                wire=device if dist.get_backend(group) == "nccl" else torch.device("cpu"),
            )
            for part in parts
        ]
        self._flushes: dict[tuple[str, int, int], _Flush] = {}
        self._carried_samples = 0
        self._on_microbatch: Callable[[int], None] | None = None

    def train(
        self,
        source: MicrobatchSource | None,
        *,
        num_microbatches: int,
        num_rows: int | None = None,
        offset: int = 0,
        on_microbatch: Callable[[int], None] | None = None,
        stretch: Stretch = WHOLE_EPOCH,
        cutter: Cutter | None = None,
    ) -> None:
        """Train on the epoch's microbatches from where a stretch begins; every one gets its backward.

        `source` is needed at place 0 only. `num_rows` is the most microbatches that a replica has: updates
        follow it. `offset` is the number of microbatches trained on before the epoch. `on_microbatch(i)` is
        called in every process, after its highest stage's backward of microbatch i. The run can be saved
        after every update: nothing is then in flight.

        Raises:
            RunError: the data ended too soon; PeerLost, Stalled: another process did not do its part.
            Stopped: a cut has said so.
        """
        assert stretch.until is None, "an exact pipeline is always drained between two groups"
        rows = num_microbatches if num_rows is None else num_rows
        assert rows >= num_microbatches
        started = time.perf_counter()
        begin_stretch(self.stages, stretch, offset=offset)
        self._on_microbatch = on_microbatch
        sent = [(part.bytes_sent_forward, part.bytes_sent_backward) for part in self.stages]
        try:
            for first in range(stretch.done - stretch.done % self.accumulation, rows, self.accumulation):
                size = max(0, min(self.accumulation, num_microbatches - first))
                done = max(0, stretch.done - first)
                flags = self._decide(cutter, range(first + done, first + size)) if size > done else 0
                self._begin_group(size, done=done)
                samples = self._carried_samples if done else 0
                if size > done:
                    group, flags = self._run_group(source, first=first + done, size=size - done, flags=flags)
                    samples += group
                last = first + max(size, 1) - 1
                if cutter is not None and self._seat.place == 0:
                    cutter.before_update(last)
                self._update(size=size, samples=samples, last=last)
                self._hand_over(cutter, last, flags)
            with self._peers_named():
                self._desk.flush()
        except StageFailure as failure:
            raise failure.error from failure.error.__cause__
        self.compute_s = self._stopwatch.read()
        seconds = time.perf_counter() - started
        self.wait_s = max(0.0, seconds - self.compute_s)
        self._measures = tuple(
            Measures(
                seconds=seconds,
                is_itemised=False,
                wait_other_s=self.wait_s,
                bytes_sent_forward=part.bytes_sent_forward - up,
                bytes_sent_backward=part.bytes_sent_backward - down,
            )
            for part, (up, down) in zip(self.stages, sent, strict=True)
        )

    def stage_measures(self) -> tuple[Measures, ...]:
        """Return how the stages spent the last epoch; those of one process share its time."""
        return self._measures

    def resume(self, cuts: Sequence[StageCut], *, offset: int) -> None:
        """Go on from a cut, at which nothing was in flight; a part of a group may have been."""
        for cut in cuts:
            assert not cut.state["flights"]
            self._carried_samples = cut.state["group"]["samples"]

    def entered(self, stretch: Stretch, *, num_microbatches: int) -> int:
        """Return how many of the epoch's microbatches have entered before a stretch."""
        return min(stretch.done, num_microbatches)

    def _decide(self, cutter: Cutter | None, microbatches: range) -> int:
        """Ask where data enter for a cut after a group; the others are told with the group."""
        if cutter is None or self._seat.place > 0:
            return 0
        flags = 0
        for microbatch in microbatches:
            flags |= cutter.decide(microbatch)
        return flags

    def _begin_group(self, size: int, *, done: int) -> None:
        """Turn the averages of a group's first microbatches, another engine's, into this one's sums."""
        if done:
            for stage in self.stages:
                gradients = [p.grad for p in stage.parameters if p.grad is not None]
                torch._foreach_mul_(gradients, float(size))

    def _hand_over(self, cutter: Cutter | None, microbatch: int, flags: int) -> None:
        """Hand the stages over where the run is saved after an update.

        Raises:
            Stopped: the run ends here.
        """
        if cutter is None:
            return
        if self._seat.place == 0:
            cutter.after_update(microbatch)
        if flags:
            for part in self.stages:
                cutter.take(part, StageCut(part.index, microbatch, flags, (), part.suspended()))
        if flags & STOP:
            self._desk.flush()
            raise Stopped

    def _run_group(
        self, source: MicrobatchSource | None, *, first: int, size: int, flags: int
    ) -> tuple[int, int]:
        """Give every microbatch of a group forward and backward; return the samples and the cut's flags."""
        with self._peers_named():
            group = self._desk.group(source, first=first, size=size, flags=flags)
            for layout, run in group.runs():
                position = run.start
                count = run.stop - run.start
                for name, part in flushes(self._schedule, num_places=self._seat.num_places, count=count):
                    flush = self._flush(name, layout=layout, count=part)
                    flush.record(self.recorder)
                    flush.run(group, positions=slice(position, position + part), first=first + position)
                    position += part
        return sum(group.samples), group.flags

    def _flush(self, name: str, *, layout: int, count: int) -> "_Flush":
        key = (name, layout, count)
        if key not in self._flushes:
            stages = [
                WatchedStage(
                    body,
                    num_stages=self.num_stages,
                    group=self._group,
                    stopwatch=self._stopwatch,
                    on_backward=self._backward_done if body is self._bodies[-1] else _nothing,
                )
                for body in self._bodies
            ]
            self._flushes[key] = _Flush(name, stages, count=count, loss=self._counted_loss)
        return self._flushes[key]

    def _counted_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        last = self._bodies[-1]
        with failures_escape(), self._stopwatch.running():
            loss = self._loss(logits, labels)
            if last.microbatch is not None:
                sentinel, position = last.part.sentinel, last.part.position(last.microbatch)
                if sentinel is None or sentinel.loss(position, loss):
                    last.part.totals.add(loss, logits, labels)
            return as_output(loss)

    def _backward_done(self, microbatch: int) -> None:
        if self._on_microbatch is not None:
            with failures_escape():
                self._on_microbatch(microbatch)

    def _update(self, *, size: int, samples: int, last: int) -> None:
        """Average what the group left in the gradients and step; a replica with no group adds nothing.

        `last` is the group's last microbatch.
        """
        with self._stopwatch.running():
            for stage in self.stages:
                _average(stage.parameters, 1.0 / max(1, size))
                if stage.sentinel is not None:
                    stage.sentinel.mark_sums(stage.parameters)
        if self._reducer is not None:
            self._reducer.finish(samples=samples)
        for stage in self.stages:
            with self._stopwatch.running(), self._recorded(stage.index, last):
                if stage.sentinel is None or stage.sentinel.may_update():
                    stage.updater.step(delay=0, position=stage.counters.updates)
                else:
                    stage.updater.skip(position=stage.counters.updates)
                stage.counters.updates += 1
                stage.counters.partial_groups += size < self.accumulation

    def _recorded(self, stage: int, microbatch: int) -> AbstractContextManager[None]:
        return nullcontext() if self.recorder is None else self.recorder.work(stage, "U", microbatch)

    @contextmanager
    def _peers_named(self) -> Iterator[None]:
        """Turn what a backend says of a process that is gone or silent into what has happened.

        Errors of the units do not come this way: they are `StageFailure`s.
        """
        try:
            yield
        except (RunError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            text = str(error).lower()
            me = " and ".join(f"stage {stage.index}" for stage in self.stages)
            if "timed out" in text or "timeout" in text:
                raise Stalled(f"{me} has waited too long for a message of its pipeline") from error
            if isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text or "connection" in text:
                reason = str(error).strip().splitlines()[0]
                raise PeerLost(f"{me} lost the connection to its pipeline ({reason})") from error
            raise


def _nothing(microbatch: int) -> None:
    pass


class _Flush:
    """One of torch's schedules, made for a number of microbatches of one shape."""

    def __init__(self, name: str, stages: list[WatchedStage], *, count: int, loss: Loss) -> None:
        options: dict[str, Any] = {"n_microbatches": count, "loss_fn": loss, "scale_grads": False}
        self._stages = stages
        self._schedule: Any
        if name == "gpipe":
            self._schedule = ScheduleGPipe(stages[0], **options)
        elif name == "1f1b":
            self._schedule = Schedule1F1B(stages[0], **options)
        elif name == "interleaved-1f1b":
            self._schedule = ScheduleInterleaved1F1B(list(stages), **options)
        else:
            self._schedule = ScheduleInterleavedZeroBubble(list(stages), **options)

    def record(self, recorder: Recorder | None) -> None:
        """Have the stages record what they do; None: no longer."""
        for stage in self._stages:
            stage.recorder = recorder

    def run(self, group: _Group, *, positions: slice, first: int) -> None:
        """Run these positions of the group, of which the first is microbatch `first` of the epoch."""
        for stage in self._stages:
            stage.first = first
        images = None if group.images is None else [(x,) for x in group.images[positions]]
        labels = None if group.labels is None else list(group.labels[positions])
        try:
            self._schedule.step(arg_mbs=images, target_mbs=labels, return_outputs=False)
        finally:
            for stage in self._stages:
                stage.rest()


class _Desk:
    """Where the data of a group arrive at a place: from the source at place 0, from place 0 elsewhere."""

    def __init__(
        self,
        *,
        seat: PipelineSeat,
        control: dist.ProcessGroup,
        ranks: Sequence[int],
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self._place = seat.place
        self._num_places = seat.num_places
        self._control = control
        self._ranks = list(ranks)
        self._device = device
        self._timeout = timedelta(seconds=timeout_s) if timeout_s else None
        self._layouts: dict[tuple[object, ...], int] = {}
        self._pending: list[tuple[dist.Work, Tensor]] = []

    def group(self, source: MicrobatchSource | None, *, first: int, size: int, flags: int) -> _Group:
        """Return the next group, of `size` microbatches from `first`; `flags` of a cut are place 0's."""
        if self._place:
            return self._receive(size)
        return self._read(source, first=first, size=size, flags=flags)

    def flush(self) -> None:
        """Wait until all that was sent has been taken."""
        for work, _ in self._pending:
            self._wait(work)
        self._pending.clear()

    def _read(self, source: MicrobatchSource | None, *, first: int, size: int, flags: int) -> _Group:
        assert source is not None, "place 0 reads the data"
        images, labels = [], []
        for i in range(first, first + size):
            with failures_escape():  # what a loader says of a timeout is not about a neighbour
                microbatch = next(source, None)
            if microbatch is None:
                raise RunError(
                    f"the data ended after {i} microbatches", where="stage 0", hint="check the data"
                )
            images.append(microbatch[0])
            labels.append(microbatch[1])
        samples, layouts = [len(y) for y in labels], [self._layout(x) for x in images]
        self.flush()
        sizes = torch.tensor([samples, layouts, [flags] * size], dtype=torch.int64)
        for place in range(1, self._num_places):
            self._send(sizes, place, tag=_SIZES_TAG)
        if self._num_places == 1:
            return _Group(samples, layouts, flags, images, [y.to(self._device) for y in labels])
        self._send(torch.cat([y.cpu() for y in labels]), self._num_places - 1, tag=_LABELS_TAG)
        return _Group(samples, layouts, flags, images)

    def _receive(self, size: int) -> _Group:
        sizes = torch.empty(3, size, dtype=torch.int64)
        self._take(sizes, tag=_SIZES_TAG)
        samples, layouts, flags = sizes.tolist()
        if self._place < self._num_places - 1:
            return _Group(samples, layouts, flags[0])
        labels = torch.empty(sum(samples), dtype=torch.int64)
        self._take(labels, tag=_LABELS_TAG)
        parts = torch.split(labels.to(self._device, non_blocking=True), samples)
        return _Group(samples, layouts, flags[0], labels=parts)

    def _layout(self, images: Tensor) -> int:
        """Return the number of a microbatch's shape, strides and type, in the order of their coming."""
        return self._layouts.setdefault((images.shape, images.stride(), images.dtype), len(self._layouts))

    def _send(self, tensor: Tensor, place: int, *, tag: int) -> None:
        work = dist.isend(tensor, dst=self._ranks[place], group=self._control, tag=tag)
        assert work is not None
        self._pending.append((work, tensor))

    def _take(self, tensor: Tensor, *, tag: int) -> None:
        work = dist.irecv(tensor, src=self._ranks[0], group=self._control, tag=tag)
        assert work is not None
        self._wait(work)

    def _wait(self, work: dist.Work) -> None:
        if self._timeout is None:
            work.wait()
        else:
            work.wait(self._timeout)


def _average(parameters: Sequence[Tensor], weight: float) -> None:
    """Scale the sums of gradients, and lay them out as their parameters are.

    One layout for gradient, momentum and parameter: a resumed run then adds in the same order.
    """
    for p in parameters:
        if p.grad is not None and (p.grad.stride() != p.stride() or p.grad.dtype != p.dtype):
            p.grad = torch.empty_like(p).copy_(p.grad)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients and weight != 1.0:
        torch._foreach_mul_(gradients, weight)
