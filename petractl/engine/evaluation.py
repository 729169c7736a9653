"""Evaluation of a classifier: every sample once, with running statistics, no graph.

In one process the net is called as a whole. In several, the batches go upwards through the same stages; each
replica takes its share of them, and the sums meet at the end. One that is told to stop ends after its batch:
where images enter, the last batch says so to the stages above, and all hear it where the sums meet. A batch
whose samples were all left out counts for nothing; among stages an image in black goes in its place, since
not every net takes a batch of none.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from petractl.data.normalisation import Normalisation
from petractl.engine.cut import STOP
from petractl.engine.links import Inbox, Outbox
from petractl.engine.messages import Activation
from petractl.engine.world import World
from petractl.errors import Stopped
from petractl.models.units import as_streams


class LabelledBatch(Protocol):
    """A microbatch of images (n, c, h, w) and labels (n,)."""

    @property
    def images(self) -> Tensor:
        """Images (n, c, h, w), float32, or uint8 that are still to be normalised."""
        ...

    @property
    def normalisation(self) -> Normalisation | None:
        """How the images are still to be normalised; None: not at all."""
        ...

    @property
    def labels(self) -> Tensor:
        """Labels (n,), int64."""
        ...


@dataclass(frozen=True, slots=True)
class Scores:
    """Mean cross-entropy in nats, and accuracies in percent, over `samples` samples; of none they are nan."""

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
        """Return the images on the device, normalised, in the memory format."""
        if batch.normalisation is None:
            return batch.images.to(self.device, non_blocking=True, memory_format=self.memory_format)
        images = batch.images.to(self.device, non_blocking=True)
        return batch.normalisation(images, memory_format=self.memory_format)

    def labels(self, batch: LabelledBatch) -> Tensor:
        """Return the labels on the device."""
        return batch.labels.to(self.device, non_blocking=True)


class Sums:
    """Sums over samples; on the device, so that adding never waits."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.hits = torch.zeros(2, dtype=torch.int64, device=device)
        self.samples = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch; the loss has no label smoothing."""
        self.loss += functional.cross_entropy(logits, labels, reduction="sum").double()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        self.hits += torch.stack([ranked[:, 0].sum(), ranked.sum()])
        self.samples += labels.shape[0]

    def numbers(self) -> tuple[float, int, int, int]:
        """Return loss, hits at the first place, hits among five, samples; waits for the device."""
        top1, top5 = self.hits.tolist()
        return float(self.loss), top1, top5, self.samples


def scores_of(sums: Sequence[tuple[float, int, int, int]]) -> Scores:
    """Return the means of the sums of one or several replicas."""
    loss, top1, top5, samples = (sum(column) for column in zip(*sums, strict=True))
    if not samples:
        return Scores(math.nan, math.nan, math.nan, 0)
    return Scores(loss / samples, 100.0 * top1 / samples, 100.0 * top5 / samples, int(samples))


class Evaluation(Protocol):
    """Evaluates the net of a run."""

    def __call__(self, is_stopping: Callable[[], bool] = ...) -> Scores:
        """Evaluate, unless told to stop."""
        ...


def never() -> bool:
    """Tell that nothing is to stop."""
    return False


def evaluate(
    network: nn.Module,
    batches: Iterable[LabelledBatch],
    is_stopping: Callable[[], bool] = never,
    *,
    placement: Placement,
) -> Scores:
    """Evaluate and put the net back in the mode it was in.

    Raises:
        Stopped: it was told to stop, before a batch.
    """
    sums = Sums(placement.device)
    with _evaluation_mode(network), torch.inference_mode():
        for batch in batches:
            if is_stopping():
                raise Stopped
            labels = placement.labels(batch)
            if not labels.shape[0]:
                continue
            with _autocast(placement):
                logits: Tensor = network(placement.images(batch))
            sums.add(_full(logits, placement), labels)
    return scores_of([sums.numbers()])


Neighbours = tuple[Inbox[Activation] | None, Outbox[Activation] | None]
"""The links of a stage in evaluation: from below and to above."""


class PipelinedEvaluation:
    """Evaluates through the stages of a world; called by every process, gives all of them the scores.

    `stages` are those of this process, each with its links and its units. `batches` is given where images
    enter and nowhere else; `num_batches` is this replica's share of them.
    """

    def __init__(
        self,
        stages: Sequence[tuple[Neighbours, Sequence[nn.Module]]],
        *,
        world: World,
        batches: Iterable[LabelledBatch] | None,
        num_batches: int,
        placement: Placement,
        timeout_s: float = 0.0,
    ) -> None:
        self._stages = [(links, nn.ModuleList(units)) for links, units in stages]
        self._world = world
        self._batches = batches
        self._num_batches = num_batches
        self._placement = placement
        self._timeout_s = timeout_s
        self._counts: list[int] = []  # batches of each stage here, fewer once one says that it is the last

    def __call__(self, is_stopping: Callable[[], bool] = never) -> Scores:
        """Send every batch through the stages here, then add up.

        `is_stopping` is asked in every process, and counts where images enter.

        Raises:
            Stopped: a replica was told to stop; raised in every process.
        """
        sums = Sums(self._placement.device)
        self._counts = [self._num_batches] * len(self._stages)
        has_stopped = False
        with ExitStack() as modes, torch.inference_mode():
            for (from_below, _), units in self._stages:
                modes.enter_context(_evaluation_mode(units))
                if from_below is not None:
                    from_below.expect(self._num_batches)
            batches = iter(self._batches) if self._batches is not None else None
            # A process's next stage is a whole pipeline further up: it is that many batches behind.
            behind = self._world.seat.num_places
            for i in range(self._num_batches + behind * (len(self._stages) - 1)):
                for number in range(len(self._stages)):
                    if 0 <= i - number * behind < self._counts[number]:
                        stops = is_stopping()
                        has_stopped |= self._step(i - number * behind, number, batches, sums, stops=stops)
        for (_, to_above), _ in self._stages:
            if to_above is not None:
                to_above.flush(timeout_s=self._timeout_s)
        found = self._world.gather((has_stopped, sums.numbers() if self._has_loss else None))
        if self._world.share(any(stopped for stopped, _ in found)):
            raise Stopped
        numbers = [item for _, item in found if item]
        return self._world.share(scores_of(numbers) if found else _NOTHING)

    @property
    def _has_loss(self) -> bool:
        (_, to_above), _ = self._stages[-1]
        return to_above is None

    def _step(
        self, i: int, number: int, batches: Iterator[LabelledBatch] | None, sums: Sums, *, stops: bool
    ) -> bool:
        """Send a batch through one stage; returns whether it is the last one because of a stop."""
        (from_below, to_above), units = self._stages[number]
        if from_below is None:
            assert batches is not None
            batch = next(batches)
            images = _at_least_one(self._placement.images(batch))
            flags = STOP if stops and i + 1 < self._num_batches else 0
            message = Activation(i, (images,), self._placement.labels(batch), flags)
        else:
            message = from_below.receive(i, operation=f"evaluation {i}", timeout_s=self._timeout_s)
        if message.cut & STOP:
            self._counts[number] = i + 1
        with _autocast(self._placement):
            streams = message.streams
            for unit in units:
                streams = as_streams(unit(*streams))
        if to_above is None:
            if message.labels.shape[0]:
                sums.add(_full(streams[0], self._placement), message.labels)
        else:
            to_above.send(Activation(i, streams, message.labels, message.cut), timeout_s=self._timeout_s)
        return bool(message.cut & STOP)


_NOTHING = Scores(0.0, 0.0, 0.0, 0)


@contextmanager
def _evaluation_mode(network: nn.Module) -> Iterator[None]:
    # One by one: a part may have been put in evaluation mode on purpose.
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _autocast(placement: Placement) -> "torch.autocast | nullcontext[None]":
    if placement.autocast_dtype is None:
        return nullcontext()
    return torch.autocast(placement.device.type, dtype=placement.autocast_dtype)


def _at_least_one(images: Tensor) -> Tensor:
    return images if images.shape[0] else images.new_zeros((1, *images.shape[1:]))


def _full(logits: Tensor, placement: Placement) -> Tensor:
    return logits.float() if placement.autocast_dtype is not None else logits
