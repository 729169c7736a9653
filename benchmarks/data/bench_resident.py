"""What augmentation costs a training step on CIFAR-10-like data: set in memory, or resident on the device.

50,000 random images of 32x32 are cropped (pad 4), flipped and normalised by each way of loading, and
RevNet-18 is trained on them in process. A way's cost is the time of its batches alone, up to float32 images
on the device, as a share of a step's time with batches made before; both alternate in rounds. Threads are the
foreground's own unless `--workers` says otherwise. Needs no files: `python bench_resident.py`.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from petractl import build
from petractl.data import Data, DataInfo, Preparation, Samples
from petractl.recipe.load import load_recipe

SAMPLES = 50_000
RECIPE = """
[model]
name = "revnet18"
width = {width}
[data]
name = "fake"
batch_size = {batch}
[method]
name = "{method}"
accumulation = 1
[engine]
mode = "in-process"
device = "{device}"
"""


def main() -> None:
    """Print one line for each way."""
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    built = make_run(options)
    ways = make_ways(options, built.placement.device)
    batches = [place(built, batch) for batch in islice(ways["memory"].epoch(0), options.steps)]
    data_s: dict[str, list[float]] = {name: [] for name in ways}
    step_s: list[float] = []
    for number in range(options.rounds + 1):
        step = timed(built, lambda: train(built, batches)) / options.steps
        costs = {
            name: timed(built, lambda way=way: consume(built, way, options)) for name, way in ways.items()
        }
        if number:  # the first round warms up
            step_s.append(step)
            for name, cost in costs.items():
                data_s[name].append(cost / options.steps)
    report(options, built, step_s, data_s)


def make_run(options: argparse.Namespace) -> build.Built:
    """Return a run whose pipeline is trained here with batches of our own."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "recipe.toml")
        path.write_text(RECIPE.format(**vars(options)))
        return build.build(build.check(load_recipe(str(path))))


def make_ways(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the loaders that are compared."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (SAMPLES, 3, 32, 32), dtype=np.uint8)
    samples = Samples(images=images, labels=generator.integers(0, 10, SAMPLES))
    info = DataInfo("random", 10, 3, 32, 32, SAMPLES, SAMPLES)
    how = Preparation(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), pad=4, flip=True)
    ways = {}
    for name, resident in (("memory", False), ("resident", True)):
        data = Data(info=info, train=samples, val=samples, preparation=how, resident=resident)
        ways[name] = data.train_loader(batch_size=options.batch, workers=options.workers, device=device)
    return ways


def place(built: build.Built, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch as the pipeline takes it."""
    return built.placement.images(batch), built.placement.labels(batch)


def train(built: build.Built, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Train on batches that are ready."""
    source: Iterator[tuple[torch.Tensor, torch.Tensor]] = iter(batches)
    built.pipeline.train(source, num_microbatches=len(batches), num_rows=len(batches), offset=0)


def consume(built: build.Built, way: Any, options: argparse.Namespace) -> None:
    """Make batches and do nothing with them."""
    for batch in islice(way.epoch(0), options.steps):
        place(built, batch)


def timed(built: build.Built, action: Callable[[], None]) -> float:
    """Return seconds, the device's work included."""
    began = time.perf_counter()
    action()
    if built.placement.device.type == "cuda":
        torch.cuda.synchronize(built.placement.device)
    return time.perf_counter() - began


def report(
    options: argparse.Namespace,
    built: build.Built,
    step_s: list[float],
    data_s: dict[str, list[float]],
) -> None:
    """Print medians, and the range of the repeats."""
    where = f"{built.placement.device}, {torch.get_num_threads()} threads"
    print(f"revnet18 width {options.width}, batch {options.batch}, {options.method}, {where}")
    print(f"{'step without data':<20}{statistics.median(step_s) * 1e3:9.2f} ms  {spread(step_s)}")
    for name, times in data_s.items():
        share = 100 * statistics.median(times) / statistics.median(step_s)
        print(
            f"{name:<20}{statistics.median(times) * 1e3:9.2f} ms  {spread(times)}  {share:5.2f} % of a step"
        )


def spread(times: list[float]) -> str:
    """Return the least and the most in ms."""
    return f"({min(times) * 1e3:.2f} to {max(times) * 1e3:.2f}, n = {len(times)})"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--method", default="petra")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
