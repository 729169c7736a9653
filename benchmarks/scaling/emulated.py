"""An emulated device: the process of one stage that sleeps in place of computing.

All else is the engine as it trains: the world, the links and their threads, the pipeline and its schedule.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from petractl.engine import wire
from petractl.engine.carriers import Carrier, HostCarrier, MessageSize, Parcel, Route
from petractl.engine.links import Inbox, Outbox
from petractl.engine.messages import Activation, Gradient
from petractl.engine.process_pipeline import Links, ProcessPipeline
from petractl.engine.schedule import lookaheads
from petractl.engine.stage import Counters, Totals
from petractl.engine.world import Launch, Seat, World, connect, join
from petractl.processes import die_with_parent, end_process, reported

RESULTS = "runs.jsonl"
LABELS = 64
SEQUENTIAL_MICROBATCHES = 3
"""Plain model parallelism is slow, and steady from its second microbatch."""

_STALL_S = 120.0
_STAMP_BYTES = 8


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured. `microbatches` are those between which the clock runs."""

    forward_s: float
    backward_s: float
    message_bytes: int
    latencies_s: tuple[float, ...]
    schedules: tuple[str, ...]
    repeats: int
    microbatches: int

    @property
    def slot_s(self) -> float:
        """The time of a microbatch on a stage that never waits."""
        return self.forward_s + self.backward_s


class SleepingStage:
    """A stage of the engine (`StageLike`) whose operations take a given time and no computation."""

    updater: Any = None
    offset = 0
    delay = 0
    is_alone = False

    def __init__(self, index: int, settings: Settings) -> None:
        self.index = index
        self.counters = Counters()
        self.totals = Totals()
        self.asked_s = 0.0
        self.slept_s = 0.0
        self._settings = settings
        self._in_flight = 0
        self._tensor = torch.zeros(settings.message_bytes // 4)

    def forward(self, message: Activation) -> Activation:
        """Sleep a forward; the message above is a new one."""
        self._sleep(self._settings.forward_s)
        self._in_flight += 1
        return Activation(message.microbatch, (self._tensor,), message.labels)

    def backward(self, message: Gradient, *, group_size: int) -> Gradient:
        """Sleep a backward."""
        self._sleep(self._settings.backward_s)
        self._in_flight -= 1
        return Gradient(message.microbatch, None, (self._tensor,))

    def forward_backward(self, message: Activation, *, group_size: int) -> Gradient:
        """Sleep the last stage's operation."""
        self._sleep(self._settings.slot_s)
        return Gradient(message.microbatch, None, (self._tensor,))

    def update(self, *, partial: bool) -> None:
        """Do nothing."""

    def microbatches_in_flight(self) -> int:
        """Count what waits for its backward."""
        return self._in_flight

    def _sleep(self, seconds: float) -> None:
        started = time.perf_counter()
        time.sleep(seconds)
        self.slept_s += time.perf_counter() - started
        self.asked_s += seconds


class DelayedCarrier:
    """A carrier whose messages arrive `latency_s` after they were sent: a long way, not a narrow one.

    The sender's link writes the time at the end of the message (one clock for all processes of a machine),
    and the receiver's link holds it until it is due.
    """

    def __init__(self, carrier: Carrier, *, latency_s: float) -> None:
        self.size = carrier.size
        self.pack = carrier.pack
        self.post = carrier.post
        self.enter_thread = carrier.enter_thread
        self.unpack = carrier.unpack
        self._carrier = carrier
        self._latency_s = latency_s

    def send(self, parcel: Parcel) -> None:
        """Send with the time."""
        _stamp(parcel).fill_(time.monotonic())
        self._carrier.send(parcel)

    def complete(self, parcel: Parcel, work: Any) -> None:
        """Wait for the message, and until it is due."""
        self._carrier.complete(parcel, work)
        time.sleep(max(0.0, float(_stamp(parcel)) + self._latency_s - time.monotonic()))


def _stamp(parcel: Parcel) -> Tensor:
    return parcel.host[-_STAMP_BYTES:].view(torch.float64)


@dataclass(frozen=True, slots=True)
class Reading:
    """The clocks of a stage at one moment; of a difference, what passed between two."""

    time_s: float
    cpu_s: float
    asked_s: float
    slept_s: float
    wait_forward_s: float
    wait_backward_s: float


class Clocks:
    """Reads a stage's clocks after the backward of its first and its last measured microbatch."""

    def __init__(self, stage: SleepingStage, links: Links, *, first: int, last: int) -> None:
        self._stage = stage
        self._links = links
        self._ends = (first, last)
        self._readings: list[Reading] = []

    def __call__(self, microbatch: int) -> None:
        """Note the end of a microbatch."""
        if microbatch in self._ends:
            below, above = self._links.from_below, self._links.from_above
            self._readings.append(
                Reading(
                    time.perf_counter(),
                    time.process_time(),
                    self._stage.asked_s,
                    self._stage.slept_s,
                    below.waited_s if below else 0.0,
                    above.waited_s if above else 0.0,
                )
            )

    def per_microbatch(self) -> dict[str, float]:
        """Return what a measured microbatch took on the average, in seconds by name."""
        first, last = (asdict(reading) for reading in self._readings)
        count = self._ends[1] - self._ends[0]
        return {name: (last[name] - first[name]) / count for name in first}


def make_links(world: World, settings: Settings, *, latency_s: float, tag: int) -> Links:
    """Return the links of this stage; every latency has links, and so a tag, of its own."""
    place, end = world.seat.place, world.seat.num_places - 1
    shapes = [((settings.message_bytes // 4,), torch.float32), ((LABELS,), torch.int64)]
    payload = wire.payload_bytes(shapes, number_format="float32") + _STAMP_BYTES
    size = MessageSize(8 * wire.header_words(len(shapes)), payload)

    def carrier(peer: int, group: dist.ProcessGroup, *, upwards: bool) -> Carrier:
        host = HostCarrier(Route(world.rank_of(peer), group, tag), size, upwards=upwards)
        return DelayedCarrier(host, latency_s=latency_s) if latency_s else host

    from_below: Inbox[Activation] | None = None
    to_below: Outbox[Gradient] | None = None
    to_above: Outbox[Activation] | None = None
    from_above: Inbox[Gradient] | None = None
    if place > 0:
        below, peer = place - 1, world.neighbour(place - 1)
        from_below = Inbox(carrier(below, world.forward, upwards=True), owner=world.me, peer=peer)
        to_below = Outbox(carrier(below, world.backward, upwards=False), owner=world.me, peer=peer)
    if place < end:
        above, peer = place + 1, world.neighbour(place + 1)
        to_above = Outbox(carrier(above, world.forward, upwards=True), owner=world.me, peer=peer)
        from_above = Inbox(carrier(above, world.backward, upwards=False), owner=world.me, peer=peer)
    return Links(from_below, to_below, to_above, from_above)


def microbatches(settings: Settings, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the data of the first stage."""
    images = torch.zeros(settings.message_bytes // 4)
    labels = torch.zeros(LABELS, dtype=torch.int64)
    return ((images, labels) for _ in range(count))


def measure(world: World, links: Links, settings: Settings, *, schedule: str) -> dict[str, float]:
    """Run one pipeline; return what a measured microbatch took on this stage, in seconds by name.

    The clock starts after 2 J microbatches, when the pipe has filled, and every stage measures the same ones,
    while the first stage still feeds new ones: the last W_0 only drain.
    """
    seat = world.seat
    lookahead = lookaheads(schedule, num_stages=seat.num_places)
    plain = schedule == "sequential"
    first = 0 if plain else 2 * seat.num_places
    last = first + (SEQUENTIAL_MICROBATCHES if plain else settings.microbatches)
    total = last + 1 + lookahead[0]
    stage = SleepingStage(seat.place, settings)
    pipeline = ProcessPipeline(
        stage, links=links, lookahead=lookahead[seat.place], accumulation=1, stall_timeout_s=_STALL_S
    )
    clocks = Clocks(stage, links, first=first, last=last)
    world.barrier()
    source = microbatches(settings, total) if seat.is_first else None
    pipeline.train(source, num_microbatches=total, on_microbatch=clocks)
    return clocks.per_microbatch()


def run(world: World, settings: Settings, result: Path) -> None:
    """Measure everything; rank 0 appends a line of JSON for every run."""
    links = {
        latency: make_links(world, settings, latency_s=latency, tag=tag)
        for tag, latency in enumerate(settings.latencies_s)
    }
    for repeat in range(settings.repeats):
        for latency in settings.latencies_s:
            for schedule in settings.schedules:
                stages = world.gather(measure(world, links[latency], settings, schedule=schedule))
                if world.seat.is_first:
                    record = {
                        "stages": world.seat.num_places,
                        "schedule": schedule,
                        "latency_s": latency,
                        "repeat": repeat,
                        "per_microbatch": stages,
                    }
                    with result.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
                    efficiency = settings.slot_s / stages[-1]["time_s"]
                    name = f"{world.seat.num_places} stages, {schedule}, {1e3 * latency:g} ms"
                    print(f"{name}: efficiency {efficiency:.4f}", file=sys.stderr, flush=True)
    for one in links.values():
        one.close()


def main() -> None:
    """Be the stage that the environment names."""
    die_with_parent()
    settings, folder = Settings(**json.loads(sys.argv[1])), Path(sys.argv[2])
    launch = Launch.from_environment()
    assert launch is not None, "started by bench_scaling.py"
    seat = Seat(launch.rank, launch.world_size)
    with reported(seat.title, seat.rank):
        torch.set_num_threads(1)
        world = join(launch, seat, store=connect(launch), device=torch.device("cpu"), timeout_s=_STALL_S)
        run(world, settings, folder / RESULTS)
        world.close()
    end_process(0)


if __name__ == "__main__":
    main()
