"""Times units as a stage runs them: forward, backward with all that follows it, and update.

Each unit is a stage of its own, so what is timed is the engine's code: the method's evaluations, the taking
over of gradients, the last stage's loss and sums, the optimiser with gradients that are fresh from a
backward. All forwards come before all backwards, and these before all updates, as in a stage: so each finds
the caches as the others left them.

A CPU may be too slow for a full microbatch. Time is not proportional to the samples (two of them took twice
as long each as 32 did), so two smaller sizes are timed, n / 2 and n, and a line goes through them:

    t(batch) = a + (t(n) - a) * batch / n    with a = 2 t(n / 2) - t(n), not below 0
"""

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from petractl.engine.messages import Activation, Gradient
from petractl.engine.stage import Stage
from petractl.engine.update import Updater
from petractl.methods.evaluation import Evaluator
from petractl.methods.family import Keeping
from petractl.methods.keeping import build_keeper
from petractl.optim import OPTIMIZERS, build_optimizer

_FEWEST_SAMPLES = 2
_REPEATS = 5


@dataclass(frozen=True, slots=True)
class UnitTimes:
    """Seconds of a unit's forward and backward of one microbatch, and of its update."""

    forward_s: float
    backward_s: float
    """With the first gradient of a group taken over."""
    update_s: float = 0.0
    accumulate_s: float = 0.0
    """Of adding a further gradient of a group, per microbatch."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured: a unit with what it keeps and its input's shape."""

    key: str
    unit: nn.Module
    keeping: Keeping
    index: int
    shapes: tuple[tuple[int, ...], ...]
    is_last: bool


class UnitBench:
    """Times units on one device."""

    def __init__(
        self,
        device: torch.device,
        *,
        autocast_dtype: torch.dtype | None = None,
        channels_last: bool = True,
        optimizer: str = "sgd",
    ) -> None:
        self._device = device
        self._autocast_dtype = autocast_dtype
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        # A user's own class need not take what is given here.
        self._optimizer = optimizer if optimizer in OPTIMIZERS else "sgd"

    def measure(
        self, cases: Sequence[Case], *, batch_size: int, budget_s: float
    ) -> tuple[dict[str, UnitTimes], int]:
        """Return the times of every case for `batch_size`, and how many samples were timed at a time."""
        subjects = [self._subject(case) for case in cases]
        sizes = self._sizes(subjects, batch_size, budget_s)
        found = [[self._run(subjects, size) for size in sizes] for _ in range(_REPEATS + 1)]
        rounds = found[1:]  # the first one warms up
        return {
            case.key: _line(
                [_medians([each[m][n] for each in rounds]) for m in range(len(sizes))], sizes, batch_size
            )
            for n, case in enumerate(cases)
        }, sizes[-1]

    def _sizes(self, subjects: Sequence["_Subject"], batch_size: int, budget_s: float) -> tuple[int, ...]:
        """Return (batch size,) where it is affordable, as on a GPU, else (n / 2, n)."""
        if self._device.type != "cpu" or batch_size <= 2 * _FEWEST_SAMPLES:
            return (batch_size,)
        began, size = time.perf_counter(), _FEWEST_SAMPLES
        self._run(subjects, size)
        while True:
            begin = time.perf_counter()
            self._run(subjects, size)
            now = time.perf_counter()
            left, per_sample = budget_s - (now - began), (now - begin) / size
            if per_sample * batch_size * (_REPEATS + 1) <= left:
                return (batch_size,)
            # Twice as many must be tried first, and then be timed beside these.
            if per_sample * size * (2 + 3 * (_REPEATS + 1)) > left or 4 * size > batch_size:
                size = max(size, 2 * _FEWEST_SAMPLES)
                return (size // 2, size)
            size *= 2

    def _run(self, subjects: Sequence["_Subject"], samples: int) -> list[UnitTimes]:
        """Run a microbatch and an update."""
        if self._device.type != "cpu":
            # No cache is left by then, and one unit's graph takes less memory than those of all.
            return [_run_together([subject], samples)[0] for subject in subjects]
        return _run_together(subjects, samples)

    def _subject(self, case: Case) -> "_Subject":
        unit = self._real(case.unit)
        evaluator = Evaluator(
            unit,
            index=case.index,
            name=f"unit {case.index}",
            seed=0,
            device=self._device,
            autocast_dtype=self._autocast_dtype,
        )
        keeper = build_keeper(
            evaluator, keep=case.keeping.keep, statistics_in_forward=False, input_gradient=case.index > 0
        )
        parameters = [(name, p) for name, p in unit.named_parameters() if p.requires_grad]
        optimizer = build_optimizer(self._optimizer, parameters, lr=0.0, weight_decay=1e-4)
        stage = Stage(
            index=0,
            keepers=[keeper],
            stashes=[False],
            updater=Updater(optimizer, learning_rate=lambda update: 0.0),
            loss=cross_entropy if case.is_last else None,
        )
        return _Subject(stage, case.shapes, self._device, self._format)

    def _real(self, unit: nn.Module) -> nn.Module:
        """Return a copy on the device with numbers in it."""
        copied = _without_memory(unit).to_empty(device=self._device)
        generator = torch.Generator(self._device).manual_seed(0)
        with torch.no_grad():
            for tensor in [*copied.parameters(), *copied.buffers()]:
                if tensor.is_floating_point():
                    tensor.normal_(0.0, 0.05, generator=generator)
                else:
                    tensor.zero_()
        return copied.to(memory_format=self._format)


class _Subject:
    """One unit as a stage of its own, with inputs of random numbers."""

    def __init__(
        self,
        stage: Stage,
        shapes: tuple[tuple[int, ...], ...],
        device: torch.device,
        memory_format: torch.memory_format,
    ) -> None:
        self._stage = stage
        self._shapes = shapes
        self._device = device
        self._format = memory_format
        self._inputs: dict[int, Activation] = {}
        self._outputs: Activation | None = None

    def forward_s(self, samples: int) -> float:
        """Run a forward."""
        inputs = self._activation(samples)
        begin = self._now()
        if self._stage.loss is None:
            self._outputs = self._stage.forward(inputs)
        else:
            # The head's forward and backward are one operation: a forward by itself tells its part.
            keeper = self._stage.keepers[0]
            keeper.forward(inputs.streams, microbatch=inputs.microbatch, parameters=None)
        return self._now() - begin

    def backward_s(self, samples: int, *, forward_s: float) -> float:
        """Run the backward of that forward."""
        if self._outputs is None:
            begin = self._now()
            self._stage.forward_backward(self._activation(samples), group_size=1)
            return max(0.0, self._now() - begin - forward_s)
        gradients = tuple(torch.full_like(y, 1e-3) for y in self._outputs.streams)
        message = Gradient(self._outputs.microbatch, self._outputs.streams, gradients)
        self._outputs = None
        begin = self._now()
        self._stage.backward(message, group_size=1)
        return self._now() - begin

    def update_s(self) -> float:
        """Run an update."""
        begin = self._now()
        self._stage.update(partial=False)
        return self._now() - begin

    def accumulate_s(self) -> float:
        """Add a further gradient."""
        gradients = [p.grad for p in self._stage.keepers[0].evaluator.parameters if p.grad is not None]
        others = [torch.zeros_like(g) for g in gradients]
        begin = self._now()
        for gradient, other in zip(gradients, others, strict=True):
            gradient.add_(other, alpha=0.5)
        return self._now() - begin

    def _activation(self, samples: int) -> Activation:
        if samples not in self._inputs:
            streams = tuple(self._random(samples, shape) for shape in self._shapes)
            labels = torch.zeros(samples, dtype=torch.int64, device=self._device)
            self._inputs[samples] = Activation(0, streams, labels)
        return self._inputs[samples]

    def _random(self, samples: int, shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(samples, *shape, device=self._device)
        return x.contiguous(memory_format=self._format) if x.ndim == 4 else x

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _run_together(subjects: Sequence[_Subject], samples: int) -> list[UnitTimes]:
    forwards = [subject.forward_s(samples) for subject in subjects]
    backwards = [
        subject.backward_s(samples, forward_s=forward_s)
        for subject, forward_s in zip(reversed(subjects), reversed(forwards), strict=True)
    ]
    accumulates = [subject.accumulate_s() for subject in subjects]
    updates = [subject.update_s() for subject in subjects]
    return [UnitTimes(*row) for row in zip(forwards, reversed(backwards), updates, accumulates, strict=True)]


def _medians(runs: Sequence[UnitTimes]) -> UnitTimes:
    return UnitTimes(
        forward_s=statistics.median(run.forward_s for run in runs),
        backward_s=statistics.median(run.backward_s for run in runs),
        update_s=statistics.median(run.update_s for run in runs),
        accumulate_s=statistics.median(run.accumulate_s for run in runs),
    )


def _line(found: Sequence[UnitTimes], sizes: Sequence[int], batch_size: int) -> UnitTimes:
    """Return the times for `batch_size`; updates do not depend on it."""
    small, large = found[0], found[-1]
    return UnitTimes(
        forward_s=on_line(small.forward_s, large.forward_s, factor=batch_size / sizes[-1]),
        backward_s=on_line(small.backward_s, large.backward_s, factor=batch_size / sizes[-1]),
        update_s=large.update_s,
        accumulate_s=large.accumulate_s,
    )


def on_line(half_s: float, whole_s: float, *, factor: float) -> float:
    """Return the time of `factor` x as many samples as took `whole_s`, half of which took `half_s`."""
    whole_s = max(half_s, whole_s)  # noise
    fixed_s = max(0.0, 2.0 * half_s - whole_s)
    return fixed_s + (whole_s - fixed_s) * factor


def _without_memory(unit: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for p in unit.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for buffer in unit.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(unit, memo=memo)
