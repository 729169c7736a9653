"""What the simulator is told of the stages of a cut net."""

from dataclasses import replace

import pytest
import torch

from petractl.methods.family import method_spec
from petractl.models.registry import build_model
from petractl.planning.costing import Clock, cost_net
from petractl.planning.devices import DEVICES, DeviceSpec
from petractl.planning.message_cost import MessageCost
from petractl.planning.net import Net, links_of, unit_s
from petractl.planning.plan import Setting, plan_pipeline
from petractl.planning.times import Link
from petractl.planning.unit_bench import UnitTimes

MESSAGES = MessageCost(pack_s=1.0, unpack_s=0.25, byte_s=1e-6, link=Link(0.5, 1e6))


@pytest.fixture(scope="module")
def net() -> Net:
    with torch.device("meta"):
        built = build_model("revnet18", classes=10, width=8)
    found = cost_net(
        built.units,
        built.names,
        method=method_spec("petra"),
        input_shape=(3, 32, 32),
        batch_size=4,
        clock=Clock(),
    )
    times = (UnitTimes(1.0, 3.0, 0.5, 0.125),) * 10
    return replace(found, times=times, backprop_times=times, messages=MESSAGES)


def test_operations_have_their_messages_in_them(net: Net) -> None:
    first, middle, last = net.stage_times((3, 6), speeds=(1.0,) * 3)
    up = [stage.message_up_bytes * 1e-6 for stage in (first, middle, last)]
    down = [stage.message_down_bytes * 1e-6 for stage in (first, middle, last)]
    assert up[2] == down[0] == 0.0, "nothing leaves the net"
    assert first.forward_s == pytest.approx(3 + 1 + up[0])
    assert middle.forward_s == pytest.approx(3 + 0.25 + 1 + up[1])
    assert last.forward_s == pytest.approx(4 + 0.25)
    assert first.backward_s == pytest.approx(9 + 0.25)
    assert middle.backward_s == pytest.approx(9 + 0.25 + 1 + down[1])
    assert last.backward_s == pytest.approx(12 + 1 + down[2])


def test_one_stage_has_no_messages(net: Net) -> None:
    (only,) = net.stage_times((), speeds=(1.0,))
    assert (only.forward_s, only.backward_s, only.update_s) == (10.0, 30.0, 5.0)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_further_gradients_of_a_group_are_added(net: Net, k: int) -> None:
    (only,) = net.stage_times((), speeds=(1.0,), accumulation=k)
    assert only.backward_s == pytest.approx(30 + 10 * 0.125 * (k - 1) / k)
    per_microbatch = only.busy_s + only.update_s / k
    assert sum(unit_s(t, accumulation=k) for t in net.times) == pytest.approx(per_microbatch)
    assert net.unit_times_s(accumulation=k, speeds=(1.0,)).sum() == pytest.approx(per_microbatch)


def test_batch_size_changes_no_update(net: Net) -> None:
    twice = net.with_batch(8)
    assert twice.times[0] == UnitTimes(2.0, 6.0, 0.5, 0.125)
    assert twice.messages is net.messages


def test_links_that_no_device_tells_are_the_measured_ones() -> None:
    here, given = DeviceSpec("cpu"), DEVICES["a100-40gb"]
    assert links_of((here, here, given), unknown=MESSAGES.link) == (
        MESSAGES.link,
        Link(0.0, given.link_bytes_per_s or 0.0),
    )
    assert links_of((here, here)) == (Link(),)


def test_the_way_of_messages_slows_a_locked_pipeline(net: Net) -> None:
    devices = (DeviceSpec("cpu"),) * 2
    locked = replace(net, locked=True)
    setting = Setting(devices=devices, speeds=(1.0, 1.0), schedule="sequential", cuts=(5,))
    plan = plan_pipeline(locked, setting)
    free = plan_pipeline(replace(locked, messages=MessageCost()), setting)
    assert plan is not None
    assert free is not None
    assert free.forecast.images_per_s == pytest.approx(4 / (40 + 2.5))
    up, down = plan.stages[0].forward_s - 5, plan.stages[1].backward_s - 15
    link = MESSAGES.link
    sizes = [stage.memory.total for stage in plan.stages]
    assert all(sizes)
    ways = sum(
        link.latency_s + link.occupied_s(round((seconds - other) * 1e6))
        for seconds, other in ((up, 1.0), (down, 1.0 + 0.25 - 0.25))
    )
    per_microbatch = 40 + 2.5 + up + down + 0.5 + ways
    assert plan.forecast.images_per_s == pytest.approx(4 / per_microbatch, rel=1e-3)
