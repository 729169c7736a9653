"""Plans: cuts, predictions, and what is said where nothing fits."""

from dataclasses import replace

import pytest
import torch

from petractl.errors import UserError
from petractl.methods.family import keepings, method_spec
from petractl.models.registry import build_model
from petractl.models.units import is_reversible
from petractl.planning.choices import device_counts, plan_or_refuse
from petractl.planning.costing import Clock, cost_net
from petractl.planning.devices import GIB, DeviceSpec, devices_of
from petractl.planning.flops import unit_costs
from petractl.planning.net import Net
from petractl.planning.plan import Setting, plan_pipeline
from petractl.planning.profile import measure_units
from petractl.planning.references import references_of

NOMINAL = DeviceSpec("nominal")


def net_of(name: str = "revnet34", method: str = "petra", *, keep: str = "", batch: int = 64) -> Net:
    with torch.device("meta"):
        built = build_model(name, classes=1000, stem="imagenet")
    return cost_net(
        built.units,
        built.names,
        method=method_spec(method, keep=keep),
        input_shape=(3, 224, 224),
        batch_size=batch,
        clock=Clock(),
    )


@pytest.fixture(scope="module")
def revnet34() -> Net:
    return net_of()


def setting(count: int, *, memory_gib: float | None = None, **changes: object) -> Setting:
    device = replace(NOMINAL, memory_bytes=None if memory_gib is None else int(memory_gib * GIB))
    base = Setting(devices=(device,) * count, speeds=(1.0,) * count)
    return replace(base, **changes)  # type: ignore[arg-type]


def test_revnet34_on_8(revnet34: Net) -> None:
    plan = plan_or_refuse(revnet34, setting(8))
    assert plan.forecast.slowest_over_mean == pytest.approx(1.36, abs=0.01)
    slowest = max(stage.time_s for stage in plan.stages)
    assert plan.forecast.images_per_s == pytest.approx(64 / slowest, rel=1e-3)
    # PETRA's limit is 3J/4 times plain model parallelism, divided by the unbalance.
    references = references_of(revnet34, plan.setting, footprints=None, cuts=plan.cuts)
    ratio = references.over_model_parallel(plan.forecast.images_per_s)
    assert ratio == pytest.approx(6 / 1.36, rel=0.01)
    assert [stage.staleness for stage in plan.stages] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert sum(stage.parameters for stage in plan.stages) == 22_319_208
    counts = {count.devices: count.slowest_over_mean for count in device_counts(revnet34, plan.setting)}
    assert counts[9] < 1.15 < 1.3 < counts[8]


def test_unequal_devices_get_unequal_stages(revnet34: Net) -> None:
    devices = devices_of("v100-16gb,a100-40gb,h100-80gb", count=3)
    plan = plan_or_refuse(
        revnet34, Setting(devices=devices, speeds=tuple(spec.tflops or 1.0 for spec in devices))
    )
    sizes = [stage.end - stage.first for stage in plan.stages]
    assert sizes[2] > 2 * sizes[0]
    assert plan.forecast.slowest_over_mean < 1.3


@pytest.mark.parametrize("balance", ["time", "flops", "memory", "parameters", "uniform"])
def test_every_balance_makes_its_own_cost_even(revnet34: Net, balance: str) -> None:
    def spread(other: str) -> float:
        plan = plan_pipeline(revnet34, setting(4, balance=other))
        assert plan is not None
        cost = {
            "time": lambda s: s.time_s,
            "flops": lambda s: s.time_s,
            "memory": lambda s: s.memory.total,
            "parameters": lambda s: s.parameters,
            "uniform": lambda s: s.end - s.first,
        }[balance]
        return max(cost(stage) for stage in plan.stages)

    assert spread(balance) == min(map(spread, ["time", "flops", "memory", "parameters", "uniform"]))


def test_memory_limits_move_the_cuts_or_are_told() -> None:
    net = net_of(method="delayed", keep="graph")
    free = plan_or_refuse(net, setting(4))
    limit = 0.9 * free.most_memory_bytes / GIB
    plan = plan_or_refuse(net, setting(4, memory_gib=limit))
    assert plan.fits
    assert plan.cuts != free.cuts
    said = r"stage \d of 4 needs at least .* GiB, and its device \(nominal\) has 1 GiB"
    with pytest.raises(UserError, match=said) as caught:
        plan_or_refuse(net, setting(4, memory_gib=1.0))
    assert "batches of" in caught.value.hint
    assert "devices of" in caught.value.hint
    # Given cuts are looked at, fitting or not.
    assert not plan_or_refuse(net, setting(4, memory_gib=1.0, cuts=(5, 9, 13))).fits


def test_least_is_never_above_tight_without_latency(revnet34: Net) -> None:
    plan = plan_pipeline(revnet34, setting(18, schedule="least"))
    assert plan is not None
    assert [stage.lookahead for stage in plan.stages] == list(plan.least)
    assert all(least <= 17 - j for j, least in enumerate(plan.least))
    assert sum(plan.least) < sum(range(18))


def test_locked_methods_have_no_staleness() -> None:
    net = net_of("resnet18", "backprop")
    plan = plan_pipeline(net, setting(4, schedule="auto"))
    assert plan is not None
    references = references_of(net, plan.setting, footprints=None, cuts=plan.cuts)
    assert references.over_model_parallel(plan.forecast.images_per_s) == pytest.approx(1.0)
    assert {stage.staleness for stage in plan.stages} == {0.0}
    assert plan.forecast.idle_percent == pytest.approx(75, abs=1)


def test_wrong_cuts_and_lookaheads(revnet34: Net) -> None:
    with pytest.raises(UserError, match="2 cuts make 3 stages"):
        plan_pipeline(revnet34, setting(4, cuts=(3, 5)))
    with pytest.raises(UserError, match="past the last unit"):
        plan_pipeline(revnet34, setting(2, cuts=(40,)))
    with pytest.raises(UserError, match="entries for 4 stages"):
        plan_pipeline(revnet34, setting(4, schedule=(1, 0)))
    with pytest.raises(UserError, match=r"stages\(19\) > units\(18\)"):
        plan_pipeline(revnet34, setting(19))


def test_measured_times_are_cached(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with torch.device("meta"):
        units = build_model("revnet18", classes=10, width=8).units
    kept = keepings(method_spec("petra"), [is_reversible(unit) for unit in units])
    costs = unit_costs(units, input_shape=(3, 32, 32))
    arguments = {"input_shape": (3, 32, 32), "batch_size": 4, "device": torch.device("cpu")}
    first = measure_units(units, (kept,), costs, **arguments)
    assert all(t.forward_s > 0 and t.backward_s > 0 for t in first.times[0])
    assert first.times[0][1] == first.times[0][2], "equal units are measured once"
    assert measure_units(units, (kept,), costs, **arguments).times == first.times
    assert measure_units(units, (kept,), costs, use_cache=False, **arguments).times != first.times
