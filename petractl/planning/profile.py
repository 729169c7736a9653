"""The time of each unit's forward and backward, measured with the engine's own code on the device at hand.

Units that are equal (same module, parameters and input) are measured once, on random numbers, each as its
method runs it: with a graph, from a kept input, or rebuilt. Forward and backward are the median of several
runs after a warm-up. On a CPU a full microbatch may take too long: then a smaller one is measured and scaled
up. Results are cached by everything that they depend on.
"""

import copy
import hashlib
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import petractl
from petractl.engine.memory import keep_freed_memory
from petractl.methods.evaluation import Evaluator
from petractl.methods.family import Keeping
from petractl.methods.keeping import Keeper, build_keeper
from petractl.models.units import Streams
from petractl.optim import build_optimizer
from petractl.planning.flops import UnitCost

_LOGGER = logging.getLogger(__name__)
_PILOT_SAMPLES = 2
_REPEATS = 5
_BUDGET_S = 8.0


@dataclass(frozen=True, slots=True)
class UnitTimes:
    """Seconds of a unit's forward and backward of one microbatch, and of its update."""

    forward_s: float
    backward_s: float
    update_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    """The times of all units under each method, and how many samples were measured at a time."""

    times: tuple[tuple[UnitTimes, ...], ...]
    """By method and by unit."""
    samples: int
    device: str


@dataclass(frozen=True, slots=True)
class _Case:
    """What is measured: a unit with what it keeps and its input's shape."""

    key: str
    unit: nn.Module
    keeping: Keeping
    index: int
    shapes: tuple[tuple[int, ...], ...]
    is_last: bool


def device_name(device: torch.device) -> str:
    """Return what a device is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    threads = torch.get_num_threads()
    return f"{model or platform.machine()}, {threads} {'thread' if threads == 1 else 'threads'}"


def cache_folder() -> Path:
    """Return where measured times are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "petractl" / "profile"


def measure_units(
    units: Sequence[nn.Module],
    methods: Sequence[Sequence[Keeping]],
    costs: Sequence[UnitCost],
    *,
    input_shape: Sequence[int],
    batch_size: int,
    device: torch.device,
    autocast_dtype: torch.dtype | None = None,
    channels_last: bool = True,
    budget_s: float = _BUDGET_S,
    use_cache: bool = True,
) -> Measured:
    """Measure every unit on microbatches of `batch_size`; the units may be on the meta device.

    `methods` say what each unit keeps, once for every method. What is to be compared is measured in turn, so
    that a machine that slows down slows all of it.

    `costs` are the units' (for the shapes between them). `budget_s` is about what it may take on a CPU.
    """
    shapes = [(tuple(input_shape),), *(cost.output_shapes for cost in costs[:-1])]
    cases = [
        [
            _Case(_key(unit, keeping, shape, n), unit, keeping, n, shape, n == len(units) - 1)
            for n, (unit, keeping, shape) in enumerate(zip(units, kept, shapes, strict=True))
        ]
        for kept in methods
    ]
    unique = {case.key: case for each in cases for case in each}
    facts = _facts(device, batch_size, autocast_dtype, channels_last)
    found, samples = _read_cache(unique, facts) if use_cache else ({}, batch_size)
    missing = [case for key, case in unique.items() if key not in found]
    if missing:
        keep_freed_memory()
        bench = _Bench(device, autocast_dtype, channels_last)
        samples = bench.affordable(missing, batch_size, budget_s)
        found |= bench.measure(missing, samples, batch_size / samples)
        if use_cache:
            _write_cache({case.key: found[case.key] for case in missing}, facts, samples)
    times = tuple(tuple(found[case.key] for case in each) for each in cases)
    return Measured(times, samples, device_name(device))


class _Bench:
    """Measures units on one device."""

    def __init__(self, device: torch.device, autocast_dtype: torch.dtype | None, channels_last: bool) -> None:
        self._device = device
        self._autocast_dtype = autocast_dtype
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def affordable(self, cases: Sequence[_Case], batch_size: int, budget_s: float) -> int:
        """Return how many samples can be measured at a time; all of them on a GPU."""
        if self._device.type != "cpu" or batch_size <= _PILOT_SAMPLES:
            return batch_size
        seconds = 0.0
        for case in cases:
            run = self._runs(case, _PILOT_SAMPLES)
            run()
            forward_s, backward_s = run()
            seconds += forward_s + backward_s
        whole = seconds / _PILOT_SAMPLES * batch_size * (_REPEATS + 1)
        samples = batch_size
        while whole > budget_s and samples > _PILOT_SAMPLES:
            whole, samples = whole / 2, max(_PILOT_SAMPLES, samples // 2)
        return samples

    def measure(self, cases: Sequence[_Case], samples: int, scale: float) -> dict[str, UnitTimes]:
        """Return the medians, scaled; the cases take turns."""
        runs = [self._runs(case, samples) for case in cases]
        for run in runs:
            run()
        rounds = [[run() for run in runs] for _ in range(_REPEATS)]
        return {
            case.key: UnitTimes(
                forward_s=statistics.median(each[n][0] for each in rounds) * scale,
                backward_s=statistics.median(each[n][1] for each in rounds) * scale,
                update_s=self._update_s(case),
            )
            for n, case in enumerate(cases)
        }

    def _runs(self, case: _Case, samples: int) -> Callable[[], tuple[float, float]]:
        """Return a function that runs a forward and a backward and returns their seconds."""
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
        inputs = tuple(self._random(samples, shape) for shape in case.shapes)
        labels = torch.zeros(samples, dtype=torch.int64, device=self._device)
        return lambda: self._run(keeper, inputs, labels if case.is_last else None)

    def _run(self, keeper: Keeper, inputs: Streams, labels: Tensor | None) -> tuple[float, float]:
        begin = self._now()
        outputs, kept = keeper.forward(inputs, microbatch=0, parameters=None)
        middle = self._now()
        gradients = tuple(torch.full_like(y, 1e-3) for y in outputs) if labels is None else ()
        begun = self._now()
        if labels is not None:
            logits = outputs[0].requires_grad_()
            with torch.enable_grad():
                loss = cross_entropy(logits, labels)
            gradients = torch.autograd.grad(loss, [logits])
        keeper.backward(
            kept,
            outputs if keeper.needs_outputs else None,
            gradients,
            microbatch=0,
            parameters=None,
        )
        return middle - begin, self._now() - begun

    def _update_s(self, case: _Case) -> float:
        """Return the time of the default optimiser's update of the unit."""
        unit = self._real(case.unit)
        parameters = [(name, p) for name, p in unit.named_parameters() if p.requires_grad]
        optimizer = build_optimizer("sgd", parameters, lr=0.0, momentum=0.9, weight_decay=1e-4)
        for _, p in parameters:
            p.grad = torch.zeros_like(p)
        seconds = []
        for _ in range(_REPEATS + 1):
            begin = self._now()
            optimizer.step()
            seconds.append(self._now() - begin)
        return statistics.median(seconds[1:])

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

    def _random(self, samples: int, shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(samples, *shape, device=self._device)
        return x.contiguous(memory_format=self._format) if x.ndim == 4 else x

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _without_memory(unit: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for p in unit.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for buffer in unit.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(unit, memo=memo)


def _key(unit: nn.Module, keeping: Keeping, shapes: Any, index: int) -> str:
    """Return what tells units apart: module, parameters, input, what is kept, whether images come in."""
    kind = type(unit)
    sizes = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in unit.named_parameters()]
    text = repr((kind.__module__, kind.__qualname__, repr(unit), sizes, shapes, str(keeping.keep), index > 0))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _facts(
    device: torch.device, batch_size: int, autocast_dtype: torch.dtype | None, channels_last: bool
) -> str:
    facts = (
        device_name(device),
        torch.__version__,
        petractl.__version__,
        batch_size,
        str(autocast_dtype),
        channels_last,
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _read_cache(unique: dict[str, _Case], facts: str) -> tuple[dict[str, UnitTimes], int]:
    try:
        table = json.loads((cache_folder() / f"{facts}.json").read_text(encoding="utf-8"))
        found = {key: UnitTimes(**table["units"][key]) for key in unique if key in table["units"]}
        return found, int(table["samples"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}, 0


def _write_cache(found: dict[str, UnitTimes], facts: str, samples: int) -> None:
    path = cache_folder() / f"{facts}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        table: dict[str, Any] = {"units": {}}
        if path.is_file():
            table = json.loads(path.read_text(encoding="utf-8"))
        table["units"].update({key: asdict(times) for key, times in found.items()})
        table["samples"] = samples
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(table), encoding="utf-8")
        new.replace(path)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        _LOGGER.warning("measured times are not cached: %s", error)
