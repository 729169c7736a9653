"""Oracle 1: one stage is plain PyTorch, to the bit.

Everything is compared: each update's averaged gradient, the parameters after it, running statistics,
momentum, loss; two epochs, with partial groups for k = 2 and 3.
"""

import copy

import pytest
import torch
from oracle_nets import (
    adamw_at_rest,
    compare,
    epochs,
    make_net,
    run_engine,
    sgd,
)
from oracle_references import train_plainly
from torch import nn

from petractl.engine import pipeline
from petractl.models.units import Network

DTYPES = [torch.float32, torch.float64]
METHODS = [
    ("backprop", ""),
    ("delayed", "graph"),
    ("delayed", "inputs"),
    ("delayed", "inputs+parameters"),
]


def run(method: str, keep: str = "", *, net: str = "revnet18", k: int = 1, dtype=torch.float64, **options):
    network = make_net(net, dtype=dtype)
    data = epochs(1, dtype=dtype)
    return run_engine(network, data, stages=1, k=k, schedule="tight", method=method, keep=keep, **options)


@pytest.mark.parametrize(
    ("k", "dtype"), [(1, torch.float64), (2, torch.float64), (3, torch.float64), (3, torch.float32)], ids=str
)
@pytest.mark.parametrize("net", ["revnet18", "resnet18", "revnet-iso"])
def test_one_stage_equals_plain_autograd(net, k, dtype):
    expected = train_plainly(make_net(net, dtype=dtype), epochs(1, dtype=dtype), k=k)
    for method, keep in METHODS:
        compare(run(method, keep, net=net, k=k, dtype=dtype), expected)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("optimizer", [adamw, adamw_at_rest])
def test_one_stage_equals_plain_autograd_with_adamw(optimizer):
    expected = train_plainly(make_net(), epochs(1), k=2, optimizer=optimizer)
    compare(run("backprop", k=2, optimizer=optimizer), expected)


@pytest.mark.parametrize("method", ["petra", "reversible", "delayed"])
def test_a_stage_of_the_last_unit_alone_keeps_its_graph_whatever_the_method(method):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5))
    network = Network([body]).double()
    network(epochs(1)[0][0][0])
    options = {"stages": 1, "k": 3, "schedule": "tight", "cuts": []}
    actual = run_engine(copy.deepcopy(network), epochs(1), method=method, **options)
    compare(actual, train_plainly(network, epochs(1), k=3))


def test_a_weighted_sum_of_gradients_is_the_gradient_of_the_mean_loss():
    """With k a power of two the usual `(loss / k).backward()` gives the same bits too."""
    network, data = make_net(), [epochs(1)[0][:6]]
    actual = run_engine(network, data, stages=1, k=2, schedule="tight", method="backprop")
    optimizer = sgd(list(network.parameters()))
    for i, (images, labels) in enumerate(data[0]):
        (nn.functional.cross_entropy(network(images), labels) / 2).backward()
        if i % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()
    for name, p in network.named_parameters():
        assert torch.equal(actual.parameters[-1][name], p), name


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("net", ["revnet18", "revnet-iso"])
def test_petra_with_one_stage_equals_reversible(net, k, dtype):
    compare(run("petra", net=net, k=k, dtype=dtype), run("reversible", net=net, k=k, dtype=dtype))


def test_a_partial_group_averaged_over_k_is_detected(monkeypatch):
    monkeypatch.setattr(pipeline, "group_size", lambda *_, accumulation, **__: accumulation)
    with pytest.raises(AssertionError, match="other bits"):
        compare(run("backprop", k=3), train_plainly(make_net(), epochs(1), k=3))


def test_reversible_is_not_backprop_to_the_bit():
    """The comparison sees the last bit: rebuilding the input changes no more than that."""
    with pytest.raises(AssertionError, match="other bits"):
        compare(run("reversible"), train_plainly(make_net(), epochs(1), k=1))
    compare(run("reversible"), train_plainly(make_net(), epochs(1), k=1), tolerance=1e-9)
