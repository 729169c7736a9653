"""Evaluation: every sample once, with running statistics, leaving the net as it was."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from petractl.data.normalisation import Normalisation
from petractl.data.preparation import normalise
from petractl.engine.evaluation import PipelinedEvaluation, Placement, evaluate
from petractl.engine.world import Alone
from petractl.errors import Stopped
from petractl.models.units import Network

CPU = Placement(torch.device("cpu"), torch.contiguous_format)


@dataclass
class Batch:
    images: Tensor
    labels: Tensor
    normalisation: Normalisation | None = None


def make_network() -> Network:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 7)]
    network = Network([nn.Sequential(*layers[:3]), nn.Sequential(*layers[3:])])
    network(torch.randn(16, 3, 8, 8))
    return network


def batches(*sizes: int, classes: int = 7) -> list[Batch]:
    g = torch.Generator().manual_seed(1)
    return [
        Batch(torch.randn(n, 3, 8, 8, generator=g), torch.randint(0, classes, (n,), generator=g))
        for n in sizes
    ]


def test_scores_are_means_over_all_samples():
    network, data = make_network(), batches(5, 5, 3)
    scores = evaluate(network, data, placement=CPU)
    images, labels = torch.cat([b.images for b in data]), torch.cat([b.labels for b in data])
    logits = network.eval()(images).detach()
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert scores.samples == 13
    assert scores.loss == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert scores.top1 == pytest.approx(100 * (ranks == 0).double().mean().item())
    assert scores.top5 == pytest.approx(100 * (ranks < 5).double().mean().item())


class Rows(nn.Module):
    """A net that takes no batch of none: its second length would be ambiguous."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(192, 7)

    def forward(self, images):
        return self.layer(images.reshape(images.shape[0], -1))


def test_a_batch_of_none_counts_for_nothing():
    torch.manual_seed(0)
    network = Network([Rows()])
    some = evaluate(network, batches(5, 3), placement=CPU)
    first, second = batches(5, 3)
    assert evaluate(network, [first, *batches(0), second], placement=CPU) == some
    nothing = evaluate(network, batches(0, 0), placement=CPU)
    assert nothing.samples == 0
    assert math.isnan(nothing.loss)
    assert math.isnan(nothing.top1)


def test_among_stages_a_batch_of_none_keeps_its_place():
    torch.manual_seed(0)
    stages = [((None, None), [Rows()])]
    data = [*batches(5), *batches(0), *batches(3)]
    among = PipelinedEvaluation(stages, world=Alone(), batches=data, num_batches=3, placement=CPU)
    assert among() == evaluate(Network([stages[0][1][0]]), data, placement=CPU)


@pytest.mark.parametrize("asked", [1, 2, 3])
def test_one_that_is_told_to_stop_stops(asked):
    """Among stages the batch that is entering goes through to the end; none after the last one stops."""
    torch.manual_seed(0)
    layer, data = Rows(), batches(5, 2, 3)
    answers = iter([False] * (asked - 1) + [True] + [False] * 3)
    with pytest.raises(Stopped):
        evaluate(Network([layer]), data, lambda: next(answers), placement=CPU)
    answers = iter([False] * (asked - 1) + [True] + [False] * 3)
    among = PipelinedEvaluation(
        [((None, None), [layer])], world=Alone(), batches=data, num_batches=3, placement=CPU
    )
    if asked == 3:
        assert among(lambda: next(answers)).samples == 10
        return
    with pytest.raises(Stopped):
        among(lambda: next(answers))
    assert len(list(answers)) == 3, "nobody asks after the stop"


class OtherReplica(Alone):
    """Of two replicas the first one, or the second; the other one is through, or has stopped."""

    def __init__(self, *, is_first, other_stopped):
        self._is_first, self._other_stopped = is_first, other_stopped

    def gather(self, value):
        return [value, (self._other_stopped, (0.0, 0, 0, 0))] if self._is_first else []

    def share(self, value):
        return value if self._is_first else self._other_stopped


@pytest.mark.parametrize("is_first", [True, False])
def test_a_replica_stops_with_the_other(is_first):
    def run(*, other_stopped):
        world = OtherReplica(is_first=is_first, other_stopped=other_stopped)
        stages = [((None, None), [Rows()])]
        return PipelinedEvaluation(stages, world=world, batches=batches(5), num_batches=1, placement=CPU)()

    with pytest.raises(Stopped):
        run(other_stopped=True)
    if is_first:
        assert run(other_stopped=False).samples == 5


def test_fewer_than_five_classes():
    network = Network([nn.Sequential(nn.Flatten(), nn.Linear(192, 3))])
    assert evaluate(network, batches(4, classes=3), placement=CPU).top5 == 100.0


def test_the_net_is_left_as_it_was():
    network = make_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    evaluate(network, batches(4), placement=CPU)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network.eval()
    evaluate(network, batches(4), placement=CPU)
    assert not network.training


def test_a_part_in_evaluation_mode_stays_so():
    """A model of the user's may freeze a batch norm by putting it in evaluation mode."""
    network = make_network()
    frozen = network.units[0][1].eval()
    evaluate(network, batches(4), placement=CPU)
    assert not frozen.training
    assert network.units[0].training


def test_lower_precision_gives_scores_in_full():
    placement = Placement(torch.device("cpu"), torch.channels_last, torch.bfloat16)
    low = evaluate(make_network(), batches(64), placement=placement)
    full = evaluate(make_network(), batches(64), placement=CPU)
    assert low.loss == pytest.approx(full.loss, rel=0.05)
    assert low.loss != full.loss


def test_bytes_are_normalised_where_the_net_is():
    how = Normalisation((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    placement = Placement(torch.device("cpu"), torch.channels_last)
    placed = placement.images(Batch(images, torch.zeros(5), how))
    assert placed.is_contiguous(memory_format=torch.channels_last)
    expected = normalise(images.numpy(), mean=how.mean, std=how.std)
    assert torch.equal(placed, torch.from_numpy(expected)), "the bits of the loader in memory"
