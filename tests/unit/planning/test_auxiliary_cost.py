"""What auxiliary nets cost: closed forms, the paper's 10 per cent, and the table in the docs."""

import re
from pathlib import Path

import pytest
import torch

from petractl.models.auxiliary import AUXILIARY_NETS, build_auxiliaries
from petractl.models.registry import build_model
from petractl.planning.auxiliary_cost import AuxiliaryCost, auxiliary_costs
from petractl.planning.flops import unit_costs

DOCS = Path(__file__).parents[3] / "docs" / "models.md"
MODELS = ("resnet18-2b", "resnet18-8b", "resnet18-16b", "revnet18")


def costs_of(
    model: str, name: str, *, cuts: list[int] | None = None, width: int = 64
) -> tuple[list[AuxiliaryCost], list[int]]:
    """Return the nets' costs at width 64 on CIFAR-10's images, and the units' FLOPs."""
    with torch.device("meta"):
        units = build_model(model, width=width, classes=10).units
        costs = unit_costs(units, input_shape=(3, 32, 32))
        cuts = list(range(1, len(units))) if cuts is None else cuts
        shapes = [cost.output_shapes for cost in costs]
        nets = build_auxiliaries(name, units=units, shapes=shapes, cuts=cuts, classes=10)
    return auxiliary_costs(nets, costs, cuts=cuts), [cost.flops for cost in costs]


def test_closed_forms_on_the_first_block() -> None:
    stem, block = 2 * 1024 * 9 * 3 * 64, 2 * 2 * 1024 * 9 * 64 * 64
    cnn, flops = costs_of("resnet18-8b", "cnn")
    assert flops[:2] == [stem + block, block]
    expected = 2 * (1024 * 64 * 32 + (256 + 64 + 16) * 9 * 32 * 32 + 128 * 10)
    weights = 64 * 32 + 3 * 9 * 32 * 32 + 4 * 2 * 32 + 129 * 10
    assert cnn[0] == AuxiliaryCost(expected, weights, stem + block)
    mlp, _ = costs_of("resnet18-8b", "mlp")
    assert mlp[0].flops == 2 * (256 * 1024 + 2 * 1024 * 1024 + 1024 * 10)
    assert mlp[0].parameters == mlp[0].flops // 2 + 3 * 2 * 1024 + 10
    linear, _ = costs_of("resnet18-8b", "linear")
    assert linear[0] == AuxiliaryCost(2 * 256 * 10, 2 * 64 + 257 * 10, stem + block)


def test_a_block_of_several_units_has_all_their_flops() -> None:
    nets, flops = costs_of("revnet18", "cnn", cuts=[3, 5])
    assert [net.block_flops for net in nets] == [sum(flops[:3]), sum(flops[3:5])]
    assert all(0 < net.share < 0.1 for net in nets)


@pytest.mark.parametrize("model", ["resnet18-2b", "resnet18-8b", "resnet18-16b"])
@pytest.mark.parametrize("name", ["cnn", "mlp", "linear"])
def test_under_a_tenth_of_the_block_at_the_paper_s_width(model: str, name: str) -> None:
    nets, _ = costs_of(model, name)
    assert all(net.share < 0.1 for net in nets)


def test_a_block_without_flops_has_no_share() -> None:
    assert AuxiliaryCost(10, 1, 0).share is None


def test_the_docs_have_the_shares() -> None:
    rows = re.findall(r"^\| `(\w+)` \|((?: [\d.]+ %, [\d.]+ % \|)+)$", DOCS.read_text(), flags=re.M)
    assert [name for name, _ in rows] == list(AUXILIARY_NETS)
    for name, cells in rows:
        for model, cell in zip(MODELS, cells.strip(" |").split(" | "), strict=True):
            shares = [100 * net.share for net in costs_of(model, name)[0]]
            assert cell == f"{sum(shares) / len(shares):.2f} %, {max(shares):.2f} %"
