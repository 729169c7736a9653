"""A small net of linear units for tests of the engine, and the shortest way to stages and a pipeline."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from petractl.engine.assembly import assemble_stages
from petractl.engine.pipeline import InProcessPipeline
from petractl.engine.schedule import lookaheads
from petractl.engine.stage import Stage
from petractl.engine.update import Updater
from petractl.methods.family import METHODS, MethodSpec, method_spec
from petractl.models.units import Coupling

IN, WIDTH, CLASSES, SIZE = 6, 4, 3, 5
CUTS = [1, 3, 5]
ALL_METHODS = [(spec.name, spec.keep) for spec in METHODS if not spec.blocks]


class Split(nn.Module):
    """(n, 6) to two streams (n, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(IN, 2 * WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = torch.tanh(self.linear(x)).chunk(2, dim=1)
        return a.contiguous(), b.contiguous()


class Mix(nn.Module):
    """Two streams to two, not reversible."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.first(x))
        return h + self.second(xt), h


class Head(nn.Module):
    """Two streams to logits (n, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, x: Tensor, xt: Tensor) -> Tensor:
        return self.linear(torch.cat([x, xt], dim=1))


def inner(*, dropout: float = 0.0) -> nn.Module:
    """Return f of a coupling, with batch norm."""
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Dropout(dropout)
    )


def make_units(f: Callable[[], nn.Module] = inner, *, seed: int = 0) -> list[nn.Module]:
    """Return split, coupling, coupling, mix, coupling, coupling, head: 7 units, 4 of them reversible."""
    torch.manual_seed(seed)
    units = [Split(), Coupling(f()), Coupling(f()), Mix(), Coupling(f()), Coupling(f()), Head()]
    return [unit.double() for unit in units]


def microbatches(count: int, *, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Return inputs (5, 6) and labels (5,)."""
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(SIZE, IN, generator=g, dtype=torch.float64),
            torch.randint(0, CLASSES, (SIZE,), generator=g),
        )
        for _ in range(count)
    ]


def sgd_updater(named: list[tuple[str, nn.Parameter]], *, lr: float = 0.1) -> Updater:
    parameters = [p for _, p in named]
    optimizer = torch.optim.SGD(parameters or [{"params": []}], lr=lr, momentum=0.9)
    return Updater(optimizer, learning_rate=lambda _: lr)


def make_stages(
    units: Sequence[nn.Module],
    method: str | MethodSpec,
    keep: str = "",
    *,
    cuts: Sequence[int] = CUTS,
    make_updater: Callable[[list[tuple[str, nn.Parameter]]], Updater] = sgd_updater,
    **options,
) -> list[Stage]:
    """Return the stages of a net; by default four, with the cuts 1, 3, 5."""
    return assemble_stages(
        units,
        names=[type(unit).__name__ for unit in units],
        cuts=cuts,
        method=method_spec(method, keep=keep) if isinstance(method, str) else method,
        make_updater=make_updater,
        loss=functional.cross_entropy,
        seed=7,
        device=torch.device("cpu"),
        **options,
    )


def make_pipeline(
    stages: Sequence[Stage], *, k: int = 1, schedule: str | list[int] = "tight"
) -> InProcessPipeline:
    lookahead = lookaheads(schedule, num_stages=len(stages))
    return InProcessPipeline(stages, lookahead=lookahead, accumulation=k)


def train(
    units: Sequence[nn.Module],
    method: str,
    keep: str = "",
    *,
    count: int = 5,
    k: int = 1,
    schedule: str | list[int] | None = None,
    **options,
) -> list[Stage]:
    """Train one epoch and return the stages; the schedule is the method's usual one."""
    stages = make_stages(units, method, keep, **options)
    locked = method_spec(method, keep=keep).locked
    pipeline = make_pipeline(stages, k=k, schedule=schedule or ("sequential" if locked else "tight"))
    pipeline.train(iter(microbatches(count)), num_microbatches=count)
    return stages


def tensors(units: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers."""
    return {
        f"{n}.{name}": value.detach().clone()
        for n, u in enumerate(units)
        for name, value in u.state_dict().items()
    }


def storages(values: Sequence[Tensor]) -> Iterator[int]:
    """Yield the address of each tensor's memory."""
    yield from (value.untyped_storage().data_ptr() for value in values)
