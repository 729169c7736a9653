"""Memory: traced without computing, and the same as what a real stage holds."""

import gc
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from petractl.bench.memory import watched_memory
from petractl.engine.messages import Activation, Gradient
from petractl.engine.stage import Stage
from petractl.engine.update import Updater
from petractl.methods.evaluation import Evaluator
from petractl.methods.family import Keep, Keeping, keepings, method_spec
from petractl.methods.keeping import build_keeper
from petractl.models.registry import build_model
from petractl.models.units import as_streams, is_reversible
from petractl.optim import build_optimizer
from petractl.planning.footprint import Footprint, trace_footprints
from petractl.planning.memory import MemoryModel, cuts_by_memory
from petractl.planning.tracing import LiveBytes

CPU = torch.device("cpu")
BATCH, SIDE, WIDTH = 16, 32, 32


def built(name: str, *, device: str = "cpu") -> list[nn.Module]:
    with torch.device(device):
        units = build_model(name, classes=10, stem="cifar", width=WIDTH).units
    return [unit.to(memory_format=torch.channels_last) for unit in units]


def kept_of(name: str, method: str, keep: str) -> tuple[Keeping, ...]:
    return keepings(
        method_spec(method, keep=keep), [is_reversible(unit) for unit in built(name, device="meta")]
    )


def model_of(name: str, kept: Sequence[Keeping], *, accumulation: int) -> MemoryModel:
    footprints = trace_footprints(
        built(name, device="meta"), kept, input_shape=(3, SIDE, SIDE), samples=BATCH
    )
    return MemoryModel(footprints, samples=BATCH, accumulation=accumulation)


def measured_bytes(
    name: str, kept: Sequence[Keeping], *, first: int, end: int, lookahead: int, accumulation: int
) -> int:
    """Run a real stage between neighbours that only make messages, and watch its memory."""
    streams: tuple[Tensor, ...] = (
        torch.randn(BATCH, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last),
    )
    units = built(name)
    with torch.no_grad():
        for unit in units[:first]:
            streams = as_streams(unit(*streams))
        inputs = streams
        for unit in units[first:end]:
            streams = as_streams(unit(*streams))
    outputs, is_last = streams, end == len(units)
    del units, unit
    labels = torch.zeros(BATCH, dtype=torch.int64)
    rebuilt = kept[end - 1].keep is Keep.NOTHING
    gc.collect()
    with watched_memory(CPU) as peak:
        stage = real_stage(built(name)[first:end], kept[first:end], first=first, is_last=is_last)
        total = lookahead + 3 * accumulation
        for i in range(-lookahead, total):
            if i == accumulation:
                peak.counts_from_here()
            up = Activation(i + lookahead, tuple(x.clone() for x in inputs) if first else inputs, labels)
            if is_last:
                stage.forward_backward(up, group_size=accumulation)
            elif i + lookahead < total:
                stage.forward(up)
            del up
            if i >= 0 and not is_last:
                gradients = tuple(x.clone() for x in outputs)
                down = Gradient(i, tuple(x.clone() for x in outputs) if rebuilt else None, gradients)
                del gradients
                stage.backward(down, group_size=accumulation)
                del down
            if i >= 0 and (i + 1) % accumulation == 0:
                stage.update(partial=False)
    return peak.bytes


def real_stage(units: Sequence[nn.Module], kept: Sequence[Keeping], *, first: int, is_last: bool) -> Stage:
    keepers = [
        build_keeper(
            Evaluator(unit, index=first + n, name="u", seed=0, device=CPU),
            keep=keeping.keep,
            statistics_in_forward=False,
            input_gradient=first + n > 0,
        )
        for n, (unit, keeping) in enumerate(zip(units, kept, strict=True))
    ]
    parameters = [(f"{n}.{name}", p) for n, unit in enumerate(units) for name, p in unit.named_parameters()]
    updater = Updater(build_optimizer("sgd", parameters, lr=0.01), learning_rate=lambda n: 0.01)
    return Stage(
        0, keepers, [keeping.parameters for keeping in kept], updater, cross_entropy if is_last else None
    )


METHODS = [
    ("revnet18", "petra", ""),
    ("revnet18", "delayed", "graph"),
    ("revnet18", "delayed", "inputs"),
    ("revnet18", "delayed", "inputs+parameters"),
    ("revnet18", "delayed", "parameters"),
    ("resnet18", "delayed", "graph"),
]


@pytest.mark.parametrize(("name", "method", "keep"), METHODS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_model_is_what_a_stage_holds(name: str, method: str, keep: str, accumulation: int) -> None:
    kept = kept_of(name, method, keep)
    model = model_of(name, kept, accumulation=accumulation)
    for first, end, lookahead in ((0, 5, 1), (5, 10, 0), (0, 3, 3), (3, 6, 2)):
        memory = model.stage(first, end, lookahead=lookahead)
        # Here messages are plain tensors: one that the backward begins with, those kept are in flight.
        expected = int(memory.total) - int(memory.data)
        expected += model.down_bytes(end) if end < 10 else model.up_bytes(first)
        real = measured_bytes(
            name, kept, first=first, end=end, lookahead=lookahead, accumulation=accumulation
        )
        assert expected == pytest.approx(real, rel=0.1), (first, end)


def test_a_matrix_holds_what_single_stages_do() -> None:
    kept = kept_of("revnet18", "delayed", "inputs+parameters")
    model = model_of("revnet18", kept, accumulation=1)
    lookahead = (3, 2, 1, 0)
    matrix = model.bytes_of(lookahead, 1)
    (_, second, _, _) = model.stages((2, 5, 8), lookahead=lookahead)
    assert matrix[5, 2] == second.total
    assert np.isinf(matrix[2, 2])
    assert np.isinf(matrix[2, 5])


def test_cuts_by_memory_are_the_best() -> None:
    import itertools

    model = model_of("revnet18", kept_of("revnet18", "petra", ""), accumulation=1)
    lookahead = (2, 1, 0)

    def most(cuts: Sequence[int]) -> int:
        return max(stage.total for stage in model.stages(cuts, lookahead=lookahead))

    best = min(most(cuts) for cuts in itertools.combinations(range(1, 10), 2))
    assert most(cuts_by_memory(model, lookahead)) == best


def reference_gb(*, inputs: bool, parameters: bool) -> float:
    """The paper's table by formula, without the first stage's inputs.

    How the paper counts is not known. Of four ways tried, the one that comes out has 2(J-j) microbatches in
    the buffers of stage j (counted from 0, two more than its clock needs), and one stream for the input of a
    reversible block.
    """
    with torch.device("meta"):
        units = build_model("revnet50", classes=1000, stem="imagenet").units
    reversible = [is_reversible(unit) for unit in units]
    kept = keepings(method_spec("petra"), reversible)
    footprints = trace_footprints(units, kept, input_shape=(3, 224, 224), samples=64)
    total = sum(f.parameters for f in footprints)
    for j, footprint in enumerate(footprints):
        ahead = 2 * (len(units) - j)
        if j and (inputs or not reversible[j]):
            total += ahead * footprint.streams_below // (2 if reversible[j] else 1)
        if parameters:
            total += ahead * footprint.parameters
    return total / 1e9


@pytest.mark.parametrize(
    ("inputs", "parameters", "paper"),
    [(True, True, 44.5), (True, False, 43.6), (False, True, 21.2), (False, False, 20.3)],
)
def test_the_papers_table_for_revnet50(inputs: bool, parameters: bool, paper: float) -> None:
    assert reference_gb(inputs=inputs, parameters=parameters) == pytest.approx(paper, rel=0.05)


class ReadsValues(nn.Module):
    """What the meta device cannot do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) > 1e9:
            raise AssertionError
        y: Tensor = self.linear(x).relu()
        return y


def traced(units: Sequence[nn.Module], samples: int) -> tuple[Footprint, ...]:
    kept = [Keeping(Keep.INPUT)] * (len(units) - 1) + [Keeping(Keep.GRAPH)]
    return trace_footprints(units, kept, input_shape=(64,), samples=samples)


def test_units_without_meta_implementation_are_traced_on_the_cpu() -> None:
    found = traced([nn.Linear(64, 64), ReadsValues(), nn.Linear(64, 10)], 32)
    plain = traced([nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64), nn.ReLU()), nn.Linear(64, 10)], 32)
    assert found[0].kept == plain[0].kept == 32 * 64 * 4
    assert found[1].backward_peak == pytest.approx(plain[1].backward_peak, rel=0.2)


def test_live_bytes_counts_what_is_alive() -> None:
    outside = torch.zeros(1024)
    with LiveBytes() as live:
        a = torch.ones(1024, device="meta")
        b = a + 1
        assert live.live == 8192
        del a
        assert (live.live, live.peak) == (4096, 8192)
        outside.detach()
        assert live.live == 4096
        live.reset_peak()
        assert live.peak == 4096
        del b
