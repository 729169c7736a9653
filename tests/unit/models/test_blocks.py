"""The blocks of local learning: parameters by formula, shapes, what each is made of, and the command line."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

from petractl import build
from petractl.cli.app import app
from petractl.models.blocks import NormalisedHead, PlainBlock
from petractl.models.registry import build_model
from petractl.models.resnet import BasicBlock, ResNetStem
from petractl.models.units import Network
from petractl.planning.flops import unit_costs
from petractl.recipe.load import load_recipe

NAMES = ("resnet18-2b", "resnet18-8b", "resnet18-16b")


def parameters(modules: list[nn.Module]) -> list[int]:
    return [sum(parameter.numel() for parameter in module.parameters()) for module in modules]


def conv(inputs: int, outputs: int, *, side: int = 3) -> int:
    """Return the parameters of a convolution without bias and of the batch norm after it."""
    return side * side * inputs * outputs + 2 * outputs


def residual(inputs: int, outputs: int) -> int:
    """Return the parameters of a residual block."""
    skip = conv(inputs, outputs, side=1) if inputs != outputs else 0
    return conv(inputs, outputs) + conv(outputs, outputs) + skip


def head(channels: int, classes: int) -> int:
    """Return the parameters of batch norm and linear layer."""
    return 2 * channels + (channels + 1) * classes


@pytest.mark.parametrize(("stem", "side"), [("cifar", 3), ("imagenet", 7)])
@pytest.mark.parametrize(("w", "classes", "channels"), [(64, 10, 3), (64, 1000, 3), (6, 5, 2)])
def test_parameters_by_formula(w: int, classes: int, channels: int, stem: str, side: int) -> None:
    start = conv(channels, w, side=side)
    residuals = [residual(w, w), residual(w, w)]
    for inputs in (w, 2 * w, 4 * w):
        residuals += [residual(inputs, 2 * inputs), residual(2 * inputs, 2 * inputs)]
    plain = [conv(w, w)] * 4
    for inputs in (w, 2 * w, 4 * w):
        plain += [conv(inputs, 2 * inputs), *[conv(2 * inputs, 2 * inputs)] * 3]
    expected = {
        "resnet18-2b": [start + sum(residuals[:2]), sum(residuals[2:4]) + head(2 * w, classes)],
        "resnet18-8b": [start + residuals[0], *residuals[1:7], residuals[7] + head(8 * w, classes)],
        "resnet18-16b": [start + plain[0], *plain[1:15], plain[15] + head(8 * w, classes)],
    }
    for name in NAMES:
        with torch.device("meta"):
            built = build_model(name, width=w, classes=classes, in_channels=channels, stem=stem)
        assert parameters(built.units) == expected[name]


def test_resnet18_8b_is_resnet18_with_a_batch_norm_in_its_head() -> None:
    with torch.device("meta"):
        ours, theirs = (build_model(name, classes=10).units for name in ("resnet18-8b", "resnet18"))
    assert sum(parameters(ours)) == sum(parameters(theirs)) + 2 * 512 == 11_174_986


@pytest.mark.parametrize(
    ("name", "downs"), [("resnet18-2b", {1}), ("resnet18-8b", {2, 4, 6}), ("resnet18-16b", {4, 8, 12})]
)
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_shapes(name: str, downs: set[int], stem: str) -> None:
    with torch.device("meta"):
        units = build_model(name, width=4, classes=7, stem=stem).units
    costs = unit_costs(units, input_shape=(3, 32, 32))
    channels, side, expected = 4, 32 if stem == "cifar" else 8, []
    for index in range(len(units) - 1):
        if index in downs:
            channels, side = 2 * channels, side // 2
        expected.append(((channels, side, side),))
    assert [cost.output_shapes for cost in costs] == [*expected, ((7,),)]


def test_names() -> None:
    with torch.device("meta"):
        names = {name: build_model(name, classes=10).names for name in NAMES}
    assert names["resnet18-2b"] == ("stem + block1.1 + block1.2", "block2.1 (down) + block2.2 + head")
    assert names["resnet18-8b"][:3] == ("stem + block1.1", "block1.2", "block2.1 (down)")
    assert names["resnet18-8b"][-1] == "block4.2 + head"
    assert names["resnet18-16b"][4] == "block2.1 (down)"
    assert [len(names[name]) for name in NAMES] == [2, 8, 16]


def test_what_the_blocks_are_made_of() -> None:
    for name, kind, in_first, in_last in (
        ("resnet18-2b", BasicBlock, 2, 2),
        ("resnet18-8b", BasicBlock, 1, 1),
        ("resnet18-16b", PlainBlock, 1, 1),
    ):
        first, *middle, last = build_model(name, width=4, classes=3).units
        assert [type(part) for part in first] == [ResNetStem, *[kind] * in_first]
        assert {type(unit) for unit in middle} <= {kind}
        assert [type(part) for part in last] == [*[kind] * in_last, NormalisedHead]


def test_tensors_are_named_by_unit_and_part() -> None:
    state = Network(build_model("resnet18-2b", width=4, classes=3).units).state_dict()
    assert {name.rpartition(".conv1")[0] for name in state if name.endswith("conv1.weight")} == {
        "units.0.stem",
        "units.0.block1_1",
        "units.0.block1_2",
        "units.1.block2_1",
        "units.1.block2_2",
    }
    assert {"units.1.head.bn.weight", "units.1.head.fc.bias"} <= set(state)


@pytest.mark.parametrize("stride", [1, 2])
def test_plain_block_is_convolution_norm_and_relu(stride: int) -> None:
    block = PlainBlock(3, 5, stride)
    x = torch.randn(2, 3, 8, 8)
    expected = F.relu(block.bn1(F.conv2d(x, block.conv1.weight, stride=stride, padding=1)))
    assert torch.equal(block(x), expected)


def test_head_normalises_pools_and_classifies() -> None:
    module = NormalisedHead(4, 3)
    x = torch.randn(2, 4, 5, 5)
    centred = x - x.mean(dim=(0, 2, 3), keepdim=True)
    normal = centred / (centred.square().mean(dim=(0, 2, 3), keepdim=True) + module.bn.eps).sqrt()
    expected = F.linear(normal.mean(dim=(2, 3)), module.fc.weight, module.fc.bias)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name: str) -> None:
    torch.manual_seed(0)
    network = Network(build_model(name, width=4, classes=3).units)
    images, labels = torch.randn(12, 3, 16, 16), torch.arange(12) % 3
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)

    def step() -> Tensor:
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses = [float(step()) for _ in range(30)]
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(("name", "stages"), [("resnet18-2b", 2), ("resnet18-8b", 8), ("resnet18-16b", 16)])
def test_a_stage_for_each_block(name: str, stages: int) -> None:
    keys = [f"model.name={name}", "model.width=4", "method.name=delayed", "partition.stages=units"]
    assert build.check(load_recipe("digits_revnet18", overrides=keys)).cuts == tuple(range(1, stages))


def test_the_command_line_knows_them() -> None:
    listed = CliRunner().invoke(app, ["ls", "models"]).stdout
    assert all(name in listed for name in NAMES)
    asked = ["--model", "resnet18-8b", "--gpus", "4", "--image-size", "32", "--classes", "10"]
    result = CliRunner().invoke(app, ["partition", *asked, "--flops", "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert [stage["index"] for stage in plan["stages"]] == [0, 1, 2, 3]
    assert sum(stage["parameters"] for stage in plan["stages"]) == 11_174_986
