"""Measured times: units, messages, and what keeps the other cores busy meanwhile."""

import os
import subprocess

import pytest
import torch
from torch import nn

from petractl.methods.family import keepings, method_spec
from petractl.models.registry import build_model
from petractl.models.units import is_reversible
from petractl.planning import message_cost, profile
from petractl.planning.flops import UnitCost, unit_costs
from petractl.planning.message_cost import MessageCost, measure_messages
from petractl.planning.profile import Measured, measure_units
from petractl.planning.rival import rivals
from petractl.planning.times import Link
from petractl.planning.unit_bench import Case, UnitBench, on_line

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def small_net() -> tuple[list[nn.Module], tuple[UnitCost, ...]]:
    with torch.device("meta"):
        units = list(build_model("revnet18", classes=10, width=4).units)
    return units, tuple(unit_costs(units, input_shape=(3, 16, 16)))


def measured(method: str = "petra", *, batch_size: int = 4, **changes: object) -> Measured:
    units, costs = small_net()
    kept = keepings(method_spec(method), [is_reversible(unit) for unit in units])
    arguments = {"input_shape": (3, 16, 16), "batch_size": batch_size, "device": CPU, **changes}
    return measure_units(units, (kept,), costs, **arguments)  # type: ignore[arg-type]


def cases_of(method: str) -> list[Case]:
    units, costs = small_net()
    kept = keepings(method_spec(method), [is_reversible(unit) for unit in units])
    shapes = [((3, 16, 16),), *(cost.output_shapes for cost in costs[:-1])]
    last = len(units) - 1
    return [
        Case(str(n), unit, keeping, n, shape, n == last)
        for n, (unit, keeping, shape) in enumerate(zip(units, kept, shapes, strict=True))
    ]


@pytest.mark.parametrize(("fixed", "each"), [(0.0, 2.0), (3.0, 1.0), (5.0, 0.0)])
def test_a_line_goes_through_two_sizes(fixed: float, each: float) -> None:
    half, whole = fixed + 4 * each, fixed + 8 * each
    assert on_line(half, whole, factor=8) == pytest.approx(fixed + 64 * each)
    assert on_line(half, whole, factor=1) == pytest.approx(whole)


def test_noise_is_not_prolonged() -> None:
    assert on_line(4.0, 3.0, factor=10) == pytest.approx(4.0), "more samples do not take less"
    assert on_line(1.0, 4.0, factor=10) == pytest.approx(40.0), "never more than proportional"


@pytest.mark.parametrize("method", ["petra", "delayed", "backprop"])
def test_every_unit_has_all_its_times(method: str) -> None:
    found, samples = UnitBench(CPU).measure(cases_of(method), batch_size=4, budget_s=60.0)
    assert samples == 4
    assert len(found) == 10
    assert all(min(t.forward_s, t.backward_s, t.update_s, t.accumulate_s) > 0.0 for t in found.values())


def test_the_budget_decides_how_many_samples() -> None:
    bench, cases = UnitBench(CPU), cases_of("petra")
    assert bench.measure(cases, batch_size=16, budget_s=60.0)[1] == 16
    assert bench.measure(cases, batch_size=16, budget_s=0.0)[1] == 4
    assert bench.measure(cases, batch_size=3, budget_s=0.0)[1] == 3


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars", "mine:Own"])
def test_updates_are_of_the_optimiser(optimizer: str) -> None:
    found, _ = UnitBench(CPU, optimizer=optimizer).measure(cases_of("petra")[:2], batch_size=2, budget_s=1.0)
    assert all(t.update_s > 0.0 for t in found.values())


def test_equal_units_are_measured_once_and_kept() -> None:
    first = measured()
    assert first.times[0][1] == first.times[0][2]
    assert measured().times == first.times
    assert measured(use_cache=False).times != first.times


@pytest.mark.parametrize("change", [{"optimizer": "adamw"}, {"channels_last": False}, {"batch_size": 5}])
def test_the_cache_tells_what_differs(change: dict[str, object]) -> None:
    assert measured().times != measured(**change).times  # type: ignore[arg-type]


def test_times_measured_otherwise_are_not_used(monkeypatch) -> None:
    first = measured()
    monkeypatch.setattr(profile, "_MEASURED_HOW", 0)
    assert measured().times != first.times


def test_the_last_unit_is_not_like_an_equal_one_before_it() -> None:
    units = [nn.Linear(8, 8) for _ in range(3)]
    costs = unit_costs(units, input_shape=(8,))
    kept = keepings(method_spec("backprop"), [False] * 3)
    found = measure_units(units, (kept,), costs, input_shape=(8,), batch_size=4, device=CPU, use_cache=False)
    first, middle, last = found.times[0]
    assert first != middle, "images need no gradient"
    assert middle != last, "the last one has the loss"


def test_others_are_kept_busy_as_far_as_there_are_cores(monkeypatch) -> None:
    asked = []

    def busy(count: int, *, threads: int) -> object:
        asked.append((count, threads))
        return rivals(0, threads=threads)

    monkeypatch.setattr(profile, "rivals", busy)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for processes in (1, 3, 64):
            measured(processes=processes)
    finally:
        torch.set_num_threads(threads)
    assert asked == [(0, 1), (2, 1), (3, 1)]


def test_rivals_are_busy_and_end(monkeypatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: object, **keywords: object) -> None:
            super().__init__(*args, **keywords)  # type: ignore[call-overload]
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    with rivals(1, threads=1):
        assert started[0].poll() is None
    assert started[0].returncode is not None


def test_messages_cost_time_on_a_cpu_and_are_not_known_elsewhere() -> None:
    cost = measure_messages(CPU)
    assert 0.0 < cost.pack_s < cost.sending_s(2**24) < 1.0
    assert 0.0 < cost.link.latency_s < cost.link.occupied_s(2**26)
    assert measure_messages(torch.device("meta")) == MessageCost()


def test_a_machine_without_a_loopback_has_free_links(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no interface")

    monkeypatch.setattr(message_cost.dist, "ProcessGroupGloo", refuse)
    assert message_cost._loopback(64, 4096) == Link()
