"""The zoo: counts, shapes, reversibility, memory layout, and torchvision's ResNets."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from petractl.errors import UserError
from petractl.models.registry import build_model, describe_model, list_models
from petractl.models.resnet import ResNetStem
from petractl.models.revnet import BasicDown, BottleneckDown, RevNetHead, RevNetStem
from petractl.models.units import Coupling, Network, Streams, as_streams, is_reversible
from petractl.models.weights import torchvision_names


def count(name: str, **options: object) -> int:
    with torch.device("meta"):
        units = build_model(name, **options).units
    return sum(parameter.numel() for unit in units for parameter in unit.parameters())


@pytest.mark.parametrize(
    ("name", "imagenet", "cifar"),
    [
        ("revnet18", 12_211_048, 11_180_938),
        ("revnet34", 22_319_208, 21_289_098),
        ("revnet50", 30_391_144, 26_319_754),
        ("resnet18", 11_689_512, 11_173_962),
        ("resnet34", 21_797_672, 21_282_122),
        ("resnet50", 25_557_032, 23_520_842),
    ],
)
def test_parameter_counts(name: str, imagenet: int, cifar: int) -> None:
    assert count(name, stem="imagenet", classes=1000) == imagenet
    assert count(name, stem="cifar", classes=10) == cifar


@pytest.mark.parametrize(
    ("name", "num_units", "not_reversible"),
    [
        ("revnet18", 10, {0, 3, 5, 7, 9}),
        ("revnet34", 18, {0, 4, 8, 14, 17}),
        ("revnet50", 18, {0, 1, 4, 8, 14, 17}),
        ("revnet101", 35, {0, 1, 4, 8, 31, 34}),
        ("revnet-iso", 10, {0, 9}),
        ("resnet18", 10, set(range(10))),
        ("resnet101", 35, set(range(35))),
    ],
)
def test_units_and_which_are_reversible(name: str, num_units: int, not_reversible: set[int]) -> None:
    with torch.device("meta"):
        built = build_model(name, classes=10)
    assert len(built.units) == len(built.names) == len(set(built.names)) == num_units
    assert {index for index, unit in enumerate(built.units) if not is_reversible(unit)} == not_reversible


def test_names() -> None:
    with torch.device("meta"):
        names18 = build_model("revnet18", classes=10).names
        names50 = build_model("revnet50", classes=10).names
        iso = build_model("revnet-iso", classes=10, depth=2)
    assert names18[:5] == ("stem", "block1.1", "block1.2", "block2.1 (down)", "block2.2")
    assert names18[-1] == "head"
    assert names50[1:5] == ("block1.1 (widen)", "block1.2", "block1.3", "block2.1 (down)")
    assert iso.names == ("stem", "block1", "block2", "head")


def test_state_names_are_by_unit() -> None:
    with torch.device("meta"):
        state = Network(build_model("revnet18", classes=10).units).state_dict()
    assert "units.1.f.conv1.weight" in state
    assert "units.4.f.bn2.running_var" in state
    assert "units.3.skip_conv.weight" in state


SMALL = [name for name in list_models() if not name.endswith("101")]


def run(units: list[nn.Module], images: Tensor) -> list[Streams]:
    activations: list[Streams] = [(images,)]
    for unit in units:
        activations.append(as_streams(unit(*activations[-1])))
    return activations


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("name", SMALL)
def test_shapes_at_any_width(name: str, stem: str) -> None:
    built = build_model(name, width=3, classes=7, in_channels=2, stem=stem, depth=3)
    side = 32 if stem == "imagenet" else 16
    activations = run(built.units, torch.randn(2, 2, side, side))
    assert activations[1][0].shape == (2, 3, *(2 * [8 if stem == "imagenet" else 16]))
    assert [len(streams) for streams in activations[1:-1]] == (len(built.units) - 1) * [
        1 if name.startswith("resnet") else 2
    ]
    (logits,) = activations[-1]
    assert logits.shape == (2, 7)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_units_do_not_write_to_their_inputs(name: str, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    units = Network(build_model(name, width=4, classes=3, depth=2).units).to(memory_format=layout).units
    streams: Streams = (torch.randn(2, 3, 8, 8).to(memory_format=layout),)
    for unit in units:
        before = [stream.clone() for stream in streams]
        leaves = [stream.detach().requires_grad_() for stream in streams]
        outputs = as_streams(unit(*leaves))
        sum((output * output).sum() for output in outputs).backward()
        assert all(leaf.grad is not None for leaf in leaves)
        assert all(torch.equal(a, b) for a, b in zip(before, streams, strict=True))
        streams = tuple(output.detach() for output in outputs)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_streams_are_dense_and_own_their_memory(stem: str, layout: torch.memory_format, samples: int) -> None:
    unit = RevNetStem(3, 4, stem).to(memory_format=layout)
    x, xt = unit(torch.randn(samples, 3, 16, 16).to(memory_format=layout))
    for stream in (x, xt):
        assert stream.is_contiguous(memory_format=layout)
        assert stream.untyped_storage().nbytes() == stream.numel() * stream.element_size()
    assert x.untyped_storage().data_ptr() != xt.untyped_storage().data_ptr()


def test_channels_last_stays_through_all_units() -> None:
    network = Network(build_model("revnet50", width=2, classes=3).units).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    for streams in run(list(network.units), images)[:-1]:
        assert all(stream.is_contiguous(memory_format=torch.channels_last) for stream in streams)


@pytest.mark.parametrize("name", ["revnet18", "revnet50", "revnet-iso"])
def test_streams_are_float32_under_autocast_and_float64_in_float64(name: str) -> None:
    network = Network(build_model(name, width=4, classes=3, depth=2).units)
    images = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for streams in run(list(network.units), images)[1:-1]:
            assert {stream.dtype for stream in streams} == {torch.float32}
    for streams in run(list(network.double().units), images.double()):
        assert {stream.dtype for stream in streams} == {torch.float64}


def test_couplings_rebuild_their_input() -> None:
    built = build_model("revnet34", width=4, classes=3)
    network = Network(built.units).double()
    activations = run(list(network.units), torch.randn(4, 3, 16, 16, dtype=torch.float64))
    for unit, inputs, outputs in zip(network.units, activations[:-1], activations[1:], strict=True):
        if isinstance(unit, Coupling):
            for rebuilt, given in zip(unit.inverse(*outputs), inputs, strict=True):
                torch.testing.assert_close(rebuilt, given, rtol=0, atol=1e-12)


def test_basic_down_block_is_the_paper_s() -> None:
    unit = BasicDown(4, 8, stride=2)
    x, xt = torch.randn(2, 2, 4, 8, 8)
    h = F.relu(unit.bn1(F.conv2d(x, unit.conv1.weight, stride=2, padding=1)))
    y = F.relu(unit.bn2(F.conv2d(h, unit.conv2.weight, padding=1)))
    y = y + unit.skip_bn(F.conv2d(xt, unit.skip_conv.weight, stride=2))
    assert all(torch.equal(a, b) for a, b in zip(unit(x, xt), (y, h), strict=True))


@pytest.mark.parametrize("stride", [1, 2])
def test_bottleneck_down_block_is_the_paper_s(stride: int) -> None:
    unit = BottleneckDown(4, 3, stride=stride)
    x, xt = torch.randn(2, 2, 4, 8, 8)
    f = unit.f
    h = F.relu(f.bn1(F.conv2d(x, f.conv1.weight)))
    h = F.relu(f.bn2(F.conv2d(h, f.conv2.weight, stride=stride, padding=1)))
    h = F.relu(f.bn3(F.conv2d(h, f.conv3.weight)))
    y = h + unit.skip_bn(F.conv2d(xt, unit.skip_conv.weight, stride=stride))
    yt = unit.carry_bn(F.conv2d(x, unit.carry_conv.weight, stride=stride))
    assert y.shape == (2, 12, 8 // stride, 8 // stride)
    assert all(torch.equal(a, b) for a, b in zip(unit(x, xt), (y, yt), strict=True))


def test_head_pools_the_concatenated_streams() -> None:
    unit = RevNetHead(4, 3)
    x, xt = torch.randn(2, 2, 4, 5, 5)
    expected = F.linear(torch.cat([x, xt], dim=1).mean(dim=(2, 3)), unit.fc.weight, unit.fc.bias)
    torch.testing.assert_close(unit(x, xt), expected)


def test_stem_splits_the_channels_in_halves() -> None:
    unit = RevNetStem(3, 4, "imagenet")
    images = torch.randn(2, 3, 16, 16)
    h = F.relu(unit.bn1(F.conv2d(images, unit.conv1.weight, stride=2, padding=3)))
    h = F.max_pool2d(h, 3, stride=2, padding=1)
    x, xt = unit(images)
    assert torch.equal(x, h[:, :4])
    assert torch.equal(xt, h[:, 4:])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_give_torchvision_s_output(name: str) -> None:
    theirs = getattr(torchvision.models, name)(weights=None, num_classes=10)
    ours = Network(build_model(name, classes=10, stem="imagenet").units)
    names = torchvision_names(ours)
    ours.load_state_dict({names[key]: tensor for key, tensor in theirs.state_dict().items()})
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for training in (True, False):
            assert torch.equal(ours.train(training)(images), theirs.train(training)(images))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_resnets_have_torchvision_s_tensors(name: str) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(weights=None).state_dict()
        network = Network(build_model(name, classes=1000, stem="imagenet").units)
    names = torchvision_names(network)
    ours = network.state_dict()
    assert set(names) == set(theirs)
    assert set(names.values()) == set(ours)
    assert all(ours[names[key]].shape == tensor.shape for key, tensor in theirs.items())


def test_initialisation_is_torchvision_s() -> None:
    torch.manual_seed(0)
    units = build_model("revnet18", width=32, classes=10).units
    for unit in units:
        for module in unit.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
                assert module.bias is None
                assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
            if isinstance(module, nn.BatchNorm2d):
                assert torch.all(module.weight == 1)
                assert torch.all(module.bias == 0)


def test_the_seed_decides_the_weights() -> None:
    def weights() -> list[Tensor]:
        torch.manual_seed(3)
        return list(Network(build_model("revnet18", width=2, classes=3).units).state_dict().values())

    assert all(torch.equal(a, b) for a, b in zip(weights(), weights(), strict=True))


def test_every_model_has_a_description() -> None:
    assert len(list_models()) == 12
    assert all(describe_model(name) for name in list_models())


def test_meta_device_allocates_no_weights() -> None:
    with torch.device("meta"):
        unit = build_model("resnet18", classes=10).units[0]
    assert isinstance(unit, ResNetStem)
    assert unit.conv1.weight.is_meta


@pytest.mark.parametrize(
    ("options", "where", "text"),
    [
        ({"name": "revnet-18"}, "model.name", 'did you mean "revnet18"'),
        ({"name": "vit"}, "model.name", "there are"),
        ({"name": "revnet18", "stem": "mnist"}, "model.stem", "cifar, imagenet"),
        ({"name": "revnet18", "width": 0}, "model.width", "below 1"),
        ({"name": "revnet18", "classes": 0}, "model.classes", "below 1"),
        ({"name": "revnet-iso", "depth": 0}, "model.depth", "below 1"),
        ({"name": "revnet18", "arguments": {"blocks": 3}}, "model.arguments", "blocks"),
    ],
)
def test_mistakes_are_told(options: dict[str, object], where: str, text: str) -> None:
    with pytest.raises(UserError) as caught:
        build_model(**{"classes": 10, **options})
    assert caught.value.where == where
    assert text in str(caught.value)
