"""What replicas of a stage pay for one average gradient: the part of the all-reduce that nothing hides.

Each unit's gradients travel in a bucket of their own, from the top unit down, as soon as its last gradient of
the group is there, and the update waits for all of them (contract 1 puts every update before the next
forward). So a bucket is hidden behind the backward of the units below it, and the lowest unit's never is.

A ring moves 2 (R-1) / R times the bucket over each link, in 2 (R-1) steps. Replicas are joined by links like
those between stages, but not by the same ones. Gradients are summed as float32.
"""

from collections.abc import Sequence
from dataclasses import replace

from petractl.planning.devices import DeviceSpec
from petractl.planning.net import Net
from petractl.planning.times import Link, StageTimes

_GRADIENT_BYTES = 4


def ring_s(size_bytes: float, *, replicas: int, link: Link) -> float:
    """Return the seconds of one all-reduce of so many bytes in a ring."""
    moved = 2 * (replicas - 1) / replicas * size_bytes
    return moved / link.bytes_per_s + 2 * (replicas - 1) * link.latency_s


def exposed_s(
    bucket_bytes: Sequence[float], backward_s: Sequence[float], *, replicas: int, link: Link
) -> float:
    """Return what is left of the all-reduce after the backward; units from the lowest to the top one."""
    if replicas == 1:
        return 0.0
    now = sent = 0.0
    for size, seconds in zip(reversed(bucket_bytes), reversed(backward_s), strict=True):
        now += seconds
        if size:
            sent = max(now, sent) + ring_s(size, replicas=replicas, link=link)
    return max(0.0, sent - now)


def with_averaging(
    times: Sequence[StageTimes],
    net: Net,
    cuts: Sequence[int],
    *,
    replicas: int,
    links: Sequence[Link],
    speeds: Sequence[float],
) -> tuple[StageTimes, ...]:
    """Return the stages' times with the average's exposed part in every update; one link for each stage."""
    edges = [0, *cuts, net.num_units]
    result = []
    for j, time in enumerate(times):
        part = slice(edges[j], edges[j + 1])
        waited = exposed_s(
            [_GRADIENT_BYTES * cost.parameters for cost in net.costs[part]],
            [unit.backward_s / speeds[j] for unit in net.times[part]],
            replicas=replicas,
            link=links[j],
        )
        result.append(replace(time, update_s=time.update_s + waited))
    return tuple(result)


def replica_links(devices: Sequence[DeviceSpec], *, unknown: Link) -> tuple[Link, ...]:
    """Return each stage's link to its replicas; `unknown` where nothing is known of it."""
    return tuple(
        unknown
        if device.link_bytes_per_s is None and device.link_latency_s is None
        else Link(device.link_latency_s or 0.0, device.link_bytes_per_s or float("inf"))
        for device in devices
    )
