"""Choices around a plan: replicas, other numbers of devices, what would fit; against every cut there is."""

import itertools
from dataclasses import replace

import pytest
import torch

from petractl.errors import UserError
from petractl.methods.family import method_spec
from petractl.models.registry import build_model
from petractl.planning.choices import choose_replicas, device_counts, plan_or_refuse
from petractl.planning.costing import Clock, cost_net
from petractl.planning.devices import GIB, DeviceSpec
from petractl.planning.net import Net
from petractl.planning.plan import Setting, choose_cuts, emptiest_plan, plan_pipeline
from petractl.planning.times import StageTimes


def net_of(
    name: str = "revnet18",
    method: str = "petra",
    *,
    keep: str = "",
    batch: int = 8,
    width: int = 16,
    side: int = 32,
) -> Net:
    with torch.device("meta"):
        built = build_model(name, classes=10, stem="cifar", width=width)
    return cost_net(
        built.units,
        built.names,
        method=method_spec(method, keep=keep),
        input_shape=(3, side, side),
        batch_size=batch,
        clock=Clock(),
    )


@pytest.fixture(scope="module")
def revnet18() -> Net:
    return net_of()


def setting(count: int, *, memory_bytes: float | None = None, **changes: object) -> Setting:
    device = DeviceSpec("d", memory_bytes=None if memory_bytes is None else int(memory_bytes))
    base = Setting(devices=(device,) * count, speeds=(1.0,) * count)
    return replace(base, **changes)  # type: ignore[arg-type]


def all_cuts(net: Net, stages: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(1, net.num_units), stages - 1))


def need(net: Net, stages: int, **changes: object) -> int:
    """Return the bytes of the fullest stage where it holds the least."""
    return emptiest_plan(net, setting(stages, **changes)).most_memory_bytes


def test_more_devices_are_told_where_they_help() -> None:
    net = net_of(batch=2, width=64)
    small, large = need(net, 3), need(net, 2)
    assert small < 0.95 * large
    limit = 1.001 * small
    with pytest.raises(UserError) as caught:
        plan_or_refuse(net, setting(2, memory_bytes=limit))
    assert ">= 3 devices" in caught.value.hint
    assert plan_or_refuse(net, setting(3, memory_bytes=limit)).fits
    # Two replicas need as many each.
    with pytest.raises(UserError) as caught:
        choose_replicas(net, setting(4, memory_bytes=limit), replicas=2)
    assert ">= 6 devices" in caught.value.hint


def test_a_larger_k_is_told_where_it_helps() -> None:
    net = net_of("revnet-iso", "delayed", keep="inputs+parameters", batch=2, width=64, side=8)
    small, large = need(net, 5, schedule="paper", accumulation=2), need(net, 5, schedule="paper")
    assert small < 0.95 * large
    limited = setting(5, memory_bytes=1.001 * small, schedule="paper")
    with pytest.raises(UserError) as caught:
        plan_or_refuse(net, limited)
    assert "k = 2 (--accumulation)" in caught.value.hint
    assert plan_or_refuse(net, replace(limited, accumulation=2)).fits


@pytest.mark.parametrize("balance", ["uniform", "parameters"])
def test_what_looks_at_no_memory_names_its_own_worst_stage(revnet18: Net, balance: str) -> None:
    blind = plan_pipeline(revnet18, setting(4, balance=balance))
    assert blind is not None
    limit = blind.most_memory_bytes - 1
    worst = blind.fullest
    by_time = plan_pipeline(revnet18, setting(4, memory_bytes=limit))
    said = rf"stage {worst.index} of 4 needs [\d.]+ GiB, and its device \(d\)"
    with pytest.raises(UserError, match=said) as caught:
        plan_or_refuse(revnet18, setting(4, memory_bytes=limit, balance=balance))
    assert (caught.value.hint == "--balance time fits") == (by_time is not None)


def test_the_stage_that_is_too_large_is_the_one_named() -> None:
    """Not the fullest one with the smallest device."""
    net = net_of(method="delayed", keep="graph")
    total = need(net, 1)
    devices = (DeviceSpec("large", memory_bytes=4 * total), DeviceSpec("small", memory_bytes=1000))
    with pytest.raises(UserError, match=r"stage 1 of 2 .*\(small\) has 0 GiB") as caught:
        plan_or_refuse(net, Setting(devices=devices, speeds=(1.0, 1.0)))
    assert "for stage 1" in caught.value.hint


def test_unequal_memory_is_filled_to_equal_shares() -> None:
    net = net_of(method="delayed", keep="graph")
    lookahead = (2, 1, 0)
    model = net.memory(accumulation=1)
    one = need(net, 3)
    fitting = 0
    for parts in ((0.7, 3.0, 1.5), (3.0, 0.7, 0.5), (1.1, None, 1.1), (2.0, 1.0, 4.0), (0.1, 0.1, 0.2)):
        memory = tuple(None if part is None else int(part * one) for part in parts)
        largest = max(n for n in memory if n)

        def quality(cuts: tuple[int, ...], memory: tuple = memory, largest: int = largest) -> tuple:
            sizes = [int(stage.total) for stage in model.stages(cuts, lookahead=lookahead)]
            too_large = any(n is not None and size > n for size, n in zip(sizes, memory, strict=True))
            return too_large, max(size / (n or largest) for size, n in zip(sizes, memory, strict=True))

        devices = tuple(DeviceSpec("d", memory_bytes=n) for n in memory)
        asked = Setting(devices=devices, speeds=(1.0,) * 3, balance="memory")
        best = min(quality(cuts) for cuts in all_cuts(net, 3))
        assert quality(emptiest_plan(net, asked).cuts) == pytest.approx(best)
        assert (choose_cuts(net, asked) is None) == best[0]
        fitting += not best[0]
    assert 2 <= fitting < 5


def test_the_least_lookahead_of_the_cuts_themselves_must_fit() -> None:
    """With latency it is above tight's, which must not be what the cuts are fitted for."""
    net = net_of(method="delayed", keep="graph")
    device = DeviceSpec("d", link_latency_s=3 * net.times[3].backward_s)
    free = Setting(devices=(device,) * 3, speeds=(1.0,) * 3, schedule="least")
    first = plan_pipeline(net, free)
    assert first is not None
    assert first.least[0] > 2, "above tight's"
    moved = 0
    for part in (0.99, 0.95, 0.9, 0.85, 0.8):
        limit = int(part * first.most_memory_bytes)
        limited = replace(free, devices=(replace(device, memory_bytes=limit),) * 3)
        plan = plan_pipeline(net, limited)
        if plan is None:
            continue
        moved += 1
        assert plan.fits
        assert [stage.lookahead for stage in plan.stages] == list(plan.least)
    assert moved


def test_replicas(revnet18: Net) -> None:
    choices = choose_replicas(revnet18, setting(8), replicas=None)
    assert {(c.replicas, c.stages) for c in choices} == {(1, 8), (2, 4), (4, 2), (8, 1)}
    rates = [c.images_per_s for c in choices]
    assert rates == sorted(rates, reverse=True)
    assert [c.replicas for c in choose_replicas(revnet18, setting(8), replicas=2)] == [2]
    with pytest.raises(UserError, match=r"8 GPUs / replicas\(3\)") as caught:
        choose_replicas(revnet18, setting(8), replicas=3)
    assert "1, 2, 4, 8" in caught.value.hint


def test_averaging_takes_time_and_leaves_devices_idle(revnet18: Net) -> None:
    def planned(bytes_per_s: float | None) -> tuple[float, float]:
        device = DeviceSpec("d", link_bytes_per_s=bytes_per_s)
        asked = Setting(devices=(device,) * 4, speeds=(1.0,) * 4)
        (choice,) = choose_replicas(revnet18, asked, replicas=2)
        assert choice.plan is not None
        slowest = max(stage.time_s + stage.update_s for stage in choice.plan.stages)
        assert choice.images_per_s == pytest.approx(2 * revnet18.batch_size / slowest, rel=0.01)
        return choice.images_per_s, max(stage.update_s for stage in choice.plan.stages)

    (free, nothing), (slow, waited) = planned(None), planned(1e9)
    assert nothing == 0.0
    assert waited > 0.0
    assert slow < 0.95 * free


def test_replicas_that_do_not_fit_come_last() -> None:
    net = net_of(method="delayed", keep="inputs+parameters")
    whole, parts = need(net, 1), need(net, 4)
    assert whole != parts
    limit = (whole + parts) / 2
    choices = choose_replicas(net, setting(4, memory_bytes=limit), replicas=None)
    assert choices[0].plan is not None
    assert choices[-1].plan is None
    assert choices[-1].images_per_s == 0.0


@pytest.mark.parametrize("speeds", [(8.0, 1.0, 1.0, 8.0), (1.0, 2.0, 4.0, 3.0), (2.0, 2.0, 1.0, 1.0)])
def test_unequal_replicas_have_one_set_of_cuts(revnet18: Net, speeds: tuple[float, ...]) -> None:
    """Every cut that both replicas could have, and the pace of the slower copy of each stage."""
    devices = tuple(DeviceSpec(f"d{n}", tflops=speed) for n, speed in enumerate(speeds))
    asked = Setting(devices=devices, speeds=speeds)
    (choice,) = choose_replicas(revnet18, asked, replicas=2)

    def slowest(times: tuple[StageTimes, ...]) -> float:
        return max(time.busy_s for time in times)

    best = min(
        max(slowest(revnet18.stage_times(cuts, speeds=half)) for half in (speeds[:2], speeds[2:]))
        for cuts in all_cuts(revnet18, 2)
    )
    assert choice.images_per_s == pytest.approx(2 * revnet18.batch_size / best, rel=1e-3)
    assert choice.plan is not None
    assert choice.plan.stages[0].device == "d0 + d2"


def test_replicas_must_fit_on_the_smallest_copy() -> None:
    net = net_of(method="delayed", keep="graph")
    large, small = need(net, 1) * 4, int(need(net, 2) * 1.05)
    memory = (large, small, small, large)
    devices = tuple(DeviceSpec("d", memory_bytes=size) for size in memory)
    (choice,) = choose_replicas(net, Setting(devices=devices, speeds=(1.0,) * 4), replicas=2)
    assert choice.plan is not None
    assert {stage.memory_limit_bytes for stage in choice.plan.stages} == {small}
    assert choice.plan.fits


def test_other_numbers_of_devices_go_by_the_setting(revnet18: Net) -> None:
    def rates(**changes: object) -> dict[int, float]:
        counts = device_counts(revnet18, setting(4, **changes))
        return {count.devices: count.images_per_s for count in counts}

    free = rates()
    assert 4 in free
    for balance in ("uniform", "time"):
        plan = plan_pipeline(revnet18, setting(4, balance=balance))
        assert plan is not None
        assert rates(balance=balance)[4] == pytest.approx(plan.forecast.limit_images_per_s)
    assert rates(balance="uniform")[4] < free[4]
    update = replace(revnet18, times=tuple(replace(t, update_s=t.forward_s) for t in revnet18.times))
    (once, often) = (
        {c.devices: c.images_per_s for c in device_counts(update, setting(4, accumulation=k))}[4]
        for k in (1, 8)
    )
    assert once < 0.9 * often < free[4]
    link = DeviceSpec("d", link_bytes_per_s=1e6)
    slow = {c.devices: c.images_per_s for c in device_counts(revnet18, setting(4, devices=(link,) * 4))}
    assert slow[4] < 0.5 * free[4]
    assert slow[1] == pytest.approx(free.get(1, slow[1]))
    # What does not fit is not offered.
    few = rates(memory_bytes=need(revnet18, 4) * 1.001)
    assert 4 in few
    assert all(need(revnet18, count) <= need(revnet18, 4) * 1.001 for count in few)


def test_gib_are_those_that_were_given() -> None:
    net = net_of(batch=512, width=64)
    with pytest.raises(UserError, match=r"has 1\.8 GiB"):
        plan_or_refuse(net, setting(2, memory_bytes=1.8 * GIB))
