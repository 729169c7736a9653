"""Exact pipelines in real processes: the cases, and what each process runs of them.

A test compares what the processes leave in files with the in-process engine on the same microbatches.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_nets import CLASSES, IN, SIZE, make_pipeline, make_stages, make_units, sgd_updater, tensors
from torch import Tensor, nn
from torch.nn import functional

from petractl.engine.assembly import stage_bounds
from petractl.engine.exact import ExactPipeline
from petractl.engine.exact_stage import ExactPart
from petractl.engine.replicas import Reducer
from petractl.methods.evaluation import Evaluator

CPU = torch.device("cpu")
WORLD = 4
SEED = 7


@dataclass(frozen=True)
class Case:
    """A net, a schedule, and the microbatches of each epoch."""

    schedule: str
    places: int
    cuts: Sequence[int] = (3,)
    k: int = 4
    epochs: tuple[int, ...] = (11, 6)
    ragged: bool = True
    net: str = "linear"
    extra_rows: int = 0
    options: dict[str, Any] = field(default_factory=dict)


class Marks(nn.Module):
    """(n, 6) to two streams: (n, 4), and an index (n,) that has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(IN, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), (x[:, 0] > 0).long() + 1


class Look(nn.Module):
    """A stream and an index to a stream, by a table of three rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 4)

    def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(x + self.table(index)), index


class IndexAlone(nn.Module):
    """A stream and an index to the index."""

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return index


class Lookup(nn.Module):
    """An index to logits, by a table of three rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, CLASSES)

    def forward(self, index: Tensor) -> Tensor:
        return self.table(index)


class Answer(nn.Module):
    """A stream and an index to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.linear(x) * index[:, None]


class Learned(nn.Module):
    """(n, 6) to itself and a learned stream (n, 4) that does not depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.row.expand(len(x), 4)


class Join(nn.Module):
    """Two streams to logits, through a ReLU that saves its output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(IN, CLASSES), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        return torch.relu(self.first(x) + self.second(row)).view(len(x), CLASSES)


class Picture(nn.Module):
    """(n, 6) to channels-last images (n, 4, 6, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        image = (x[:, None, :, None] * x[:, None, None, :]).to(memory_format=torch.channels_last)
        return self.conv(image)


class Turned(nn.Module):
    """A convolution whose output is a view with other strides, not dense in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)[:, ::2].transpose(2, 3)


class PictureHead(nn.Module):
    """Images (n, 4, 6, 6) to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean(dim=(2, 3)))


def inner() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3))


def units_of(case: Case) -> list[nn.Module]:
    torch.manual_seed(0)
    if case.net == "linear":
        return make_units(inner)
    if case.net == "low precision":
        return [unit.float() for unit in make_units(inner)]
    if case.net == "index":
        units: list[nn.Module] = [Marks(), Look(), Look(), Answer()]
    elif case.net == "images":
        units = [Picture(), Turned(), nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), PictureHead()]
    elif case.net == "only an index":
        units = [Marks(), IndexAlone(), Lookup()]
    elif case.net == "learned":
        units = [nn.Linear(IN, IN), Learned(), Join(), nn.ReLU()]
    else:
        assert case.net == "without parameters"
        units = [nn.Flatten(), nn.Linear(IN, 4), nn.Tanh(), nn.Linear(4, CLASSES)]
    return [unit.double() for unit in units]


def data_of(case: Case, epoch: int) -> list[tuple[Tensor, Tensor]]:
    """Return an epoch's microbatches; a ragged one ends with 2 samples instead of 5."""
    g = torch.Generator().manual_seed(100 + epoch)
    count = case.epochs[epoch]
    dtype = torch.float32 if case.net == "low precision" else torch.float64
    found = []
    for i in range(count):
        n = 2 if case.ragged and i == count - 1 else SIZE
        images = torch.randn(n, IN, generator=g, dtype=torch.float64).to(dtype)
        found.append((images, torch.randint(0, CLASSES, (n,), generator=g)))
    return found


def reference(case: Case) -> dict[str, Any]:
    """Train in one process, one microbatch after the other."""
    units = units_of(case)
    stages = make_stages(units, "backprop", cuts=list(case.cuts), **case.options)
    pipeline = make_pipeline(stages, k=case.k, schedule="sequential")
    offset = 0
    for epoch, count in enumerate(case.epochs):
        pipeline.train(iter(data_of(case, epoch)), num_microbatches=count, offset=offset)
        offset += count
    return {
        "tensors": tensors(units),
        "counters": {s.index: s.counters for s in stages},
        "means": stages[-1].totals.means(),
        "samples": stages[-1].totals.samples,
    }


class RecordingReducer:
    """Stands for the replicas: remembers the samples."""

    def __init__(self) -> None:
        self.samples: list[int] = []

    def finish(self, *, samples: int) -> None:
        self.samples.append(samples)


def parts_of(case: Case, units: Sequence[nn.Module], *, place: int) -> list[ExactPart]:
    bounds = stage_bounds(case.cuts, num_units=len(units))
    return [
        ExactPart(
            index=j,
            evaluators=[
                Evaluator(
                    units[n], index=n, name=type(units[n]).__name__, seed=SEED, device=CPU, **case.options
                )
                for n in range(*bounds[j])
            ],
            updater=sgd_updater(
                [(name, p) for n in range(*bounds[j]) for name, p in units[n].named_parameters()]
            ),
        )
        for j in range(place, len(bounds), case.places)
    ]


def pipeline_of(
    case: Case,
    parts: Sequence[ExactPart],
    *,
    place: int,
    group: Any,
    loss: Any = functional.cross_entropy,
    **more,
) -> ExactPipeline:
    return ExactPipeline(
        parts=parts,
        loss=loss,
        schedule=case.schedule,
        accumulation=case.k,
        seat=SimpleNamespace(place=place, num_places=case.places),
        group=group,
        control=dist.group.WORLD,
        device=CPU,
        **({"ranks": range(case.places)} | more),
    )


def run_case(case: Case, *, place: int, group: Any) -> dict[str, Any]:
    """Train this process's share and return what it can tell."""
    units = units_of(case)
    parts = parts_of(case, units, place=place)
    reducer = RecordingReducer()
    more = {"reducer": reducer} if case.extra_rows else {}
    pipeline = pipeline_of(case, parts, place=place, group=group, **more)
    done: list[int] = []
    offset = 0
    for epoch, count in enumerate(case.epochs):
        pipeline.train(
            iter(data_of(case, epoch)) if place == 0 else None,
            num_microbatches=count,
            num_rows=count + case.extra_rows,
            offset=offset,
            on_microbatch=done.append,
        )
        offset += count
    bounds = stage_bounds(case.cuts, num_units=len(units))
    own = {n for part in parts for n in range(*bounds[part.index])}
    return {
        "tensors": {k: v for k, v in tensors(units).items() if int(k.split(".")[0]) in own},
        "counters": {part.index: part.counters for part in parts},
        "means": parts[-1].totals.means(),
        "samples": parts[-1].totals.samples,
        "done": done,
        "reduced": reducer.samples,
        "seconds": (pipeline.compute_s, pipeline.wait_s),
        "bytes": {part.index: (part.bytes_sent_forward, part.bytes_sent_backward) for part in parts},
    }


CASES: dict[str, Case] = {
    "gpipe on 2": Case("gpipe", 2),
    "gpipe on 4": Case("gpipe", 4, (1, 3, 5)),
    "gpipe on 1": Case("gpipe", 1, ()),
    "gpipe, one microbatch per update": Case("gpipe", 2, k=1),
    "1f1b on 2": Case("1f1b", 2),
    "1f1b on 4": Case("1f1b", 4, (1, 3, 5)),
    "1f1b on 3": Case("1f1b", 3, (2, 4), k=5),
    "interleaved on 2": Case("interleaved-1f1b", 2, (1, 3, 5)),
    "interleaved on 2, long groups": Case("interleaved-1f1b", 2, (1, 3, 5), k=8, epochs=(14, 6)),
    "interleaved on 2, short groups": Case("interleaved-1f1b", 2, (1, 3, 5), k=1, epochs=(3, 2)),
    "interleaved on 1": Case("interleaved-1f1b", 1, (4,)),
    "zero-bubble on 2": Case("zero-bubble", 2),
    "zero-bubble on 4": Case("zero-bubble", 4, (1, 3, 5)),
    "zero-bubble on 4, short groups": Case("zero-bubble", 4, (1, 3, 5), k=2, epochs=(5, 3)),
    "zero-bubble on 2, long groups": Case("zero-bubble", 2, k=8, epochs=(14, 6)),
    "zero-bubble on 1": Case("zero-bubble", 1, ()),
    "even": Case("gpipe", 2, epochs=(8,), ragged=False),
    "extra rows": Case("gpipe", 2, epochs=(6,), extra_rows=4),
    "rows in the same group": Case("1f1b", 2, epochs=(7,), extra_rows=1),
    **{
        f"{net}, {schedule}": Case(schedule, places, cuts, net=net)
        for net in ("index", "images", "learned", "without parameters")
        for schedule, places, cuts in (
            ("gpipe", 4, (1, 2, 3)),
            ("zero-bubble", 4, (1, 2, 3)),
            ("interleaved-1f1b", 2, (1, 2, 3)),
        )
    },
    **{
        f"low precision, {schedule}": Case(
            schedule, 2, net="low precision", options={"autocast_dtype": torch.bfloat16}
        )
        for schedule in ("gpipe", "zero-bubble")
    },
}


REPLICATED = Case("1f1b", 2, (2,), k=2, epochs=(11,), ragged=False, net="index")
"""Two replicas of two places: 6 microbatches and 5. Without batch norm they are one run with groups of 4."""


def run_replica(
    case: Case, *, rank: int, pipelines: Sequence[Any], replicas: Sequence[Any]
) -> dict[str, Any]:
    """Train one process of two replicas, which take the microbatches in turn."""
    replica, place = divmod(rank, case.places)
    units = units_of(case)
    parts = parts_of(case, units, place=place)
    reducer = Reducer([e.parameters for part in parts for e in part.evaluators], group=replicas[place])
    ranks = range(replica * case.places, (replica + 1) * case.places)
    pipeline = pipeline_of(case, parts, place=place, group=pipelines[replica], ranks=ranks, reducer=reducer)
    data = data_of(case, 0)[replica::2]
    pipeline.train(
        iter(data) if place == 0 else None,
        num_microbatches=len(data),
        num_rows=-(-case.epochs[0] // 2),
    )
    return {"tensors": tensors(units), "counters": parts[0].counters}


class Silent:
    """Data that do not come."""

    def __iter__(self) -> "Silent":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        time.sleep(4.0)
        raise StopIteration


REFUSED = {"only an index, zero-bubble": Case("zero-bubble", 2, (2,), net="only an index")}
"""Cases that are told to be wrong."""


class Broken(nn.Module):
    """Fails, or ends the process, in the third forward that trains, or in the backward after it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.calls = 0

    def forward(self, *streams: Tensor) -> tuple[Tensor, ...]:
        self.calls += 1
        if self.calls == 4:  # the first is a probe
            if self.how == "forward":
                raise ValueError("the unit is broken")
            if self.how == "killed":
                os._exit(9)
            if self.how == "in place":
                streams[0].add_(1.0)
            if self.how == "backward":
                streams = tuple(_BrokenBackward.apply(x) for x in streams)
        return streams


class _BrokenBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise ValueError("the backward is broken")


def fail(case: Case, how: str, *, place: int, group: Any) -> dict[str, Any]:
    """Train with a broken unit in the second stage, or with data that end; return this process's error."""
    units = units_of(case)
    units.insert(case.cuts[0], Broken(how))
    shifted = replace(case, cuts=[case.cuts[0], *(c + 1 for c in case.cuts[1:])])
    pipeline = pipeline_of(
        shifted,
        parts_of(shifted, units, place=place),
        place=place,
        group=group,
        stall_timeout_s=1.0 if how == "silent" else 20.0,
    )
    count = case.epochs[0]
    data = data_of(case, 0)[: 5 if how == "data" else count]
    started = time.monotonic()
    error: BaseException | None = None
    try:
        source = Silent() if how == "silent" else iter(data)
        pipeline.train(source if place == 0 else None, num_microbatches=count)
    except BaseException as caught:
        error = caught
    return {
        "type": type(error).__name__,
        "text": str(error),
        "notes": getattr(error, "__notes__", []),
        "seconds": time.monotonic() - started,
    }


def _child(rank: int, world: int, folder: str, names: Sequence[str], how: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    sys.stderr = open(f"{folder}/stderr-{rank}", "w")  # noqa: SIM115 (the process's last)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    groups = {places: dist.new_group(list(range(places))) for places in range(1, world + 1)}
    for name in names:
        case = (CASES | REFUSED)[name]
        if rank < case.places:
            run = (
                fail(case, how, place=rank, group=groups[case.places])
                if how
                else run_case(case, place=rank, group=groups[case.places])
            )
            torch.save(run, f"{folder}/{name}-{rank}".replace(" ", "_"))
    if not how and world == WORLD:
        pipelines, replicas = (
            [dist.new_group(ranks) for ranks in kind] for kind in (((0, 1), (2, 3)), ((0, 2), (1, 3)))
        )
        found = run_replica(REPLICATED, rank=rank, pipelines=pipelines, replicas=replicas)
        torch.save(found, f"{folder}/replicated-{rank}")
    if how:
        os._exit(0)  # connections may be broken
    dist.barrier()
    dist.destroy_process_group()


def launch(folder: Path, names: Sequence[str], *, world: int = WORLD, how: str = "") -> None:
    """Run the cases in `world` processes, each of which leaves a file per case."""
    context = mp.get_context("forkserver")  # torch is imported once, not in every process of every launch
    context.set_forkserver_preload(["petractl.engine.exact", "petractl.engine.assembly"])
    children = [
        context.Process(target=_child, args=(rank, world, str(folder), list(names), how))
        for rank in range(world)
    ]
    for child in children:
        child.start()
    deadline = time.monotonic() + 150
    for child in children:
        child.join(max(0.1, deadline - time.monotonic()))
    for child in children:
        if child.is_alive():
            child.kill()
            child.join()


def load(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return what each place left."""
    paths = [folder / f"{name}-{rank}".replace(" ", "_") for rank in range((CASES | REFUSED)[name].places)]
    return [torch.load(path, weights_only=False) for path in paths if path.exists()]
