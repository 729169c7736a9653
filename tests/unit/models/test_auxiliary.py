"""Auxiliary nets: their layers, every one on every block, the user's own, and what can be wrong."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from petractl.errors import UserError
from petractl.models.auxiliary import AUXILIARY_NETS, build_auxiliaries, build_auxiliary
from petractl.models.auxiliary_nets import AuxiliaryNet, QuadrantMeans, join_streams, reinitialise
from petractl.models.registry import build_model
from petractl.models.units import Streams, as_streams

NETS = """
import torch
from torch import nn

NUMBER = 3
SHARED = nn.Linear(4, 5)

def pooled(channels, height, width, classes, num_blocks, hidden=3):
    assert (height, width) == (6, 4) and num_blocks == 8
    layers = nn.Conv2d(channels, hidden, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(hidden, classes))

def any_images(channels, classes, **others):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(channels, classes))

def shared(channels, classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), SHARED)

def needs_more(channels, growth):
    return nn.Identity()

def raises(channels):
    raise ValueError("no such thing")

def returns_a_list():
    return [nn.Flatten()]

def returns_images():
    return nn.Identity()

def fails(classes):
    return nn.Linear(1000, classes)

class Scale(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return x * self.scale

def without_reset(channels, classes):
    return nn.Sequential(Scale(channels), any_images(channels, classes))
"""


@pytest.fixture(autouse=True)
def current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_auxiliaries.py").write_text(NETS)
    yield
    sys.modules.pop("own_auxiliaries", None)


def build(name: str, *shapes: tuple[int, ...], num_blocks: int = 8, **options: object) -> AuxiliaryNet:
    return build_auxiliary(name, shapes=shapes or [(4, 6, 4)], classes=5, num_blocks=num_blocks, **options)


def shapes_of(net: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Return every layer's name and its weight's shape, and each bias that a linear layer has."""
    return [
        (type(layer).__name__, tuple(parameter.shape))
        for layer in net.modules()
        for name, parameter in layer.named_parameters(recurse=False)
        if name == "weight" or not isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
    ]


@pytest.mark.parametrize(
    ("num_blocks", "width", "h"), [(2, 0, 32), (8, 0, 32), (9, 0, 16), (16, 0, 16), (8, 7, 7)]
)
def test_layers_of_the_cnn(num_blocks: int, width: int, h: int) -> None:
    auxiliary = build("cnn", (64, 32, 32), num_blocks=num_blocks, width=width)
    group = [("HalvingConv", (h, h, 3, 3)), ("BatchNorm2d", (h,))]
    assert shapes_of(auxiliary) == [
        *(("Conv2d", (h, 64, 1, 1)), ("BatchNorm2d", (h,))),
        *group * 3,
        *(("Linear", (5, 4 * h)), ("Linear", (5,))),
    ]
    convolutions = [layer for layer in auxiliary.modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.stride for layer in convolutions] == [(1, 1), (2, 2), (2, 2), (2, 2)]
    assert [layer.padding for layer in convolutions] == [(0, 0), (1, 1), (1, 1), (1, 1)]
    kinds = [type(layer).__name__ for layer in auxiliary.net]
    group = ["HalvingConv", "BatchNorm2d", "ReLU"]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", *group * 3, "QuadrantMeans", "Linear"]


@pytest.mark.parametrize(
    ("num_blocks", "width", "h"), [(2, 0, 1024), (8, 0, 1024), (9, 0, 512), (16, 0, 512), (8, 7, 7)]
)
def test_layers_of_the_mlp(num_blocks: int, width: int, h: int) -> None:
    auxiliary = build("mlp", (3, 8, 8), num_blocks=num_blocks, width=width)
    group = [("Linear", (h, h)), ("BatchNorm1d", (h,))]
    assert shapes_of(auxiliary) == [
        *(("Linear", (h, 12)), ("BatchNorm1d", (h,))),
        *group * 2,
        *(("Linear", (5, h)), ("Linear", (5,))),
    ]
    kinds = [type(layer).__name__ for layer in auxiliary.net]
    assert kinds == ["QuadrantMeans"] + ["Linear", "BatchNorm1d", "ReLU"] * 3 + ["Linear"]


def test_layers_of_the_linear_net() -> None:
    auxiliary = build("linear", (64, 32, 32))
    assert shapes_of(auxiliary) == [("BatchNorm2d", (64,)), ("Linear", (5, 256)), ("Linear", (5,))]
    assert [type(layer).__name__ for layer in auxiliary.net] == ["BatchNorm2d", "QuadrantMeans", "Linear"]


@pytest.mark.parametrize("sides", [(1, 1), (2, 2), (3, 3), (8, 6), (7, 4), (1, 5), (9, 9)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pool_is_the_adaptive_average_pool(sides: tuple[int, int], layout: torch.memory_format) -> None:
    x = torch.randn(3, 4, *sides, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    ours, theirs = QuadrantMeans()(x), F.adaptive_avg_pool2d(x, 2).flatten(1)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn_like(ours)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def blocks_of(model: str, cuts: list[int] | None) -> tuple[list[nn.Module], list[Streams], list[int]]:
    """Return the units at width 8, the streams that each returns for images of 16x16, and the cuts."""
    torch.manual_seed(0)
    units = build_model(model, width=8, classes=5).units
    streams: Streams = (torch.randn(4, 3, 16, 16),)
    found = []
    for unit in units:
        streams = tuple(stream.detach() for stream in as_streams(unit(*streams)))
        found.append(streams)
    return units, found, list(range(1, len(units))) if cuts is None else cuts


CASES = [
    ("resnet18-2b", None),
    ("resnet18-8b", None),
    ("resnet18-16b", None),
    ("revnet18", None),
    ("revnet18", [3, 5]),
]


@pytest.mark.parametrize(("model", "cuts"), CASES)
@pytest.mark.parametrize("name", [*AUXILIARY_NETS, "own_auxiliaries:any_images"])
def test_every_net_on_every_block(model: str, cuts: list[int] | None, name: str) -> None:
    units, streams, cuts = blocks_of(model, cuts)
    shapes = [[tuple(s.shape[1:]) for s in each] for each in streams]
    auxiliaries = build_auxiliaries(name, units=units, shapes=shapes, cuts=cuts, classes=5)
    assert len(auxiliaries) == len(cuts)
    for auxiliary, cut in zip(auxiliaries, cuts, strict=True):
        leaves = [stream.clone().requires_grad_() for stream in streams[cut - 1]]
        logits = auxiliary(*leaves)
        assert logits.shape == (4, 5)
        F.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
        assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves)
        assert all(parameter.grad is not None for parameter in auxiliary.parameters())
        assert all(map(torch.equal, leaves, streams[cut - 1]))


def test_widths_follow_the_number_of_blocks() -> None:
    for model, width in (("resnet18-8b", 32), ("resnet18-16b", 16), ("revnet18", 16)):
        with torch.device("meta"):
            units = build_model(model, width=8, classes=5).units
            shapes = [[(8, 4, 4)]] * len(units)
            cuts = range(1, len(units))
            auxiliaries = build_auxiliaries("cnn", units=units, shapes=shapes, cuts=cuts, classes=5)
        assert {auxiliary.net[0].out_channels for auxiliary in auxiliaries} == {width}
        assert all(parameter.is_meta for auxiliary in auxiliaries for parameter in auxiliary.parameters())


@pytest.mark.parametrize("name", ["cnn", "mlp", "linear"])
@pytest.mark.parametrize("side", [1, 2, 3, 5])
def test_small_images_and_eval_mode(name: str, side: int) -> None:
    auxiliary = build(name, (4, side, side))
    assert auxiliary(torch.randn(3, 4, side, side)).shape == (3, 5)
    assert auxiliary.eval()(torch.randn(1, 4, side, side)).shape == (1, 5)


@pytest.mark.parametrize("name", ["cnn", "mlp", "linear"])
@pytest.mark.parametrize("side", [3, 8])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own use of it
def test_forward_mode_gives_what_reverse_mode_gives(name: str, side: int) -> None:
    torch.manual_seed(0)
    auxiliary = build(name, (4, side, side)).double()
    x, tangent = torch.randn(2, 6, 4, side, side, dtype=torch.float64)
    with forward_ad.dual_level():
        forward = forward_ad.unpack_dual(auxiliary(forward_ad.make_dual(x, tangent))).tangent
    assert forward is not None
    weights = torch.randn_like(forward)
    (gradient,) = torch.autograd.grad((auxiliary(x.requires_grad_()) * weights).sum(), x)
    torch.testing.assert_close((forward * weights).sum(), (gradient * tangent).sum())


def test_streams_are_put_together_over_the_channels() -> None:
    x, y = torch.randn(2, 3, 4, 6, 6)
    auxiliary = build("cnn", (4, 6, 6), (4, 6, 6))
    assert auxiliary.net[0].in_channels == 8
    assert torch.equal(auxiliary(x, y), auxiliary.net(torch.cat([x, y], dim=1)))


@pytest.mark.parametrize("name", ["cnn", "mlp", "linear", "own_auxiliaries:any_images"])
def test_features_and_tokens_are_images_of_one_pixel(name: str) -> None:
    features, tokens = torch.randn(6, 4), torch.randn(6, 7, 3)
    images = join_streams((features, tokens))
    torch.testing.assert_close(images, torch.cat([features, tokens.mean(1)], dim=1).reshape(6, 7, 1, 1))
    auxiliary = build(name, (4,), (7, 3))
    assert auxiliary(features, tokens).shape == (6, 5)


def test_copy_is_the_second_part_without_its_head() -> None:
    units = build_model("resnet18-2b", width=4, classes=5).units
    auxiliary = build("copy", (4, 8, 8), num_blocks=2, next_block=units[1:])
    first, second = auxiliary.copied
    assert shapes_of(first) == shapes_of(units[1].block2_1)
    assert shapes_of(second) == shapes_of(units[1].block2_2)
    assert shapes_of(auxiliary.net) == [("BatchNorm2d", (8,)), ("Linear", (5, 32)), ("Linear", (5,))]
    assert first.conv1.weight.shape == units[1].block2_1.conv1.weight.shape
    assert not torch.equal(first.conv1.weight, units[1].block2_1.conv1.weight)


def test_copy_does_not_touch_what_it_copies() -> None:
    block = build_model("revnet18", width=4, classes=5).units[2:5]
    before = [{name: tensor.clone() for name, tensor in unit.state_dict().items()} for unit in block]
    auxiliary = build("copy", (4, 8, 8), (4, 8, 8), next_block=block)
    assert [type(module) for module in auxiliary.copied] == [type(unit) for unit in block]
    auxiliary(*torch.randn(2, 3, 4, 8, 8))
    for unit, state in zip(block, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in unit.state_dict().items())


def test_copy_of_a_head_alone_is_the_linear_net() -> None:
    head = build_model("revnet18", width=4, classes=5).units[-1]
    auxiliary = build("copy", (32, 2, 2), (32, 2, 2), next_block=[head])
    assert len(auxiliary.copied) == 0
    assert auxiliary.net[0].num_features == 64


def test_copy_of_layers_without_images() -> None:
    auxiliary = build("copy", (6,), next_block=[nn.Sequential(nn.Linear(6, 9), nn.ReLU()), nn.Linear(9, 5)])
    assert [type(module).__name__ for module in auxiliary.copied] == ["Linear", "ReLU", "Linear"]
    assert auxiliary(torch.randn(4, 6)).shape == (4, 5)


@pytest.mark.parametrize("name", AUXILIARY_NETS)
def test_the_seed_decides_and_initialising_anew_draws_others(name: str) -> None:
    block = build_model("resnet18-8b", width=4, classes=5).units[1:2]

    def made(seed: int) -> AuxiliaryNet:
        torch.manual_seed(seed)
        return build(name, (4, 6, 6), next_block=block)

    def equal(a: AuxiliaryNet, b: AuxiliaryNet) -> bool:
        return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))

    auxiliary = made(1)
    assert equal(auxiliary, made(1))
    assert not equal(auxiliary, made(2))
    parameters = list(auxiliary.parameters())
    auxiliary(torch.randn(4, 4, 6, 6))
    torch.manual_seed(3)
    reinitialise(auxiliary)
    again = made(1)
    torch.manual_seed(3)
    reinitialise(again)
    assert equal(auxiliary, again)
    assert not equal(auxiliary, made(1))
    assert all(a is b for a, b in zip(parameters, auxiliary.parameters(), strict=True))
    norms = [m for m in auxiliary.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert all(norm.num_batches_tracked == 0 and norm.running_mean.eq(0).all() for norm in norms)


def test_convolutions_are_initialised_as_the_zoo_s() -> None:
    torch.manual_seed(0)
    auxiliary = build("cnn", (64, 8, 8))
    for _ in range(2):
        for layer in auxiliary.modules():
            if isinstance(layer, nn.Conv2d):
                fan_out = layer.out_channels * layer.kernel_size[0] ** 2
                assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
        reinitialise(auxiliary)


def test_user_s_function_gets_what_its_signature_names() -> None:
    auxiliary = build("own_auxiliaries:pooled", arguments={"hidden": 9})
    assert auxiliary.net[0].weight.shape == (9, 4, 1, 1)
    assert auxiliary(torch.randn(2, 4, 6, 4)).shape == (2, 5)


def test_building_a_user_s_net_draws_only_its_weights() -> None:
    build("own_auxiliaries:any_images")  # importing the module draws too
    torch.manual_seed(0)
    build("own_auxiliaries:any_images")
    after = torch.rand(1)
    torch.manual_seed(0)
    nn.Linear(4, 5)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize(
    ("options", "where", "text"),
    [
        ({"name": "linar"}, "auxiliary.name", 'did you mean "linear"'),
        ({"name": "CNN"}, "auxiliary.name", 'did you mean "cnn"'),
        ({"name": "resnet"}, "auxiliary.name", "there are cnn, mlp, linear, copy"),
        ({"name": "cnn", "width": -1}, "auxiliary.width", "-1 is below 0"),
        ({"name": "linear", "width": 3}, "auxiliary.width", "linear has no width"),
        ({"name": "copy", "width": 3}, "auxiliary.width", "copy has no width"),
        ({"name": "own_auxiliaries:pooled", "width": 3}, "auxiliary.width", "auxiliary.arguments"),
        (
            {"name": "cnn", "arguments": {"depth": 3}},
            "auxiliary.arguments",
            "takes no arguments, but got depth",
        ),
        ({"name": "cnn", "shapes": [(4, 6, 6), (4, 3, 3)]}, "auxiliary.name", "(4, 6, 6), (4, 3, 3)"),
        ({"name": "mlp", "shapes": [(4, 2, 6, 6)]}, "auxiliary.name", "(4, 2, 6, 6)"),
        ({"name": "linear", "shapes": [()]}, "auxiliary.name", "shape ()"),
        ({"name": "copy"}, "auxiliary.name", "there is none"),
        ({"name": "no_such_module:net"}, "auxiliary.name", 'there is no module "no_such_module"'),
        ({"name": "own_auxiliaries:pool"}, "auxiliary.name", 'did you mean "pooled"'),
        ({"name": "own_auxiliaries:NUMBER"}, "auxiliary.name", "is a int, not a function"),
        ({"name": "own_auxiliaries:SHARED"}, "auxiliary.name", "raised TypeError"),
        ({"name": "own_auxiliaries:needs_more"}, "auxiliary.arguments", "needs growth"),
        ({"name": "own_auxiliaries:pooled", "arguments": {"b": 1}}, "auxiliary.arguments", "takes no b"),
        ({"name": "own_auxiliaries:raises"}, "auxiliary.name", "raised ValueError: no such thing"),
        ({"name": "own_auxiliaries:returns_a_list"}, "auxiliary.name", "returned a list"),
        ({"name": "own_auxiliaries:returns_images"}, "auxiliary.name", "returns (4, 6, 4) per sample"),
        ({"name": "own_auxiliaries:fails"}, "auxiliary.name", "fails on images of (4, 6, 4) per sample"),
    ],
)
def test_mistakes_are_told(options: dict[str, object], where: str, text: str) -> None:
    with pytest.raises(UserError) as caught:
        build_auxiliary(**{"shapes": [(4, 6, 4)], "classes": 5, "num_blocks": 8, **options})
    assert caught.value.where == where
    assert text in f"{caught.value} {caught.value.hint}"


def test_a_net_shared_by_two_blocks_is_an_error() -> None:
    units = build_model("resnet18-8b", width=4, classes=5).units
    options = {"shapes": [[(4, 6, 4)]] * 8, "classes": 5}
    assert len(build_auxiliaries("own_auxiliaries:shared", units=units, cuts=[4], **options)) == 1
    with pytest.raises(UserError, match="blocks 0 and 1 of own_auxiliaries:shared share") as caught:
        build_auxiliaries("own_auxiliaries:shared", units=units, cuts=[2, 4, 6], **options)
    assert caught.value.where == "auxiliary.name"


def test_a_user_s_module_without_reset_cannot_be_initialised_anew() -> None:
    auxiliary = build("own_auxiliaries:without_reset")
    with pytest.raises(UserError, match="Scale has parameters and no reset_parameters"):
        reinitialise(auxiliary)


def test_one_block_has_no_auxiliary_net() -> None:
    units = build_model("resnet18-2b", width=4, classes=5).units
    assert build_auxiliaries("cnn", units=units, shapes=[], cuts=[], classes=5) == []


def test_a_cnn_on_a_map_of_one_pixel_has_a_finite_gradient_in_bfloat16_every_time() -> None:
    """oneDNN leaves parts of it unwritten (bfloat16, stride 2, 1x1), so what lay in memory came out."""
    torch.manual_seed(0)
    net = build_auxiliary("cnn", shapes=[(8, 1, 1)], classes=4, num_blocks=2)
    x, labels = torch.randn(16, 8, 1, 1), torch.randint(4, (16,))
    found = []
    for fill in (1e30, float("nan"), -1e30):
        torch.full((1 << 20,), fill)  # memory that is handed out again
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(net(x), labels)
        found.append(torch.autograd.grad(loss, list(net.parameters())))
    for gradients in found:
        for actual, expected in zip(gradients, found[0], strict=True):
            assert expected.isfinite().all()
            assert torch.equal(actual, expected)
