"""What a replica does in the tests of replicas: run in processes of its own, results left in a file.

A case is a function of (replica, replicas, process groups, one per stage) that returns tensors by name.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue

import torch
import torch.distributed as dist
from small_nets import CUTS, make_stages, make_units, tensors
from torch import Tensor, nn

from petractl.engine.messages import Activation
from petractl.engine.replicas import Reducer, average_buffers
from petractl.engine.schedule import Kind, group_size, lookaheads, operations
from petractl.engine.stage import Stage
from petractl.errors import PeerLost, Stalled

WORLD = 3
SAMPLES = {2: (5, 2), 3: (4, 0, 7)}
"""Of each replica's group, by the number of replicas."""

TRAINING = [(method, k) for method in ("backprop", "delayed", "petra") for k in (1, 2, 3)]
ROWS = 4


def reducer_parameters() -> list[list[nn.Parameter]]:
    """Return three units: odd strides, a scalar, one without a gradient; none; one of higher precision."""
    conv = torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last)
    transposed = torch.zeros(3, 4).t()
    holey = torch.zeros(4, 6)[:, ::2]
    shapes = [[conv, transposed, torch.zeros(()), torch.zeros(2)], [], [holey, torch.zeros(3).double()]]
    return [[nn.Parameter(value) for value in unit] for unit in shapes]


def gradient(round_: int, replica: int, place: int, like: Tensor) -> Tensor | None:
    """Return a replica's gradient in a round; some have none, some only one replica has."""
    if place == 3 or (place == 1 and replica != round_ % 2):
        return None
    g = torch.Generator().manual_seed(100 * round_ + 10 * replica + place)
    return torch.empty_like(like).copy_(torch.randn(like.shape, generator=g, dtype=torch.float64))


def reduction(
    replica: int, replicas: int, group: dist.ProcessGroup, *_: dist.ProcessGroup
) -> dict[str, Tensor]:
    """Reduce three rounds: by `finish` alone, with starts before it, and alone again."""
    units = reducer_parameters()
    reducer = Reducer(units, group=group)
    samples, found = SAMPLES[replicas][replica], {}
    for round_ in range(3):
        every = [p for unit in units for p in unit]
        for place, p in enumerate(every):
            p.grad = gradient(round_, replica, place, p) if samples else None
        if round_ == 1 and samples:
            reducer.start(2, samples=samples)
            reducer.start(1, samples=samples)
        reducer.finish(samples=samples)
        for place, p in enumerate(every):
            if p.grad is not None:
                assert p.grad.dtype == p.dtype
                assert p.grad.stride() == torch.empty_like(p).stride()
                found[f"{round_}.{place}"] = p.grad.clone()
    return found


def shared_parameter(
    replica: int, replicas: int, group: dist.ProcessGroup, *_: dist.ProcessGroup
) -> dict[str, Tensor]:
    """Reduce a parameter of two units, whose second gradient comes after the upper unit's start."""
    p = nn.Parameter(torch.zeros(2))
    reducer = Reducer([[p], [p]], group=group)
    p.grad = torch.full((2,), 1.0 + replica)
    reducer.start(1, samples=2)
    p.grad += 10.0
    reducer.start(0, samples=2)
    reducer.finish(samples=2)
    return {"p": p.grad}


def waiting(
    replica: int, replicas: int, group: dist.ProcessGroup, *_: dist.ProcessGroup
) -> dict[str, Tensor]:
    """Wait for the slowest, replica 0."""
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    reducer = Reducer([[p]], group=group)
    dist.barrier(group)
    if replica == 0:
        time.sleep(0.3)
    reducer.finish(samples=1)
    return {"wait_s": torch.tensor(reducer.wait_s)}


def statistics_of(replica: int) -> dict[str, Tensor]:
    """Return buffers of every kind; one is held twice, one is the same on all replicas."""
    g = torch.Generator().manual_seed(replica)
    shared = torch.randn(3, generator=g).double()
    return {
        "mean": torch.randn(2, 3, generator=g).t(),
        "shared": shared,
        "alias": shared,
        "half": torch.full((2,), float(replica), dtype=torch.float16),
        "count": torch.tensor(10 + replica),
        "flags": torch.tensor([replica == 0, True]),
        "mask": torch.tensor([0.1, float("-inf"), 1 / 3]),
    }


def statistics(
    replica: int, replicas: int, group: dist.ProcessGroup, *_: dist.ProcessGroup
) -> dict[str, Tensor]:
    """Average the buffers."""
    buffers = statistics_of(replica)
    average_buffers(buffers.values(), group=group)
    return buffers


def share(replica: int, replicas: int) -> list[tuple[Tensor, Tensor]]:
    """Return a replica's microbatches of unequal sizes; the last row is only replica 0's."""
    count = ROWS if replica == 0 else ROWS - 1
    return [microbatch(row * replicas + replica) for row in range(count)]


def microbatch(number: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(number)
    size = 3 + number % 3
    return torch.randn(size, 6, generator=g, dtype=torch.float64), torch.randint(0, 3, (size,), generator=g)


def drive(stages: list[Stage], data: list[tuple[Tensor, Tensor]], *, method: str, k: int, rows: int) -> None:
    """Execute an epoch's operations, every stage in a thread: replicas need not do them in one order."""
    name = "sequential" if method == "backprop" else "tight"
    lookahead = lookaheads(name, num_stages=len(stages))
    lists = operations(lookahead=lookahead, num_microbatches=len(data), accumulation=k, num_rows=rows)
    up, down = [SimpleQueue() for _ in stages], [SimpleQueue() for _ in stages]
    for i, (x, y) in enumerate(data):
        up[0].put(Activation(i, (x,), y))

    def run(j: int) -> None:
        stage = stages[j]
        for o in lists[j]:
            size = group_size(o.microbatch, num_microbatches=len(data), accumulation=k)
            if o.kind is Kind.UPDATE:
                stage.update(partial=size < k)
            elif o.kind is Kind.FORWARD:
                up[j + 1].put(stage.forward(up[j].get(timeout=60)))
            else:
                is_last = o.kind is Kind.FORWARD_BACKWARD
                act, inbox = (stage.forward_backward, up) if is_last else (stage.backward, down)
                result = act(inbox[j].get(timeout=60), group_size=size)
                down[j - 1 if j else -1].put(result)

    with ThreadPoolExecutor(len(stages)) as threads:
        list(threads.map(run, range(len(stages))))


def with_replicas(stages: list[Stage], replica: int, groups: list[dist.ProcessGroup]) -> list[Stage]:
    """Give every stage a reducer on a group of its own, as the processes of a pipeline have."""
    for stage, group in zip(stages, groups, strict=True):
        stage.reducer = Reducer([keeper.evaluator.parameters for keeper in stage.keepers], group=group)
        stage.replica, stage.replicas = replica, dist.get_world_size(group)
    return stages


def training(replica: int, replicas: int, *groups: dist.ProcessGroup) -> dict[str, Tensor]:
    """Train two epochs of four rows on each replica's own share."""
    found = {}
    for method, k in TRAINING:
        units = make_units()
        stages = with_replicas(make_stages(units, method), replica, list(groups))
        for _ in range(2):
            drive(stages, share(replica, replicas), method=method, k=k, rows=ROWS)
        assert {stage.counters.updates for stage in stages} == {2 * -(-ROWS // k)}
        found |= {f"{method}.{k}.{name}": value for name, value in tensors(units).items()}
    return found


def equal_shares(replica: int, replicas: int, *groups: dist.ProcessGroup) -> dict[str, Tensor]:
    """Train on the same microbatches everywhere."""
    found = {}
    for method, k in TRAINING:
        units = make_units()
        stages = with_replicas(make_stages(units, method), replica, list(groups))
        drive(stages, [microbatch(i) for i in range(5)], method=method, k=k, rows=5)
        found |= {f"{method}.{k}.{name}": value for name, value in tensors(units).items()}
    return found


def lost_peer(group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Reduce with a replica that is gone."""
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    try:
        Reducer([[p]], group=group).finish(samples=1)
    except PeerLost:
        return {"lost": torch.tensor(True)}
    return {}


def silent_peer(group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Reduce with a replica that never comes."""
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    try:
        Reducer([[p]], group=group).finish(samples=1)
    except Stalled:
        return {"stalled": torch.tensor(True)}
    return {}


CASES = (reduction, shared_parameter, waiting, statistics, training, equal_shares)


def run_cases(rank: int, folder: str) -> None:
    """Run every case with two and with three replicas; the last case ends the third process."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timeout)
    groups = {r: [dist.new_group(list(range(r))) for _ in range(len(CUTS) + 1)] for r in (2, 3)}
    found = {
        (case.__name__, replicas): case(rank, replicas, *groups[replicas])
        for replicas in groups
        for case in CASES
        if rank < replicas
    }
    silent = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    if rank == 0:
        found["silent_peer", 2] = silent_peer(silent)
    if rank < 2:
        dist.barrier(groups[2][0])
    if rank < WORLD - 1:
        found["lost_peer", WORLD] = lost_peer(groups[WORLD][0])
    torch.save(found, Path(folder) / f"{rank}.pt")
    # Without the goodbyes of a group that has lost a member.
    os._exit(0)
