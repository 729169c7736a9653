"""Blocks, and stages of exact pipelines, are evaluated as one: the bad unit inside is named all the same."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from petractl.engine.block_assembly import Auxiliaries, assemble_blocks
from petractl.engine.block_stage import BlockStage
from petractl.engine.exact_stage import Body, ExactPart
from petractl.engine.pipeline import InProcessPipeline
from petractl.engine.sentinel import Kind, NonFinite, Place, guard
from petractl.engine.update import Updater
from petractl.estimator import LOCAL, Estimator
from petractl.methods.block import Loss
from petractl.methods.evaluation import Evaluator
from petractl.models.auxiliary_nets import AuxiliaryNet

CPU = torch.device("cpu")
COUNT, SIZE, WIDTH, CLASSES = 5, 4, 6, 3
LOSS = Loss(
    functional.cross_entropy,
    lambda logits, labels: functional.cross_entropy(logits, labels, reduction="none"),
)


class Bursts(nn.Module):
    """Its outputs are infinite where an input is large."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.where(x.amax() > 1e6, math.inf, 0.0)


def units() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(WIDTH, WIDTH)),
        Bursts(),
        nn.Linear(WIDTH, WIDTH),
        nn.Linear(WIDTH, CLASSES),
    ]


def updater(named: list[tuple[str, nn.Parameter]]) -> Updater:
    return Updater(torch.optim.SGD([p for _, p in named], lr=0.01), learning_rate=lambda _: 0.01)


def blocks(choice: Estimator) -> list[BlockStage]:
    """Return units 0 to 2 as a block with a linear auxiliary net, and the classifier."""
    net = AuxiliaryNet(nn.Sequential(nn.Flatten(), nn.Linear(WIDTH, CLASSES))) if choice == LOCAL else None
    return assemble_blocks(
        units(),
        names=["first", "bursts", "third", "head"],
        cuts=[3],
        choice=choice,
        auxiliaries=[Auxiliaries(learning=net), Auxiliaries()],
        num_streams=[1, 1, 1, 1],
        make_updater=updater,
        loss=LOSS,
        seed=0,
        device=CPU,
    )


def data(*, bad: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    found = [(torch.randn(SIZE, WIDTH, generator=g), torch.arange(SIZE) % CLASSES) for _ in range(COUNT)]
    found[bad][0][2] = 1e8
    return found


CHOICES = [
    LOCAL,
    Estimator(target="global", guess="random-gaussian"),
    Estimator(derivative="reverse", guess="random-gaussian"),
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_the_unit_inside_a_block_is_named(choice: Estimator) -> None:
    stages = blocks(choice)
    guard(stages, device=CPU, skips=False)
    pipeline = InProcessPipeline(stages, lookahead=[0, 0], accumulation=1)
    with pytest.raises(NonFinite) as raised:
        pipeline.train(iter(data(bad=2)), num_microbatches=COUNT)
    assert raised.value.place == Place(0, 1, "bursts", Kind.ACTIVATION, 2)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_blocks_leave_an_update_out_and_go_on(choice: Estimator) -> None:
    stages = blocks(choice)
    guard(stages, device=CPU, skips=True)
    pipeline = InProcessPipeline(stages, lookahead=[0, 0], accumulation=1)
    pipeline.train(iter(data(bad=2)), num_microbatches=COUNT)
    assert [stage.sentinel.take_skipped().count for stage in stages] == [1, 1]
    assert all(bool(torch.isfinite(p).all()) for stage in stages for p in stage.updater.parameters)
    assert all(stage.counters.updates == COUNT for stage in stages)


def exact_body() -> tuple[Body, list[nn.Module]]:
    """Return a middle stage of an exact pipeline that holds units 0 to 2, guarded."""
    made = units()[:3]
    evaluators = [
        Evaluator(unit, index=4 + n, name=f"u{n}", seed=0, device=CPU) for n, unit in enumerate(made)
    ]
    named = [(name, p) for unit in made for name, p in unit.named_parameters()]
    part = ExactPart(1, evaluators, updater(named))
    guard([part], device=CPU, skips=False)
    body = Body(part, is_first=False, is_last=False, splits_backward=False, device=CPU, wire=CPU)
    return body, made


def test_an_exact_stage_names_the_unit_of_an_activation() -> None:
    body, _ = exact_body()
    body.microbatch = 7
    with pytest.raises(BaseException) as raised:
        body(torch.full((SIZE, WIDTH), 1e8, requires_grad=True))
    assert raised.value.error.place == Place(1, 5, "u1", Kind.ACTIVATION, 7)


def test_an_exact_stage_names_the_unit_of_a_gradient() -> None:
    body, made = exact_body()
    body.microbatch = 7
    made[2].register_full_backward_hook(lambda *_: (torch.full((SIZE, WIDTH), math.nan),))
    (outputs,) = body(torch.ones(SIZE, WIDTH, requires_grad=True))
    with pytest.raises(NonFinite) as raised:
        outputs.sum().backward()
    assert raised.value.place == Place(1, 6, "u2", Kind.GRADIENT, 7)


def test_an_exact_stage_marks_sums() -> None:
    body, made = exact_body()
    guard([body.part], device=CPU, skips=True)
    body.microbatch = 7
    (outputs,) = body(torch.full((SIZE, WIDTH), 1e8, requires_grad=True))
    for p in body.part.parameters:
        p.grad = torch.ones_like(p)
    body.part.sentinel.mark_sums(body.part.parameters)
    assert not body.part.sentinel.may_update()
    assert body.part.sentinel.take_skipped().first == Place(1, 5, "u1", Kind.ACTIVATION, 7)
    assert len(made) == 3
    assert outputs.shape == (SIZE, WIDTH)
