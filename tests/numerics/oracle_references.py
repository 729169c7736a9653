"""The oracles' references, written out in plain PyTorch: no stage, no schedule, no keeper, no unit's inverse.

Here W_j is the lookahead of stage j, `stage_of[n]` the stage of unit n, k the accumulation. A group of k
microbatches is averaged over what it holds: Delta += grad / (size of the group). Every stage makes its update
n from the same microbatches, so one list of snapshots of the whole net, one for each update of the epoch,
serves all stages.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from oracle_nets import Microbatch, OptimizerFactory, Tensors, Trace, momentum, sgd, statistics
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from petractl.models.units import Coupling, Network


class PlainTrainer:
    """A net with a plain optimiser that averages gradients in groups and writes down what it does."""

    def __init__(self, network: Network, *, optimizer: OptimizerFactory) -> None:
        self.network = copy.deepcopy(network)
        self.named = list(self.network.named_parameters())
        self.optimizer = optimizer([p for _, p in self.named])
        self.trace = Trace()
        self.loss_sum, self.samples = 0.0, 0

    def add(self, gradients: Tensors, *, weight: float) -> None:
        """Delta += weight * gradient."""
        for name, p in self.named:
            if p.grad is None:
                p.grad = weight * gradients[name]
            else:
                p.grad.add_(gradients[name], alpha=weight)

    def add_loss(self, loss: Tensor, samples: int) -> None:
        self.loss_sum += loss.item() * samples
        self.samples += samples

    def update(self) -> None:
        self.trace.gradients.append({name: p.grad.clone() for name, p in self.named if p.grad is not None})
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.trace.parameters.append(self.snapshot())

    def snapshot(self) -> Tensors:
        """Return a copy of the parameters."""
        return {name: p.detach().clone() for name, p in self.named}

    def finish(self) -> Trace:
        self.trace.statistics = statistics(self.network)
        self.trace.momentum = momentum(self.optimizer, self.named)
        self.trace.loss = self.loss_sum / self.samples
        return self.trace


def groups(epoch: Sequence[Microbatch], k: int) -> Iterator[tuple[int, Microbatch, int, bool]]:
    """Yield (index, microbatch, size of its group, whether it is the last of its group)."""
    for i, microbatch in enumerate(epoch):
        size = min(k, len(epoch) - i // k * k)
        yield i, microbatch, size, i % k == size - 1


def train_plainly(
    network: Network, data: Sequence[Sequence[Microbatch]], *, k: int, optimizer: OptimizerFactory = sgd
) -> Trace:
    """Backpropagation through the whole net: the loop that everybody writes."""
    trainer = PlainTrainer(network, optimizer=optimizer)
    for epoch in data:
        for _, (images, labels), size, ends in groups(epoch, k):
            loss = functional.cross_entropy(trainer.network(images), labels)
            trainer.add_loss(loss, len(labels))
            found = torch.autograd.grad(loss, [p for _, p in trainer.named])
            trainer.add({n: g for (n, _), g in zip(trainer.named, found, strict=True)}, weight=1.0 / size)
            if ends:
                trainer.update()
    return trainer.finish()


def train_at_stale_parameters(
    network: Network,
    data: Sequence[Sequence[Microbatch]],
    *,
    stage_of: Sequence[int],
    lookahead: Sequence[int],
    k: int,
    optimizer: OptimizerFactory = sgd,
) -> Trace:
    """The gradient of microbatch i is the net's at (theta_j after floor(max(0, i - W_j) / k) updates)_j."""
    trainer = PlainTrainer(network, optimizer=optimizer)
    for epoch in data:
        versions = [trainer.snapshot()]
        for i, (images, labels), size, ends in groups(epoch, k):
            mixed = {
                name: versions[max(0, i - lookahead[stage_of[unit_of(name)]]) // k][name].requires_grad_()
                for name, _ in trainer.named
            }
            loss = functional.cross_entropy(functional_call(trainer.network, mixed, (images,)), labels)
            trainer.add_loss(loss, len(labels))
            found = torch.autograd.grad(loss, list(mixed.values()))
            trainer.add(dict(zip(mixed, found, strict=True)), weight=1.0 / size)
            if ends:
                trainer.update()
                versions.append(trainer.snapshot())
    return trainer.finish()


def train_by_petra(
    network: Network,
    data: Sequence[Sequence[Microbatch]],
    *,
    stage_of: Sequence[int],
    lookahead: Sequence[int],
    k: int,
    reversible: bool = True,
    statistics_in_forward: bool = False,
    optimizer: OptimizerFactory = sgd,
) -> Trace:
    """PETRA by its equations; with `reversible=False` every unit keeps its input (delayed, keep = inputs).

    Forward of i: x_n = F_n(x_{n-1}; theta_j after max(0, i - W_j) // k updates). Backward of i, with theta_j
    after i // k updates, the current ones: the input is rebuilt from the output of the unit, (x, x~) =
    (y~, y - f(y~)), or it is the one kept; then (delta_{n-1}, gradient) = VJP of F_n at that input.
    """
    trainer = PlainTrainer(network, optimizer=optimizer)
    units = list(trainer.network.units)
    prefix = [f"units.{n}." for n in range(len(units))]
    rebuilt = [reversible and isinstance(unit, Coupling) for unit in units]
    for epoch in data:
        versions = [trainer.snapshot()]
        for i, (images, labels), size, ends in groups(epoch, k):
            kept, x = [], (images,)
            for n, unit in enumerate(units[:-1]):
                kept.append(x)
                used = part(versions[max(0, i - lookahead[stage_of[n]]) // k], prefix[n])
                with torch.no_grad(), statistics_held(unit, held=not statistics_in_forward):
                    x = streams(functional_call(unit, used, x))
            # The head: forward, loss and backward in one go.
            leaves = tuple(s.detach().requires_grad_() for s in x)
            parameters = list(units[-1].parameters())
            loss = functional.cross_entropy(units[-1](*leaves), labels)
            trainer.add_loss(loss, len(labels))
            found = torch.autograd.grad(loss, [*leaves, *parameters])
            delta, gradients = found[: len(leaves)], list(found[len(leaves) :])
            for n in range(len(units) - 2, -1, -1):
                unit = units[n]
                if rebuilt[n]:
                    y, yt = x
                    with torch.no_grad(), statistics_held(unit, held=True):
                        x = (yt, y - unit.f(yt))
                else:
                    x = kept[n]
                leaves = tuple(s.detach().requires_grad_() for s in x)
                parameters = list(unit.parameters())
                with statistics_held(unit, held=statistics_in_forward):
                    outputs = streams(unit(*leaves))
                    found = torch.autograd.grad(outputs, [*leaves, *parameters], delta)
                delta = found[: len(leaves)]
                gradients = [*found[len(leaves) :], *gradients]
            trainer.add({m: g for (m, _), g in zip(trainer.named, gradients, strict=True)}, weight=1.0 / size)
            if ends:
                trainer.update()
                versions.append(trainer.snapshot())
    return trainer.finish()


def lookahead_of(schedule: str | Sequence[int], *, stages: int) -> list[int]:
    """Return W by its definition: J-1-j for tight, 2(J-1-j) for paper, a list is W itself."""
    factor = {"tight": 1, "paper": 2, "sequential": 0}
    if isinstance(schedule, str):
        return [factor[schedule] * (stages - 1 - j) for j in range(stages)]
    return list(schedule)


def stages_of_units(cuts: Sequence[int], *, num_units: int) -> list[int]:
    """Return the stage of every unit."""
    return [sum(n >= cut for cut in cuts) for n in range(num_units)]


def unit_of(name: str) -> int:
    """Return the unit of a parameter, `units.3.f.conv1.weight` -> 3."""
    return int(name.split(".")[1])


def part(parameters: Tensors, prefix: str) -> Tensors:
    """Return one unit's share of the parameters, named as in the unit."""
    return {name.removeprefix(prefix): p for name, p in parameters.items() if name.startswith(prefix)}


def streams(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@contextmanager
def statistics_held(unit: nn.Module, *, held: bool) -> Iterator[None]:
    """Put the running statistics back as they were."""
    before = {name: b.clone() for name, b in unit.named_buffers()}
    yield
    if held:
        for name, b in unit.named_buffers():
            b.copy_(before[name])
