"""What the oracles share: small nets, microbatches, the engine under a spy, and comparisons.

The nets are the zoo's, so narrow and on so small images that a run takes a tenth of a second: RevNet-18 (10
units, three of them downsampling, batch norm everywhere), ResNet-18 (no unit reversible) and the fully
reversible one. Nothing here computes a reference: those are written out in `oracle_references.py`, without
the engine.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from petractl.engine.assembly import assemble_stages
from petractl.engine.pipeline import InProcessPipeline
from petractl.engine.schedule import lookaheads
from petractl.engine.stage import Stage
from petractl.engine.update import Updater
from petractl.methods.family import method_spec
from petractl.models.registry import build_model
from petractl.models.units import Network

CLASSES = 5
Tensors = dict[str, Tensor]
Microbatch = tuple[Tensor, Tensor]
OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
DELAYED = ("graph", "inputs+parameters", "inputs", "parameters")

CUTS = {1: [], 2: [5], 3: [2, 6], 10: list(range(1, 10))}
"""Of RevNet-18: below the cuts 2 and 5 stands a reversible unit, below 6 a downsampling one."""
UNEVEN = {1: [0], 2: [3, 0], 3: [4, 1, 0], 10: [8, 8, 7, 7, 4, 4, 3, 1, 1, 0]}
MICROBATCHES = {1: (7, 3), 2: (7, 3), 3: (7, 3), 10: (11, 3)}
"""Per epoch, two epochs: 7 and 11 leave partial groups for k = 2 and 3, and 3 for k = 2; 11 exceed W = 9."""


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with all that the paper's settings have."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)


def sgd_at_rest(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD that moves nothing."""
    return torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=1e-3)


def adamw_at_rest(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW that moves nothing."""
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.1)


def schedules(num_stages: int) -> list[str | list[int]]:
    """Return the schedules that every oracle is tried with; with one stage they are all the same."""
    return ["tight"] if num_stages == 1 else ["tight", "paper", UNEVEN[num_stages]]


def cases(stages: Iterable[int] = (1, 2, 3, 10), ks: Iterable[int] = (1, 2, 3)) -> list[tuple]:
    """Return every (number of stages, k, schedule)."""
    return [(j, k, s) for j in stages for k in ks for s in schedules(j)]


def case_id(value: object) -> str:
    """Return a short name for a parameter of a test."""
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def make_net(
    name: str = "revnet18",
    *,
    seed: int = 0,
    width: int = 3,
    depth: int = 8,
    dtype: torch.dtype = torch.float64,
) -> Network:
    """Build a net of the zoo whose batch norms and linear layers have parameters that are not all alike."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = Network(build_model(name, width=width, classes=CLASSES, depth=depth).units)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.0)
                nn.init.uniform_(module.bias, -0.2, 0.2)
    return network.to(dtype).train()


def microbatches(
    count: int, *, seed: int = 0, size: int = 4, side: int = 12, dtype: torch.dtype = torch.float64
) -> list[Microbatch]:
    """Return images (size, 3, side, side) and labels (size,)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, side, side, generator=generator, dtype=dtype),
            torch.randint(0, CLASSES, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def epochs(num_stages: int, *, dtype: torch.dtype = torch.float64) -> list[list[Microbatch]]:
    """Return the microbatches of two epochs."""
    return [
        microbatches(count, seed=seed, dtype=dtype) for seed, count in enumerate(MICROBATCHES[num_stages])
    ]


@dataclass
class Trace:
    """What a run did. Item n of a list belongs to update n: averaged gradients, parameters after it."""

    gradients: list[Tensors] = field(default_factory=list)
    parameters: list[Tensors] = field(default_factory=list)
    statistics: Tensors = field(default_factory=dict)
    momentum: Tensors = field(default_factory=dict)
    loss: float = 0.0
    stages: list[Stage] = field(default_factory=list)


class SpyUpdater(Updater):
    """Writes down the gradients before each update and the parameters after it."""

    def __init__(
        self,
        named: list[tuple[str, nn.Parameter]],
        optimizer: torch.optim.Optimizer,
        *,
        trace: Trace,
    ) -> None:
        rate = optimizer.param_groups[0]["lr"]
        super().__init__(optimizer, learning_rate=lambda _: rate)
        self.named = named
        self.trace = trace
        self.delays: list[int] = []

    def step(self, *, delay: int, position: int) -> None:
        trace = self.trace
        while len(trace.gradients) <= position:
            trace.gradients.append({})
            trace.parameters.append({})
        trace.gradients[position] |= {n: p.grad.clone() for n, p in self.named if p.grad is not None}
        self.delays.append(delay)
        super().step(delay=delay, position=position)
        trace.parameters[position] |= {n: p.detach().clone() for n, p in self.named}


def make_stages(
    network: Network,
    trace: Trace,
    *,
    cuts: Sequence[int],
    method: str,
    keep: str = "",
    optimizer: OptimizerFactory = sgd,
    statistics_in_forward: bool = False,
) -> list[Stage]:
    """Return the engine's stages, each with a spy for its updater."""
    units = list(network.units)
    return assemble_stages(
        units,
        names=[type(unit).__name__ for unit in units],
        cuts=cuts,
        method=method_spec(method, keep=keep),
        make_updater=lambda named: SpyUpdater(named, optimizer([p for _, p in named]), trace=trace),
        loss=functional.cross_entropy,
        seed=0,
        device=torch.device("cpu"),
        statistics_in_forward=statistics_in_forward,
    )


def run_engine(
    network: Network,
    data: Sequence[Sequence[Microbatch]],
    *,
    stages: int,
    k: int,
    schedule: str | Sequence[int],
    method: str,
    keep: str = "",
    optimizer: OptimizerFactory = sgd,
    statistics_in_forward: bool = False,
    cuts: Sequence[int] | None = None,
) -> Trace:
    """Train a copy of `network` for the epochs of `data` by the engine and return what happened."""
    network, trace = copy.deepcopy(network), Trace()
    trace.stages = make_stages(
        network,
        trace,
        cuts=CUTS[stages] if cuts is None else cuts,
        method=method,
        keep=keep,
        optimizer=optimizer,
        statistics_in_forward=statistics_in_forward,
    )
    pipeline = InProcessPipeline(
        trace.stages, lookahead=lookaheads(schedule, num_stages=stages), accumulation=k
    )
    seen = 0
    for epoch in data:
        pipeline.train(iter(epoch), num_microbatches=len(epoch), offset=seen)
        seen += len(epoch)
    trace.statistics = statistics(network)
    for stage in trace.stages:
        updater = stage.updater
        assert isinstance(updater, SpyUpdater)
        trace.momentum |= momentum(updater.optimizer, updater.named)
    totals = trace.stages[-1].totals
    assert totals.loss is not None
    trace.loss = float(totals.loss) / totals.samples
    return trace


def statistics(network: nn.Module) -> Tensors:
    """Return copies of the buffers by name."""
    return {name: b.clone() for name, b in network.named_buffers()}


def momentum(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> Tensors:
    """Return copies of the momentum buffers by name."""
    buffers = {name: optimizer.state[p].get("momentum_buffer") for name, p in named}
    return {name: b.clone() for name, b in buffers.items() if b is not None}


def assert_same_bits(actual: Tensors, expected: Tensors) -> None:
    """Assert that two sets of tensors are the same to the bit."""
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, f"other bits in {len(different)} of {len(expected)} tensors: {different[:3]}"


def assert_close(actual: Tensors, expected: Tensors, *, tolerance: float) -> None:
    """Assert that the norm of each tensor's difference is at most `tolerance` times the tensor's norm."""
    assert actual.keys() == expected.keys()
    errors = relative_errors(actual, expected)
    name = max(errors, key=lambda n: errors[n])
    assert errors[name] <= tolerance, f"relative error {errors[name]:.2e} in {name}"


def relative_errors(actual: Tensors, expected: Tensors) -> dict[str, float]:
    """Return ||a - b|| / ||b|| of every tensor; of a tensor of zeros, ||a||."""
    return {name: _relative(actual[name].double(), expected[name].double()) for name in expected}


def _relative(a: Tensor, b: Tensor) -> float:
    norm = float(b.norm())
    return float((a - b).norm()) / (norm if norm > 0.0 else 1.0)


def compare(actual: Trace, expected: Trace, *, tolerance: float = 0.0) -> None:
    """Compare two runs step by step: same bits, or within a relative tolerance."""
    for step in ("gradients", "parameters"):
        ours, theirs = getattr(actual, step), getattr(expected, step)
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            _compare(a, b, tolerance)
    _compare(actual.statistics, expected.statistics, tolerance)
    _compare(actual.momentum, expected.momentum, tolerance)
    # The engine sums losses in their own precision, the reference in double.
    assert abs(actual.loss - expected.loss) <= 1e-6 * abs(expected.loss)


def _compare(actual: Tensors, expected: Tensors, tolerance: float) -> None:
    if tolerance:
        assert_close(actual, expected, tolerance=tolerance)
    else:
        assert_same_bits(actual, expected)
