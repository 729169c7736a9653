"""JPEGs to augmented, normalised 224 x 224 batches: petractl's loader against torchvision's.

The same bytes lie in a folder per class and in shards. Three loaders turn them into shuffled float32 batches:

    petractl      shards, `PhotographData.train_loader`, normalised by the consumer as the trainer does it
    torchvision   ImageFolder and DataLoader with the transforms of PyTorch's ImageNet example
    v2            the same with transforms v2 on tensors, as torchvision's own reference training has them

They take turns, repeat by repeat. With 0 workers one thread does everything: images/s are per core as they
stand. With workers the clock starts once they are all busy and runs to the end of the epoch; images/s are
divided by the cores.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import photographs
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms import v2

from petractl.data.dataset import PHOTOGRAPH_NORMALISATION, PhotographData
from petractl.data.pixels import PHOTOGRAPH_MEAN, PHOTOGRAPH_STD, Pixels
from petractl.data.shard_store import open_shards
from petractl.data.values import DataInfo

Epoch = Callable[[int], Iterator[Tensor]]


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    # PyTorch's forkserver workers and torchvision's decoders warn at length.
    warnings.simplefilter("ignore")
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, images in sets(options):
            folders = photographs.write_folder(images, Path(folder, name, "folder"))
            shards = photographs.write_shards(images, Path(folder, name, "shards"))
            loaders = {
                "petractl": petractl(shards, options),
                "torchvision": torchvision(folders, example(options.size), options),
                "v2": torchvision(folders, reference(options.size), options),
            }
            size = statistics.fmean(map(len, images)) / 1e3
            result[name] = {"mean_kb": round(size, 1), **measured(loaders, len(images), options)}
            print(report(name, result[name]), flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", type=Path, help="folder of shards to take 224 x 224 JPEGs from")
    parser.add_argument("--no-made-up", action="store_true", help="leave out the made-up 500 x 375 JPEGs")
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--decoder", default="auto")
    parser.add_argument("--out", help="write the figures here as JSON")
    return parser.parse_args()


def sets(options: argparse.Namespace) -> Iterator[tuple[str, list[bytes]]]:
    if options.shards:
        yield "given shards", photographs.of_shards(options.shards, options.images)
    if not options.no_made_up:
        yield "500 x 375", photographs.made_up(options.images)


def petractl(shards: Path, options: argparse.Namespace) -> Epoch:
    store = open_shards([str(shards)], where="data.train", classes=photographs.CLASSES)
    count = sum(store.sizes)
    info = DataInfo("shards", photographs.CLASSES, 3, options.size, options.size, count, count)
    data = PhotographData(info, store, store, Pixels(size=options.size, decoder=options.decoder))
    loader = data.train_loader(batch_size=options.batch, workers=options.workers)

    def epoch(number: int) -> Iterator[Tensor]:
        with closing(loader.epoch(number)) as batches:
            for batch in batches:
                yield PHOTOGRAPH_NORMALISATION(batch.images)

    return epoch


def torchvision(root: Path, transform: Callable[..., Tensor], options: argparse.Namespace) -> Epoch:
    loader = DataLoader(
        datasets.ImageFolder(str(root), transform),
        batch_size=options.batch,
        shuffle=True,
        num_workers=options.workers,
        multiprocessing_context="forkserver" if options.workers else None,
    )
    return lambda number: (images for images, _ in loader)


def example(size: int) -> Callable[..., Tensor]:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(PHOTOGRAPH_MEAN, PHOTOGRAPH_STD),
        ]
    )


def reference(size: int) -> Callable[..., Tensor]:
    return v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(PHOTOGRAPH_MEAN, PHOTOGRAPH_STD),
        ]
    )


def measured(loaders: dict[str, Epoch], images: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Return images/s per core of every repeat of every loader."""
    cores = min(options.workers, os.cpu_count() or 1) or 1
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(options.repeats + 1):
        for name, epoch in loaders.items():
            rate = one_epoch(epoch(number), images, options)
            if number:
                rates[name].append(round(rate / cores, 1))
    return rates


def one_epoch(batches: Iterator[Tensor], images: int, options: argparse.Namespace) -> float:
    # What is prepared ahead: two batches per worker. Once they have been taken, all workers are busy.
    ahead = 2 * options.workers
    began = time.perf_counter()
    seen = 0
    for number, batch in enumerate(batches, start=1):
        assert batch.shape[1:] == (3, options.size, options.size)
        assert batch.dtype == torch.float32
        if number == ahead:
            began = time.perf_counter()
        seen += len(batch) if number > ahead else 0
    assert seen == images - ahead * options.batch
    return seen / (time.perf_counter() - began)


def report(name: str, figures: dict[str, list[float]]) -> str:
    lines = [f"{name} (JPEGs of {figures['mean_kb']} kB): images/s per core, median (range)"]
    medians = {loader: statistics.median(rates) for loader, rates in figures.items() if loader != "mean_kb"}
    for loader, median in medians.items():
        rates, ratio = figures[loader], medians["petractl"] / median
        lines.append(f"  {loader:12} {median:7.0f} ({min(rates):.0f} to {max(rates):.0f})   x {ratio:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
