"""Weights on disk: round trip, bytes, torchvision's names, another head, and files that do not fit."""

import os
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from petractl.errors import UserError
from petractl.models.registry import build_model
from petractl.models.units import Network
from petractl.models.weights import load_weights, save_weights


def network(name: str = "revnet18", *, seed: int = 0, classes: int = 5, width: int = 2) -> Network:
    torch.manual_seed(seed)
    return Network(build_model(name, width=width, classes=classes).units)


def test_round_trip_keeps_values_and_strides(tmp_path: Path) -> None:
    first = network(seed=1)
    first(torch.randn(2, 3, 8, 8))
    second = network(seed=2).to(memory_format=torch.channels_last)
    strides = {name: tensor.stride() for name, tensor in second.state_dict().items()}
    save_weights(first, tmp_path / "deep" / "w.safetensors")
    result = load_weights(second, tmp_path / "deep" / "w.safetensors")
    state = second.state_dict()
    assert result.left == ()
    assert set(result.loaded) == set(state)
    assert all(torch.equal(state[name], tensor) for name, tensor in first.state_dict().items())
    assert {name: tensor.stride() for name, tensor in state.items()} == strides


def test_equal_weights_give_equal_bytes_whatever_their_layout(tmp_path: Path) -> None:
    save_weights(network(), tmp_path / "a.safetensors")
    save_weights(network().to(memory_format=torch.channels_last), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert b"__metadata__" not in (tmp_path / "a.safetensors").read_bytes()


def test_saving_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")
    umask = os.umask(0o022)
    try:
        save_weights(network(), path)
    finally:
        os.umask(umask)
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o644
    assert "units.1.f.conv1.weight" in load_file(path)


def test_failed_saving_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("petractl.models.weights.save_file", fail)
    with pytest.raises(UserError, match="disk full"):
        save_weights(network(), path)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_names_are_understood(tmp_path: Path, name: str) -> None:
    theirs = getattr(torchvision.models, name)(weights=None, num_classes=6)
    save_file(theirs.state_dict(), tmp_path / "tv.safetensors")
    ours = Network(build_model(name, classes=6, stem="imagenet").units)
    assert load_weights(ours, tmp_path / "tv.safetensors").left == ()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), theirs.eval()(images))


def test_head_for_other_classes_stays_as_initialised(tmp_path: Path) -> None:
    save_weights(network(classes=9), tmp_path / "w.safetensors")
    target = network(seed=1, classes=5)
    head = target.units[9].fc.weight.clone()
    result = load_weights(target, tmp_path / "w.safetensors")
    assert result.left == ("units.9.fc.weight", "units.9.fc.bias")
    assert torch.equal(target.units[9].fc.weight, head)
    assert torch.equal(target.units[0].conv1.weight, network(classes=9).units[0].conv1.weight)


def test_counters_of_batches_may_be_missing(tmp_path: Path) -> None:
    tensors = {name: t.clone() for name, t in network().state_dict().items() if "num_batches" not in name}
    save_file(tensors, tmp_path / "w.safetensors")
    left = load_weights(network(seed=1), tmp_path / "w.safetensors").left
    assert left
    assert all(name.endswith("num_batches_tracked") for name in left)


def test_half_precision_file_fills_a_float32_network(tmp_path: Path) -> None:
    tensors = {name: t.half() if t.is_floating_point() else t for name, t in network().state_dict().items()}
    save_file(tensors, tmp_path / "w.safetensors")
    target = network(seed=1)
    load_weights(target, tmp_path / "w.safetensors")
    assert target.units[0].conv1.weight.dtype == torch.float32
    assert torch.equal(target.units[0].conv1.weight, tensors["units.0.conv1.weight"].float())


def test_mismatch_names_the_tensors_and_changes_nothing(tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in network(seed=1).state_dict().items()}
    tensors["units.0.conv1.weight"] = torch.zeros(1, 3, 3, 3)
    tensors["units.0.extra"] = torch.zeros(1)
    del tensors["units.9.fc.bias"]
    save_file(tensors, tmp_path / "w.safetensors")
    target = network()
    with pytest.raises(UserError) as caught:
        load_weights(target, tmp_path / "w.safetensors")
    for text in (
        "units.9.fc.bias is missing",
        "units.0.extra is not in the model",
        "units.0.conv1.weight is (1, 3, 3, 3), not (4, 3, 3, 3)",
    ):
        assert text in str(caught.value)
    state = network().state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in target.state_dict().items())


def test_long_lists_are_cut(tmp_path: Path) -> None:
    save_weights(network("resnet18"), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"and \d+ more"):
        load_weights(network("revnet18"), tmp_path / "w.safetensors")


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_weights(network(), tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="no such file"):
        load_weights(network(), tmp_path)
    (tmp_path / "bad.safetensors").write_bytes(b"not what it seems" * 9)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_weights(network(), tmp_path / "bad.safetensors")
    save_weights(network(), tmp_path / "cut.safetensors")
    data = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-10])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_weights(network(), tmp_path / "cut.safetensors")


def test_torchvision_names_do_not_fit_a_revnet(tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18(weights=None, num_classes=2)
    save_file(theirs.state_dict(), tmp_path / "tv.safetensors")
    with pytest.raises(UserError, match="only fit the ResNets"):
        load_weights(network(), tmp_path / "tv.safetensors")
