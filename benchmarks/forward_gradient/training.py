"""Memory and time of a training microbatch against the number of blocks: tangents one by one, all, backprop.

Residual blocks of one size in a row, each a stage, trained by the engine: the net's loss along guesses from
linear auxiliary nets, at the blocks' outputs. What is watched are the tensors of one microbatch, forward to
the gradients in place; parameters and their gradients do not count.

    OMP_NUM_THREADS=1 python benchmarks/forward_gradient/training.py
"""

import argparse
import statistics
import time
from functools import partial

import torch
from derivative import BATCH, CLASSES, MIB, Block
from torch import nn
from torch.nn import functional

from petractl.bench.memory import watched_memory
from petractl.engine.assembly import assemble_stages
from petractl.engine.block_assembly import Auxiliaries, assemble_blocks
from petractl.engine.memory import keep_freed_memory
from petractl.engine.pipeline import InProcessPipeline
from petractl.engine.update import Updater
from petractl.estimator import Estimator
from petractl.methods.block import Loss
from petractl.methods.family import method_spec
from petractl.models.auxiliary import build_auxiliaries

LOSS = Loss(functional.cross_entropy, partial(functional.cross_entropy, reduction="none"))
WIDTH, SIDE = 16, 32
CPU = torch.device("cpu")


def main() -> None:
    """Measure and print the table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--repeats", type=int, default=5, help="timed microbatches; the median is told")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    print("| blocks | one | all | backprop |\n|---|---|---|---|")
    for count in options.blocks:
        cells = [measured(pipeline(count, way), options.repeats) for way in ("one", "all", "backprop")]
        print(f"| {count} | " + " | ".join(cells) + " |", flush=True)


def measured(engine: InProcessPipeline, repeats: int) -> str:
    """Return the peak memory of a microbatch, and the median time and spread of several."""
    microbatch = (torch.randn(BATCH, WIDTH, SIDE, SIDE), torch.randint(0, CLASSES, (BATCH,)))

    def train() -> None:
        engine.train(iter([microbatch]), num_microbatches=1)

    train()  # gradients and optimisers have their memory from here on
    with watched_memory(CPU) as peak:
        train()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        train()
        times.append(1000 * (time.perf_counter() - began))
    middle, low, high = statistics.median(times), min(times), max(times)
    return f"{peak.bytes / MIB:.0f} MiB, {middle:,.0f} ms ({low:,.0f} to {high:,.0f})"


def pipeline(count: int, way: str) -> InProcessPipeline:
    """Return the engine over `count` blocks and a head, each a stage."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, CLASSES))
    units = [*(Block(WIDTH) for _ in range(count)), head]
    cuts = range(1, len(units))
    common = {
        "names": [f"block {n}" for n in range(len(units))],
        "cuts": cuts,
        "make_updater": updater,
        "seed": 0,
        "device": CPU,
    }
    lookahead = [0] * len(units)
    if way == "backprop":
        stages = assemble_stages(units, method=method_spec("backprop"), loss=LOSS.mean, **common)
        return InProcessPipeline(stages, lookahead=lookahead, accumulation=1)
    shapes = [*([(WIDTH, SIDE, SIDE)] for _ in range(count)), [(CLASSES,)]]
    nets = build_auxiliaries("linear", units=units, shapes=shapes, cuts=cuts, classes=CLASSES)
    blocks = assemble_blocks(
        units,
        choice=Estimator(tangents=way),
        auxiliaries=[*(Auxiliaries(net) for net in nets), Auxiliaries()],
        num_streams=[1] * len(units),
        loss=LOSS,
        **common,
    )
    return InProcessPipeline(blocks, lookahead=lookahead, accumulation=1)


def updater(named: list[tuple[str, nn.Parameter]]) -> Updater:
    """Return plain SGD."""
    return Updater(torch.optim.SGD([p for _, p in named], lr=0.01), learning_rate=lambda _: 0.01)


if __name__ == "__main__":
    main()
