"""What replicas pay for the average of their gradients."""

from dataclasses import replace

import pytest
import torch

from petractl.methods.family import method_spec
from petractl.models.registry import build_model
from petractl.planning.averaging import exposed_s, replica_links, ring_s, with_averaging
from petractl.planning.choices import choose_replicas
from petractl.planning.costing import Clock, cost_net
from petractl.planning.devices import DeviceSpec
from petractl.planning.net import Net
from petractl.planning.plan import Setting
from petractl.planning.times import Link

LINK = Link(latency_s=0.001, bytes_per_s=100.0)


@pytest.fixture(scope="module")
def net() -> Net:
    with torch.device("meta"):
        built = build_model("resnet18", classes=10, stem="cifar", width=8)
    return cost_net(
        built.units,
        built.names,
        method=method_spec("backprop"),
        input_shape=(3, 32, 32),
        batch_size=2,
        clock=Clock(),
    )


def test_a_ring() -> None:
    assert ring_s(300, replicas=3, link=LINK) == pytest.approx(2 * 2 / 3 * 3 + 4 * 0.001)
    assert ring_s(300, replicas=2, link=Link(bytes_per_s=100.0)) == pytest.approx(3)


def test_the_lowest_units_bucket_is_never_hidden() -> None:
    link = Link(bytes_per_s=1.0)
    # Two replicas: a bucket takes its bytes in seconds.
    assert exposed_s([5], [100], replicas=2, link=link) == 5
    # The top unit's five are hidden behind the backward of the lower one.
    assert exposed_s([5, 5], [100, 1], replicas=2, link=link) == 5
    # Behind two seconds, three are left; then come the lower unit's own.
    assert exposed_s([5, 5], [2, 100], replicas=2, link=link) == 3 + 5
    assert exposed_s([0, 5], [100, 1], replicas=2, link=link) == 0
    assert exposed_s([5, 5], [2, 100], replicas=1, link=link) == 0


def test_it_delays_updates_alone(net: Net) -> None:
    cuts, speeds = (5,), (1.0, 2.0)
    times = net.stage_times(cuts, speeds=speeds)
    found = with_averaging(times, net, cuts, replicas=2, links=(Link(bytes_per_s=1e6),) * 2, speeds=speeds)
    assert all(a.update_s > b.update_s for a, b in zip(found, times, strict=True))
    assert [replace(a, update_s=0.0) for a in found] == [replace(b, update_s=0.0) for b in times]
    free = with_averaging(times, net, cuts, replicas=2, links=(Link(),) * 2, speeds=speeds)
    assert free == times


def test_what_is_unknown_is_the_callers(net: Net) -> None:
    devices = (DeviceSpec("a"), DeviceSpec("b", link_bytes_per_s=7.0))
    assert replica_links(devices, unknown=LINK) == (LINK, Link(0.0, 7.0))


def test_slow_links_favour_fewer_replicas(net: Net) -> None:
    def best(bytes_per_s: float | None) -> int:
        device = DeviceSpec("d", link_bytes_per_s=bytes_per_s)
        setting = Setting(devices=(device,) * 4, speeds=(1.0,) * 4, schedule="auto")
        return choose_replicas(net, setting, replicas=None)[0].replicas

    # Plain model parallelism gains nothing from stages, and averages its gradients for nothing.
    assert best(None) == 4
    assert best(1e4) < 4


def test_more_microbatches_per_update_make_it_cheaper(net: Net) -> None:
    def rate(accumulation: int) -> float:
        device = DeviceSpec("d", link_bytes_per_s=1e8)
        setting = Setting(
            devices=(device,) * 2, speeds=(1.0,) * 2, schedule="auto", accumulation=accumulation
        )
        return choose_replicas(net, setting, replicas=2)[0].images_per_s

    assert rate(1) < rate(4) < rate(32)
