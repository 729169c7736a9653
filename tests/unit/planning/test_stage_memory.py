"""Memory: traced without computing, and the same as what a real stage holds."""

import gc
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import TypeVar, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from petractl.bench.memory import watched_memory
from petractl.engine import wire
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
from petractl.planning.memory import MemoryModel, StageMemory, cuts_by_memory
from petractl.planning.tracing import LiveBytes

CPU = torch.device("cpu")
METHODS = (
    ("petra", ""),
    ("delayed", "graph"),
    ("delayed", "inputs"),
    ("delayed", "inputs+parameters"),
    ("delayed", "parameters"),
)
BATCH, SIDE, WIDTH = 8, 32, 32


M = TypeVar("M", Activation, Gradient)
FLOAT32 = ("float32", "float32")


@dataclass(frozen=True)
class Case:
    """A net under a method, as a stage runs it."""

    name: str
    method: str = "petra"
    keep: str = ""
    accumulation: int = 1
    autocast_dtype: torch.dtype | None = None
    number_formats: tuple[str, str] = FLOAT32
    channels_last: bool = True

    def __str__(self) -> str:
        values = (getattr(self, field.name) for field in fields(self))
        return "-".join(str(value) for value in values if value not in ("", None, FLOAT32, True))

    def units(self, *, device: str = "cpu") -> list[nn.Module]:
        with torch.device(device):
            units = build_model(self.name, classes=10, stem="cifar", width=WIDTH).units
        return [unit.to(memory_format=self.layout) for unit in units]

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def kept(self) -> tuple[Keeping, ...]:
        reversible = [is_reversible(unit) for unit in self.units(device="meta")]
        return keepings(method_spec(self.method, keep=self.keep), reversible)

    def model(self) -> MemoryModel:
        footprints = trace_footprints(
            self.units(device="meta"),
            self.kept,
            input_shape=(3, SIDE, SIDE),
            samples=BATCH,
            autocast_dtype=self.autocast_dtype,
            channels_last=self.channels_last,
        )
        return MemoryModel(
            footprints, samples=BATCH, accumulation=self.accumulation, number_formats=self.number_formats
        )


def measured_bytes(case: Case, *, first: int, end: int, lookahead: int) -> int:
    """Run a real stage between neighbours that only make messages, and watch its memory.

    The messages were there before, as buffers are between processes: they do not count.
    """
    streams: tuple[Tensor, ...] = (torch.randn(BATCH, 3, SIDE, SIDE).contiguous(memory_format=case.layout),)
    units, kept, k = case.units(), case.kept, case.accumulation
    with torch.no_grad():
        for unit in units[:first]:
            streams = as_streams(unit(*streams))
        inputs = streams
        for unit in units[first:end]:
            streams = as_streams(unit(*streams))
    outputs, is_last = streams, end == len(units)
    del units, unit
    labels = torch.zeros(BATCH, dtype=torch.int64)
    gradients = tuple(x.clone() for x in outputs)
    rebuilt = outputs if kept[end - 1].keep is Keep.NOTHING else None
    gc.collect()
    with watched_memory(CPU) as peak:
        stage = real_stage(case, first=first, end=end, is_last=is_last)
        total = lookahead + 3 * k
        for i in range(-lookahead, total):
            if i == k:
                peak.counts_from_here()
            up = arrived(
                Activation(i + lookahead, inputs, labels), case.number_formats[0] if first else "float32"
            )
            if is_last:
                stage.forward_backward(up, group_size=k)
            elif i + lookahead < total:
                stage.forward(up)
            del up
            if i >= 0 and not is_last:
                down = arrived(Gradient(i, rebuilt, gradients), case.number_formats[1])
                stage.backward(down, group_size=k)
                del down
            if i >= 0 and (i + 1) % k == 0:
                stage.update(partial=False)
    return peak.bytes


def arrived(message: M, number_format: str) -> M:
    return cast(M, wire.rounded(message, number_format=number_format))


def real_stage(case: Case, *, first: int, end: int, is_last: bool) -> Stage:
    units, kept = case.units()[first:end], case.kept[first:end]
    keepers = [
        build_keeper(
            Evaluator(
                unit, index=first + n, name="u", seed=0, device=CPU, autocast_dtype=case.autocast_dtype
            ),
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


def of_thread(memory: StageMemory) -> int:
    """What the training thread's tensors hold: all but images and messages' buffers."""
    return int(memory.total - memory.data - memory.received - memory.sent)


BFLOAT16 = torch.bfloat16
CASES = [
    *(Case("revnet18", method, keep, k) for method, keep in METHODS for k in (1, 2)),
    Case("resnet18", "delayed", "graph", 2),
    Case("resnet18", "delayed", "inputs", 1),
    Case("revnet50", "petra", "", 1),
    Case("revnet50", "petra", "", 2),
    Case("revnet18", "petra", "", 2, BFLOAT16),
    Case("revnet18", "delayed", "graph", 1, BFLOAT16),
    Case("resnet18", "delayed", "inputs", 2, BFLOAT16),
    Case("revnet18", "petra", "", 2, None, ("bfloat16", "bfloat16")),
    Case("revnet18", "delayed", "inputs", 2, None, ("float16", "int8")),
    Case("revnet18", "petra", "", 1, channels_last=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_model_is_what_a_stage_holds(case: Case) -> None:
    model = case.model()
    half = model.num_units // 2
    for first, end, lookahead in ((0, half, 1), (half, model.num_units, 0), (3, 6, 2)):
        expected = of_thread(model.stage(first, end, lookahead=lookahead))
        real = measured_bytes(case, first=first, end=end, lookahead=lookahead)
        assert expected == pytest.approx(real, rel=0.05), (first, end)


def test_a_matrix_holds_what_single_stages_do() -> None:
    model = Case("revnet18", "delayed", "inputs+parameters").model()
    lookahead = (3, 2, 1, 0)
    matrix = model.bytes_of(lookahead, 1)
    (_, second, _, _) = model.stages((2, 5, 8), lookahead=lookahead)
    assert matrix[5, 2] == second.total
    assert np.isinf(matrix[2, 2])
    assert np.isinf(matrix[2, 5])


def test_cuts_by_memory_are_the_best() -> None:
    import itertools

    model = Case("revnet18").model()
    lookahead = (2, 1, 0)

    def most(cuts: Sequence[int]) -> int:
        return max(int(stage.total) for stage in model.stages(cuts, lookahead=lookahead))

    best = min(most(cuts) for cuts in itertools.combinations(range(1, 10), 2))
    assert most(cuts_by_memory(model, lookahead)) == best


def papers_formula() -> ModuleType:
    path = Path(__file__).parents[3] / "benchmarks" / "partition" / "paper.py"
    spec = importlib.util.spec_from_file_location("paper", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["paper"] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_papers_table_for_revnet50() -> None:
    formula = papers_formula()
    found = formula.parts(formula.revnet50())
    for keep, paper_gb in formula.ROWS:
        assert round(formula.by_formula(found, keep) / 1e9, 1) == paper_gb


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
