"""The time of each unit's forward and backward, measured with the engine's own code on the device at hand.

Units that are equal (same module, parameters and input) are measured once, on random numbers, each as its
method runs it: with a graph, from a kept input, or rebuilt (`unit_bench`). Results are cached by everything
that they depend on.
"""

import hashlib
import json
import logging
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import petractl
from petractl.engine.memory import keep_freed_memory
from petractl.methods.family import Keeping
from petractl.planning.flops import UnitCost
from petractl.planning.rival import rivals
from petractl.planning.unit_bench import Case, UnitBench, UnitTimes

_LOGGER = logging.getLogger(__name__)
_BUDGET_S = 8.0
_MEASURED_HOW = 2
"""Counts the changes of what is measured: times in the cache that were measured otherwise are not used."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The times of all units under each method, and the most samples that were measured at a time."""

    times: tuple[tuple[UnitTimes, ...], ...]
    """By method and by unit."""
    samples: int
    device: str


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
    optimizer: str = "sgd",
    processes: int = 1,
    budget_s: float = _BUDGET_S,
    use_cache: bool = True,
) -> Measured:
    """Measure every unit on microbatches of `batch_size`; the units may be on the meta device.

    `methods` say what each unit keeps, once for every method. What is to be compared is measured in turn, so
    that a machine that slows down slows all of it.

    `processes` train side by side on this machine's CPU: all others are kept busy meanwhile, as far as there
    are cores for them. `costs` are the units' (for the shapes between them). `budget_s` is about what it may
    take on a CPU.
    """
    shapes = [(tuple(input_shape),), *(cost.output_shapes for cost in costs[:-1])]
    cases = [
        [
            _case(unit, keeping, n, shape, is_last=n == len(units) - 1)
            for n, (unit, keeping, shape) in enumerate(zip(units, kept, shapes, strict=True))
        ]
        for kept in methods
    ]
    unique = {case.key: case for each in cases for case in each}
    others = _rivals(device, processes)
    facts = _facts(device, batch_size, autocast_dtype, channels_last, optimizer, others)
    found, samples = _read_cache(unique, facts) if use_cache else ({}, batch_size)
    missing = [case for key, case in unique.items() if key not in found]
    if missing:
        keep_freed_memory()
        bench = UnitBench(
            device, autocast_dtype=autocast_dtype, channels_last=channels_last, optimizer=optimizer
        )
        with rivals(others, threads=torch.get_num_threads()):
            new, samples = bench.measure(missing, batch_size=batch_size, budget_s=budget_s)
        found |= new
        if use_cache:
            _write_cache(new, facts, samples)
    times = tuple(tuple(found[case.key] for case in each) for each in cases)
    return Measured(times, samples, device_name(device))


def _rivals(device: torch.device, processes: int) -> int:
    """Return how many other processes are kept busy, at most as many as have cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(processes, cores // torch.get_num_threads()) - 1) if device.type == "cpu" else 0


def _case(
    unit: nn.Module, keeping: Keeping, index: int, shapes: tuple[tuple[int, ...], ...], *, is_last: bool
) -> Case:
    """Return the case under a key of what tells units apart; images that come in need no gradient."""
    kind = type(unit)
    sizes = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in unit.named_parameters()]
    place = (index > 0, is_last)
    text = repr((kind.__module__, kind.__qualname__, repr(unit), sizes, shapes, str(keeping.keep), place))
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    return Case(key, unit, keeping, index, shapes, is_last)


def _facts(
    device: torch.device,
    batch_size: int,
    autocast_dtype: torch.dtype | None,
    channels_last: bool,
    optimizer: str,
    others: int,
) -> str:
    facts = (
        _MEASURED_HOW,
        device_name(device),
        torch.__version__,
        petractl.__version__,
        batch_size,
        str(autocast_dtype),
        channels_last,
        optimizer,
        others,
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _read_cache(unique: dict[str, Case], facts: str) -> tuple[dict[str, UnitTimes], int]:
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
