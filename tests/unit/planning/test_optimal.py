"""The best stages: equal to brute force also with unequal devices, messages and memory."""

import importlib.util
import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from petractl.methods.family import keepings, method_spec
from petractl.models.registry import build_model, list_models
from petractl.models.units import is_reversible
from petractl.planning.flops import unit_costs
from petractl.planning.net import times_by_flops
from petractl.planning.optimal import cheapest_path, optimal_cuts, stage_times


class Case:
    """A random net, devices, links and memory."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.units = draw.randint(1, 9)
        self.stages = draw.randint(1, self.units)
        self.overlapped = draw.random() < 0.5
        times = [draw.choice([0.0, 1.0, 2.0, draw.random()]) for _ in range(self.units)]
        self.times = np.array(times)
        if draw.random() < 0.5:
            speeds = [draw.choice([1.0, 1.0, 2.0, 0.5]) for _ in range(self.stages)]
            self.times = self.times[None, :] / np.array(speeds)[:, None]
        shape = (self.stages, self.units + 1) if draw.random() < 0.5 else (self.units + 1,)
        generator = np.random.default_rng(seed)
        self.crossing = generator.random(shape) * draw.choice([0.0, 0.5, 2.0])
        self.bytes = generator.random((self.stages, self.units))
        self.limit = draw.choice([np.inf, 1.0, 2.0, 3.0])

    def fits(self, stage: int) -> np.ndarray:
        ends = np.concatenate([[0.0], np.cumsum(self.bytes[stage])])
        return ends[:, None] - ends[None, :] <= self.limit

    def cost(self, stage: int, first: int, end: int) -> float:
        times = self.times if self.times.ndim == 1 else self.times[stage]
        crossing = np.broadcast_to(self.crossing, (self.stages, self.units + 1))
        below = crossing[stage][first] if first else 0.0
        above = crossing[stage + 1][end] if end < self.units else 0.0
        if sum(self.bytes[stage][first:end]) > self.limit:
            return np.inf
        busy = sum(times[first:end])
        return max(busy, below, above) if self.overlapped else busy + below + above

    def quality(self, cuts: Sequence[int]) -> tuple[float, float]:
        edges = itertools.pairwise([0, *cuts, self.units])
        costs = [self.cost(j, first, end) for j, (first, end) in enumerate(edges)]
        return max(costs), sum(c * c for c in costs)

    def best(self) -> tuple[float, float]:
        return min(
            self.quality(cuts) for cuts in itertools.combinations(range(1, self.units), self.stages - 1)
        )


def test_equal_to_brute_force_on_500_cases() -> None:
    fitting = 0
    for seed in range(500):
        case = Case(seed)
        cuts = optimal_cuts(
            case.times,
            num_stages=case.stages,
            crossing_s=case.crossing,
            overlapped=case.overlapped,
            fits=case.fits if np.isfinite(case.limit) else None,
        )
        best = case.best()
        if cuts is None:
            assert not np.isfinite(best[0]), seed
            continue
        fitting += 1
        assert case.quality(cuts) == pytest.approx(best, rel=1e-9, abs=1e-12), seed
        if np.isfinite(case.limit):
            continue
        times = stage_times(case.times, cuts, crossing_s=case.crossing, overlapped=case.overlapped)
        assert max(times) == pytest.approx(best[0])
    assert fitting > 400


@pytest.mark.parametrize("kind", ["equal", "unequal", "messages", "memory"])
def test_a_thousand_units_on_64_devices_in_a_second(kind: str) -> None:
    generator = np.random.default_rng(0)
    times = generator.random(1000)
    if kind == "unequal":
        times = times / generator.random((64, 1))
    memory = np.concatenate([[0.0], np.cumsum(generator.random(1000))])
    need = memory[:, None] - memory[None, :]
    started = time.process_time()
    cuts = optimal_cuts(
        times,
        num_stages=64,
        crossing_s=generator.random(1001) if kind == "messages" else None,
        fits=(lambda j: need * (1 + (63 - j) / 63) <= 40.0) if kind == "memory" else None,
    )
    assert time.process_time() - started < 1.0
    assert cuts is not None


def test_nothing_fits() -> None:
    assert optimal_cuts([1.0, 1.0], num_stages=2, fits=lambda j: np.zeros((3, 3), dtype=bool)) is None


def rules() -> ModuleType:
    """Return the benchmark's module of others' rules."""
    path = Path(__file__).parents[3] / "benchmarks" / "partition" / "rules.py"
    spec = importlib.util.spec_from_file_location("partition_rules", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", list_models())
def test_never_worse_than_the_rules_of_others(name: str) -> None:
    with torch.device("meta"):
        units = build_model(name, classes=1000, stem="imagenet").units
    costs = unit_costs(units, input_shape=(3, 224, 224))
    kept = keepings(method_spec("petra"), [is_reversible(unit) for unit in units])
    times = [t.forward_s + t.backward_s for t in times_by_flops(costs, kept, batch_size=64)]
    others = rules()
    for stages in range(1, min(len(units), 16) + 1):
        cuts = optimal_cuts(times, num_stages=stages)
        assert cuts is not None
        slowest = max(stage_times(times, cuts))
        assert slowest <= others.block_partition(times, stages) * (1 + 1e-9)
        assert slowest <= others.bisection(times, stages) * (1 + 1e-9)


def test_revnet34_on_8_devices() -> None:
    with torch.device("meta"):
        units = build_model("revnet34", classes=1000, stem="imagenet").units
    costs = unit_costs(units, input_shape=(3, 224, 224))
    kept = keepings(method_spec("petra"), [is_reversible(unit) for unit in units])
    times = [t.forward_s + t.backward_s for t in times_by_flops(costs, kept, batch_size=64)]
    cuts = optimal_cuts(times, num_stages=8)
    assert cuts is not None
    assert max(stage_times(times, cuts)) / (sum(times) / 8) == pytest.approx(1.36, abs=0.01)


def test_what_is_out_of_reach_need_not_be_looked_at() -> None:
    generator = np.random.default_rng(3)
    costs = generator.random((301, 301))
    lengths = np.arange(301)[:, None] - np.arange(301)[None, :]
    costs[(lengths < 1) | (lengths > 40)] = np.inf

    def block(step: int, rows: slice, columns: slice) -> np.ndarray:
        return costs[rows, columns]

    for stages in (8, 20, 300):
        for combine in (np.add, np.maximum):
            whole = cheapest_path(block, num_units=300, num_stages=stages, combine=combine)
            near = cheapest_path(block, num_units=300, num_stages=stages, combine=combine, most_units=40)
            assert whole == near
