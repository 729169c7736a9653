"""What a directional derivative costs: time against a plain forward, memory against the number of blocks.

`derivative`: from the output of RevNet-18's first unit to the loss, everything above it in one pass. Every
repeat runs all contestants, one after the other; ratios are taken within a repeat, the first is warm-up.
`directions`: the same pass with several tangents, together and one after the other.
`memory`: residual blocks of one size in a row. Each block has a tangent of its own at its output, which must
reach the loss: block after block, each in a pass of its own ("one"), or all carried together ("all").

    python benchmarks/forward_gradient/derivative.py --repeats 9
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from petractl.bench.memory import watched_memory
from petractl.engine.memory import keep_freed_memory
from petractl.methods.dual import loss_tangents, push, push_many
from petractl.models.registry import build_model
from petractl.models.units import Streams, as_streams
from petractl.tracking.environment import environment

Run = Callable[[], object]
MIB = 2**20
BATCH, WIDTH, CLASSES = 64, 16, 10
DIRECTIONS = (1, 4, 8)
LOSS = partial(functional.cross_entropy, label_smoothing=0.1, reduction="none")


def main() -> None:
    """Measure the tables that are asked for and print them."""
    options = parse()
    torch.set_num_threads(1)
    keep_freed_memory()
    results: dict[str, Any] = {}
    for precision in ("float32", "bfloat16"):
        with rest_of_the_net(bfloat16=precision == "bfloat16") as (net, streams):
            if "derivative" in options.tables:
                results[f"derivative, {precision}"] = measure(contestants(net, streams), options.repeats)
            if "directions" in options.tables and precision == "float32":
                results["directions"] = measure(several(net, streams), options.repeats)
    if "memory" in options.tables:
        results["memory"] = {str(blocks): memory(blocks) for blocks in (8, 16, 32)}
    if options.json:
        print(json.dumps({"environment": environment(), "results": results}))
        return
    for name, rows in results.items():
        show(name, rows)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tables", nargs="+", default=["derivative", "directions", "memory"])
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


@contextmanager
def rest_of_the_net(*, bfloat16: bool) -> Iterator[tuple[Callable[..., Tensor], Streams]]:
    """Give the function from the first unit's output to the losses, and such an output."""
    torch.manual_seed(0)
    layout = torch.channels_last if bfloat16 else torch.contiguous_format
    units = [
        unit.to(memory_format=layout) for unit in build_model("revnet18", width=WIDTH, classes=CLASSES).units
    ]
    for norm in (m for unit in units for m in unit.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.track_running_stats = (
            False  # batch statistics; `torch.func.jvp` refuses to change the running ones
        )
    labels = torch.randint(0, CLASSES, (BATCH,))
    with torch.no_grad():
        streams = as_streams(units[0](torch.randn(BATCH, 3, 32, 32).to(memory_format=layout)))

    def net(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16, cache_enabled=False):
            for unit in units[1:]:
                inputs = as_streams(unit(*inputs))
            return LOSS(inputs[0].float(), labels)

    net.parameters = [p for unit in units[1:] for p in unit.parameters()]  # type: ignore[attr-defined]
    yield net, streams


def tangents_of(streams: Streams) -> Streams:
    """Return a random direction."""
    return tuple(torch.randn_like(x) for x in streams)


def contestants(net: Callable[..., Tensor], streams: Streams) -> dict[str, Run | str]:
    """Return what is compared; a contestant that PyTorch cannot run has the reason in place of a function."""
    tangents = tangents_of(streams)

    def plain() -> Tensor:
        with torch.no_grad():
            return net(*streams)

    def functorch() -> object:
        with torch.no_grad():
            return torch.func.jvp(net, streams, tangents)

    def dual_tensors() -> object:
        with torch.no_grad(), forward_ad.dual_level():
            return forward_ad.unpack_dual(net(*map(forward_ad.make_dual, streams, tangents)))

    def backward() -> object:
        leaves = [x.detach().requires_grad_() for x in streams]
        return torch.autograd.grad(net(*leaves).sum(), [*leaves, *net.parameters])

    runs: dict[str, Run | str] = {
        "plain forward": plain,
        "torch.func.jvp": functorch,
        "torch.autograd.forward_ad": dual_tensors,
        "forward and backward": backward,
        "push": lambda: push(net, streams, tangents),
        "push, statistics held": lambda: push(net, streams, tangents, statistics="held"),
    }
    return {name: possible(run) for name, run in runs.items()}


def several(net: Callable[..., Tensor], streams: Streams) -> dict[str, Run | str]:
    """Return passes with several directions, together and in turn."""
    rows = [tangents_of(streams) for _ in range(max(DIRECTIONS))]
    runs: dict[str, Run | str] = {"plain forward": contestants(net, streams)["plain forward"]}
    for count in DIRECTIONS:
        runs[f"{count} together"] = partial(push_many, net, streams, rows[:count])
    runs[f"{max(DIRECTIONS)} in turn"] = lambda: [push(net, streams, row) for row in rows]
    return runs


def possible(run: Run) -> Run | str:
    """Return the function, or why it cannot run."""
    try:
        run()
    except RuntimeError as error:
        return f"fails: {str(error).splitlines()[0]}"
    return run


def measure(runs: dict[str, Run | str], repeats: int) -> dict[str, dict[str, Any] | str]:
    """Return the times in ms and, per repeat, the ratios to the first contestant."""
    times: dict[str, list[float]] = {name: [] for name, run in runs.items() if callable(run)}
    for _ in range(repeats + 1):
        for name, found in times.items():
            began = time.perf_counter()
            runs[name]()  # type: ignore[operator]
            found.append(1000 * (time.perf_counter() - began))
    base = next(iter(times.values()))
    rows: dict[str, dict[str, Any] | str] = {name: run for name, run in runs.items() if isinstance(run, str)}
    for name, found in times.items():
        ratios = [a / b for a, b in zip(found[1:], base[1:], strict=True)]
        rows[name] = {"ms": found[1:], "ratios": ratios}
    return {name: rows[name] for name in runs}


class Block(nn.Module):
    """A residual block that keeps the shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + f(x)."""
        return x + functional.relu(self.bn(self.conv(x)), inplace=True)


def memory(count: int) -> dict[str, float]:
    """Return the most MiB that tensors held beside parameters, images and labels, and the times in ms."""
    torch.manual_seed(0)
    blocks = [Block(16) for _ in range(count)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))
    x, labels = torch.randn(BATCH, 16, 32, 32), torch.randint(0, CLASSES, (BATCH,))
    ways = {"plain forward": plain_pass, "one": one_at_a_time, "all": all_together, "backprop": backprop}
    found = {"one activation": x.numel() * x.element_size() / MIB}
    for name, way in ways.items():
        way(blocks, head, x, labels)
        with watched_memory(torch.device("cpu")) as peak:
            way(blocks, head, x, labels)
        found[name] = peak.bytes / MIB
        times = []
        for _ in range(3):
            began = time.perf_counter()
            way(blocks, head, x, labels)
            times.append(1000 * (time.perf_counter() - began))
        found[f"{name}, ms"] = statistics.median(times)
    return found


def plain_pass(blocks: list[Block], head: nn.Module, x: Tensor, labels: Tensor) -> None:
    """Evaluate without a graph."""
    with torch.no_grad():
        for block in blocks:
            x = block(x)
        LOSS(head(x), labels)


def one_at_a_time(blocks: list[Block], head: nn.Module, x: Tensor, labels: Tensor) -> None:
    """Push every block's tangent to the loss in a pass of its own."""
    for n, block in enumerate(blocks):
        with torch.no_grad():
            x = block(x)
        streams, tangents = (x,), (torch.randn_like(x),)
        for above in blocks[n + 1 :]:
            streams, tangents = push(above, streams, tangents)
        (logits,), (moved,) = push(head, streams, tangents)
        loss_tangents(LOSS, logits, [moved], labels)


def all_together(blocks: list[Block], head: nn.Module, x: Tensor, labels: Tensor) -> None:
    """Carry the tangents of all blocks below through each block, and give it one of its own."""
    streams: Streams = (x,)
    rows: list[Streams] = []
    for block in blocks:
        streams, rows = push_many(block, streams, rows)
        rows.append(tangents_of(streams))
    (logits,), rows = push_many(head, streams, rows)
    loss_tangents(LOSS, logits, [moved for (moved,) in rows], labels)


def backprop(blocks: list[Block], head: nn.Module, x: Tensor, labels: Tensor) -> None:
    """Keep the graph and differentiate."""
    for block in blocks:
        x = block(x)
    loss = LOSS(head(x), labels).mean()
    torch.autograd.grad(loss, [p for part in (*blocks, head) for p in part.parameters()])


def show(name: str, rows: dict[str, Any]) -> None:
    """Print a table in Markdown."""
    print(f"\n### {name}\n")
    if name == "memory":
        ways = [key for key in next(iter(rows.values())) if f"{key}, ms" in next(iter(rows.values()))]
        print("| blocks | " + " | ".join(ways) + " |\n|" + "---|" * (len(ways) + 1))
        for blocks, row in rows.items():
            cells = (f"{row[way]:.0f} MiB, {row[f'{way}, ms']:,.0f} ms" for way in ways)
            print(f"| {blocks} | " + " | ".join(cells) + " |")
        return
    print("| | time | times a plain forward | spread |\n|---|---|---|---|")
    for label, row in rows.items():
        if isinstance(row, str):
            print(f"| {label} | {row} | | |")
            continue
        ratios = row["ratios"]
        middle = f"{statistics.median(row['ms']):.0f} ms | {statistics.median(ratios):.2f}"
        print(f"| {label} | {middle} | {min(ratios):.2f} to {max(ratios):.2f} |")


if __name__ == "__main__":
    main()
