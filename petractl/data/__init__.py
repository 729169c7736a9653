"""Data sets by name, and the loaders that turn them into batches.

`open_data` reads a set into memory; its `train_loader` and `eval_loader` give batches whose content is a pure
function of (seed, epoch, index). `describe_data` says what would be opened, cheaply. Plain keyword arguments
throughout.
"""

# Importing a set's module registers it.
from petractl.data import cifar, digits, fake, fashion_mnist, imagenet32, photograph_sets  # noqa: F401
from petractl.data.dataset import Data, Source
from petractl.data.loader import EvalLoader, TrainLoader
from petractl.data.preparation import Preparation
from petractl.data.registry import (
    dataset_summary,
    describe_data,
    list_datasets,
    open_data,
    register_dataset,
)
from petractl.data.request import Request
from petractl.data.values import UNKNOWN, Batch, DataInfo, Samples

__all__ = [
    "UNKNOWN",
    "Batch",
    "Data",
    "DataInfo",
    "EvalLoader",
    "Preparation",
    "Request",
    "Samples",
    "Source",
    "TrainLoader",
    "dataset_summary",
    "describe_data",
    "list_datasets",
    "open_data",
    "register_dataset",
]
