"""Evaluation of a classifier: every sample once, with running statistics, no graph."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


class LabelledBatch(Protocol):
    """A microbatch of images (n, c, h, w) and labels (n,)."""

    @property
    def images(self) -> Tensor:
        """Images (n, c, h, w)."""
        ...

    @property
    def labels(self) -> Tensor:
        """Labels (n,), int64."""
        ...


@dataclass(frozen=True, slots=True)
class Scores:
    """Mean cross-entropy in nats, and accuracies in percent, over `samples` samples."""

    loss: float
    top1: float
    top5: float
    samples: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how a net is evaluated: device, memory format, lower precision or None."""

    device: torch.device
    memory_format: torch.memory_format
    autocast_dtype: torch.dtype | None = None

    def images(self, batch: LabelledBatch) -> Tensor:
        """Return the images on the device, in the memory format."""
        return batch.images.to(self.device, non_blocking=True, memory_format=self.memory_format)

    def labels(self, batch: LabelledBatch) -> Tensor:
        """Return the labels on the device."""
        return batch.labels.to(self.device, non_blocking=True)


def evaluate(network: nn.Module, batches: Iterable[LabelledBatch], *, placement: Placement) -> Scores:
    """Evaluate and put the net back in the mode it was in; the loss has no label smoothing."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    loss_sum = torch.zeros((), dtype=torch.float64, device=placement.device)
    hits = torch.zeros(2, dtype=torch.int64, device=placement.device)
    samples = 0
    with torch.inference_mode():
        for batch in batches:
            labels = placement.labels(batch)
            logits = _logits(network, placement.images(batch), placement)
            loss_sum += functional.cross_entropy(logits, labels, reduction="sum").double()
            ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            hits += torch.stack([ranked[:, 0].sum(), ranked.sum()])
            samples += labels.shape[0]
    for module, training in modes:  # one by one: a part may have been put in evaluation mode on purpose
        module.training = training
    top1, top5 = (100.0 * int(n) / samples for n in hits.tolist())
    return Scores(float(loss_sum) / samples, top1, top5, samples)


def _logits(network: nn.Module, images: Tensor, placement: Placement) -> Tensor:
    dtype = placement.autocast_dtype
    context = nullcontext() if dtype is None else torch.autocast(placement.device.type, dtype=dtype)
    with context:
        logits: Tensor = network(images)
    return logits.float() if dtype is not None else logits
