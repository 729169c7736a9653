"""Costs of units: closed forms, no side effects, and units that cannot run on the meta device."""

import pytest
import torch
from torch import Tensor, nn

from petractl.errors import UserError
from petractl.models.registry import build_model
from petractl.planning.flops import unit_costs


def test_revnet18_on_cifar_in_closed_form() -> None:
    units = build_model("revnet18", width=8, classes=10).units
    costs = unit_costs(units, input_shape=(3, 32, 32))
    stem = 2 * 32 * 32 * 9 * 3 * 16
    block = 2 * 2 * 32 * 32 * 9 * 8 * 8
    down = 2 * 16 * 16 * (9 * 8 * 16 + 9 * 16 * 16 + 8 * 16)
    assert [cost.flops for cost in costs[:4]] == [stem, block, block, down]
    assert costs[-1].flops == 2 * 2 * 64 * 10
    assert costs[0].output_shapes == ((8, 32, 32), (8, 32, 32))
    assert costs[3].output_shapes == ((16, 16, 16), (16, 16, 16))
    assert costs[-1].output_shapes == ((10,),)
    assert [c.parameters for c in costs] == [sum(p.numel() for p in unit.parameters()) for unit in units]


def test_resnet50_has_the_known_total() -> None:
    with torch.device("meta"):
        units = build_model("resnet50", classes=1000, stem="imagenet").units
    total = sum(cost.flops for cost in unit_costs(units, input_shape=(3, 224, 224)))
    assert total / 2e9 == pytest.approx(4.09, abs=0.01)


def test_nothing_changes() -> None:
    units = build_model("revnet18", width=2, classes=3).units
    before = [{name: t.clone() for name, t in unit.state_dict().items()} for unit in units]
    torch.manual_seed(0)
    random = torch.get_rng_state()
    unit_costs(units, input_shape=(3, 8, 8))
    unit_costs([nn.Dropout(), nn.RReLU()], input_shape=(3, 8, 8))
    assert torch.equal(random, torch.get_rng_state())
    for unit, state in zip(units, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in unit.state_dict().items())
        assert all(parameter.grad is None for parameter in unit.parameters())


class ReadsValues(nn.Module):
    """What the meta device cannot do: look at a value."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.dropout = nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if float(x.sum()) > 1e9:
            raise AssertionError
        return self.dropout(self.linear(x))


def test_unit_without_meta_implementation_runs_on_zeros() -> None:
    unit, last = ReadsValues(), nn.Linear(6, 2)
    torch.manual_seed(0)
    random = torch.get_rng_state()
    costs = unit_costs([nn.Flatten(), unit, last], input_shape=(1, 2, 2))
    assert [cost.flops for cost in costs] == [0, 48, 24]
    assert unit.calls == 0
    assert torch.equal(random, torch.get_rng_state())


def test_double_precision_units() -> None:
    assert unit_costs([nn.Linear(4, 6).double()], input_shape=(4,))[0].flops == 48


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_unit_that_cannot_be_called_is_named(device: str) -> None:
    units = [nn.Flatten().to(device), nn.Linear(4, 6).to(device), nn.Linear(5, 2).to(device)]
    with pytest.raises(UserError, match=r"unit 2 \(Linear\) fails on streams of \(6,\) per sample"):
        unit_costs(units, input_shape=(1, 2, 2))


class ReturnsText(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "x"


def test_unit_that_returns_no_tensor_is_named() -> None:
    with pytest.raises(UserError, match=r"unit 0 \(ReturnsText\).*must return a tensor"):
        unit_costs([ReturnsText()], input_shape=(1, 2, 2))
