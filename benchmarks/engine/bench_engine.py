"""Images per second of the in-process engine against a plain PyTorch backprop loop over the same model.

RevNet-18 on CIFAR-size input, one stage per unit (10 stages), batch 64, SGD with Nesterov momentum. Every
repeat runs all contestants, one after the other, each on the same microbatches; the first repeat is warm-up.
Ratios are taken within a repeat, so that a machine that slows down slows all of them.

    python benchmarks/engine/bench_engine.py --threads 2 --repeats 7
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from petractl.engine.assembly import assemble_stages
from petractl.engine.memory import keep_freed_memory
from petractl.engine.pipeline import InProcessPipeline
from petractl.engine.schedule import lookaheads
from petractl.engine.update import Updater
from petractl.methods.family import method_spec
from petractl.models.registry import build_model
from petractl.models.units import Network
from petractl.optim import build_optimizer
from petractl.tracking.environment import environment

Run = Callable[[], None]
SETTINGS = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
CONTESTANTS = {
    "backprop, 10 stages": ("backprop", "", "sequential"),
    "reversible, 10 stages": ("reversible", "", "sequential"),
    "petra tight": ("petra", "", "tight"),
    "petra paper": ("petra", "", "paper"),
    "delayed graph": ("delayed", "graph", "tight"),
    "delayed inputs+parameters": ("delayed", "inputs+parameters", "tight"),
    "delayed inputs": ("delayed", "inputs", "tight"),
    "delayed parameters": ("delayed", "parameters", "tight"),
}


def main() -> None:
    """Measure and print a table, and the numbers as JSON with `--json`."""
    options = parse()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if options.precision == "bfloat16" else None
    data = microbatches(options, device)
    runs: dict[str, Run] = {"plain PyTorch": plain_loop(options, device, dtype, data)}
    for name, (method, keep, schedule) in CONTESTANTS.items():
        runs[name] = pipeline(options, device, dtype, data, method=method, keep=keep, schedule=schedule)
    speeds = measure(runs, options, device)
    if options.json:
        print(json.dumps({"environment": environment(), "options": vars(options), "images_per_s": speeds}))
        return
    print(f"{'':28}{'images/s':>10}{'min - max':>18}{'ratio to plain':>18}{'min - max':>16}")
    for name, values in speeds.items():
        ratios = [v / p for v, p in zip(values, speeds["plain PyTorch"], strict=True)]
        print(
            f"{name:28}{statistics.median(values):10.1f}{min(values):9.1f} -{max(values):7.1f}"
            f"{statistics.median(ratios):18.3f}{min(ratios):8.3f} -{max(ratios):6.3f}"
        )


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="microbatches per measurement")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def microbatches(options: argparse.Namespace, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Make the microbatches that every contestant sees."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(options.batch, 3, 32, 32, generator=generator).to(
                device, memory_format=torch.channels_last
            ),
            torch.randint(0, 10, (options.batch,), generator=generator).to(device),
        )
        for _ in range(options.steps)
    ]


def make_network(options: argparse.Namespace, device: torch.device) -> tuple[Network, tuple[str, ...]]:
    """Make the net, the same weights every time."""
    torch.manual_seed(0)
    model = build_model("revnet18", width=options.width, classes=10)
    network = Network(model.units)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.to(device)
    return network.train(), model.names


def plain_loop(
    options: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype | None,
    data: list[tuple[Tensor, Tensor]],
) -> Run:
    """Return an ordinary training loop, with the fastest optimiser that PyTorch has (fused)."""
    network, _ = make_network(options, device)
    optimizer = torch.optim.SGD(network.parameters(), fused=True, **SETTINGS)

    def run() -> None:
        for images, labels in data:
            with nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype):
                logits = network(images)
            loss = functional.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def pipeline(
    options: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype | None,
    data: list[tuple[Tensor, Tensor]],
    *,
    method: str,
    keep: str,
    schedule: str,
) -> Run:
    """Return the engine with one stage per unit."""
    network, names = make_network(options, device)

    def make_updater(parameters: list[tuple[str, nn.Parameter]]) -> Updater:
        optimizer = build_optimizer("sgd", parameters, decay_norm_and_bias=True, **SETTINGS)
        return Updater(optimizer, learning_rate=lambda update: SETTINGS["lr"])

    stages = assemble_stages(
        list(network.units),
        names=names,
        cuts=range(1, len(names)),
        method=method_spec(method, keep=keep),
        make_updater=make_updater,
        loss=functional.cross_entropy,
        seed=0,
        device=device,
        autocast_dtype=dtype,
    )
    engine = InProcessPipeline(stages, lookahead=lookaheads(schedule, num_stages=len(stages)), accumulation=1)
    return lambda: engine.train(iter(data), num_microbatches=len(data))


def measure(
    runs: dict[str, Run], options: argparse.Namespace, device: torch.device
) -> dict[str, list[float]]:
    """Return the images per second of every contestant in every repeat but the first."""
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(options.repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds = time.perf_counter() - started
                speeds[name].append(options.batch * options.steps / seconds)
    return speeds


if __name__ == "__main__":
    main()
