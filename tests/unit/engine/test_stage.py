"""A stage: what it keeps, how often parameters exist, what it sends, and how it averages."""

import copy
import gc
import weakref

import pytest
import torch
from small_nets import (
    ALL_METHODS,
    CUTS,
    SIZE,
    WIDTH,
    Head,
    Split,
    make_pipeline,
    make_stages,
    make_units,
    microbatches,
    sgd_updater,
    storages,
    tensors,
    train,
)
from torch import nn
from torch.nn import functional

from petractl.engine.messages import Activation, Gradient
from petractl.engine.schedule import lookaheads
from petractl.engine.stage import Stage
from petractl.engine.update import Updater
from petractl.errors import UserError
from petractl.methods.evaluation import Linearization
from petractl.models.units import Coupling, Network
from petractl.optim import clip_norm_

STASHING = [("delayed", "graph"), ("delayed", "inputs+parameters"), ("delayed", "parameters")]
ONE_VERSION = [("petra", ""), ("delayed", "inputs"), ("reversible", ""), ("backprop", "")]


def streams(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, xt = (torch.randn(SIZE, WIDTH, generator=g, dtype=torch.float64) for _ in range(2))
    return x, xt


def middle_stage(method: str, keep: str = "") -> Stage:
    """Return a stage of a coupling, a unit that is not reversible, and a coupling; below it a coupling."""
    return make_stages(make_units(), method, keep, cuts=[2, 5])[1]


def forward(stage: Stage, i: int) -> Activation:
    return stage.forward(Activation(i, streams(i), torch.arange(SIZE) % 3))


def backward(stage: Stage, message: Activation, *, group_size: int = 1, gradients_seed: int = 9) -> Gradient:
    below = Gradient(message.microbatch, message.streams, streams(gradients_seed))
    return stage.backward(below, group_size=group_size)


class TestWhatIsKept:
    def test_petra_keeps_inputs_of_units_that_are_not_reversible_and_nothing_else(self):
        stage = middle_stage("petra")
        forward(stage, 0)
        flight = stage._in_flight[0]
        coupling, mix, last = flight.kept
        assert coupling is None
        assert last is None
        assert [x.shape for x in mix] == [(SIZE, WIDTH)] * 2
        assert flight.parameters == [None, None, None]

    def test_petra_of_reversible_units_alone_holds_no_tensor(self):
        stage = make_stages(make_units(), "petra", cuts=[1, 3])[1]
        gc.collect()
        before = {id(o) for o in gc.get_objects() if type(o) is torch.Tensor}
        forward(stage, 0)
        gc.collect()
        after = [o for o in gc.get_objects() if type(o) is torch.Tensor and id(o) not in before]
        assert after == []
        assert stage.microbatches_in_flight() == 1

    @pytest.mark.parametrize(
        ("keep", "kinds"),
        [
            ("graph", [Linearization] * 3),
            ("inputs", [tuple] * 3),
            ("inputs+parameters", [tuple] * 3),
            ("parameters", [type(None), tuple, type(None)]),
        ],
    )
    def test_delayed(self, keep, kinds):
        stage = middle_stage("delayed", keep)
        forward(stage, 0)
        flight = stage._in_flight[0]
        assert [type(item) for item in flight.kept] == kinds
        assert [used is not None for used in flight.parameters] == [keep != "inputs"] * 3

    def test_an_input_is_kept_not_copied(self):
        stage = middle_stage("delayed", "inputs")
        message = Activation(0, streams(0), torch.zeros(SIZE))
        stage.forward(message)
        assert stage._in_flight[0].kept[0] is message.streams

    @pytest.mark.parametrize(("method", "keep"), ALL_METHODS)
    def test_nothing_is_kept_after_the_backward(self, method, keep):
        stage = middle_stage(method, keep)
        x = streams(0)
        kept = [weakref.ref(x[0])]
        message = stage.forward(Activation(0, x, torch.zeros(SIZE)))
        kept += [
            weakref.ref(y)
            for item in stage._in_flight[0].kept
            if isinstance(item, Linearization)
            for y in item.outputs
        ]
        backward(stage, message)
        del x, message
        gc.collect()
        assert stage._in_flight == {}
        assert [ref() for ref in kept] == [None] * len(kept)

    @pytest.mark.parametrize(("method", "keep"), ALL_METHODS)
    def test_nothing_is_kept_after_the_drain(self, method, keep):
        stages = train(make_units(), method, keep, count=6, k=4)
        assert all(stage._in_flight == {} and stage._versions._now is None for stage in stages)


class TestVersions:
    @pytest.mark.parametrize(("method", "keep"), ONE_VERSION)
    def test_parameters_exist_once(self, method, keep):
        """Where no forward's parameters are needed later, updates change the parameters in their place."""
        units = make_units()
        parameters = [p for unit in units for p in unit.parameters()]
        before = list(storages(parameters))
        stages = make_stages(units, method, keep)
        pipeline = make_pipeline(
            stages, schedule="sequential" if method in ("backprop", "reversible") else "paper"
        )
        pipeline.train(iter(microbatches(8)), num_microbatches=8)
        assert list(storages(parameters)) == before

    @pytest.mark.parametrize("k", [1, 2, 3])
    @pytest.mark.parametrize(("method", "keep"), STASHING)
    def test_there_are_as_many_copies_as_versions_in_flight(self, method, keep, k):
        stages = make_stages(make_units(), method, keep)
        pipeline = make_pipeline(stages, k=k, schedule="paper")
        most = [0] * 4

        def count(_: int) -> None:
            for j, stage in enumerate(stages[:-1]):
                flights = stage._in_flight.values()
                for n, keeper in enumerate(stage.keepers):
                    current = list(storages(keeper.evaluator.parameters))
                    held = {tuple(storages(flight.parameters[n])) for flight in flights}
                    versions = {flight.updates_at_forward for flight in flights} | {stage.counters.updates}
                    assert len(held | {tuple(current)}) == len(versions)
                    most[j] = max(most[j], len(versions))

        pipeline.train(iter(microbatches(14)), num_microbatches=14, on_microbatch=count)
        for j, w in enumerate(lookaheads("paper", num_stages=4)[:-1]):
            assert w // k <= most[j] <= -(-w // k) + 1

    @pytest.mark.parametrize(("method", "keep"), STASHING)
    def test_a_version_keeps_its_values_through_updates(self, method, keep):
        stage = middle_stage(method, keep)
        message = forward(stage, 0)
        used = [p.clone() for unit in stage._in_flight[0].parameters for p in unit]
        for i in range(1, 4):
            backward(stage, forward(stage, i))
            stage.update(partial=False)
        again = [p for unit in stage._in_flight[0].parameters for p in unit]
        current = [p for keeper in stage.keepers for p in keeper.evaluator.parameters]
        assert all(torch.equal(a, b) for a, b in zip(used, again, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(used, current, strict=True) if a.norm() > 0)
        backward(stage, message)

    def test_no_copy_where_nobody_needs_the_old_values(self):
        stage = middle_stage("delayed", "inputs+parameters")
        parameters = [p for keeper in stage.keepers for p in keeper.evaluator.parameters]
        before = list(storages(parameters))
        for i in range(3):
            backward(stage, forward(stage, i))
            stage.update(partial=False)
        assert list(storages(parameters)) == before

    def test_the_parameters_stay_the_same_objects(self):
        """Optimisers and networks hold them."""
        units = make_units()
        before = list(Network(units).parameters())
        train(units, "delayed", "graph", count=6)
        after = list(Network(units).parameters())
        assert all(a is b and type(a) is nn.Parameter for a, b in zip(before, after, strict=True))


class TestMessages:
    @pytest.mark.parametrize(("method", "keep"), ALL_METHODS)
    def test_streams_go_down_only_to_units_that_rebuild_their_input(self, method, keep):
        units = make_units()
        stages = make_stages(units, method, keep, cuts=[1, 2, 3, 4, 5, 6])
        rebuilds = (method, keep) in [("petra", ""), ("reversible", ""), ("delayed", "parameters")]
        sends = [stage.sends_streams for stage in stages]
        reversible = [isinstance(unit, Coupling) for unit in units]
        assert sends == [False] + [rebuilds and flag for flag in reversible[:-1]]

    def test_the_streams_sent_down_are_the_stages_input(self):
        stage = middle_stage("petra")
        message = backward(stage, forward(stage, 0))
        assert message.microbatch == 0
        for ours, x in zip(message.streams, streams(0), strict=True):
            torch.testing.assert_close(ours, x, rtol=0, atol=1e-14)

    def test_labels_travel_up(self):
        labels = torch.tensor([2, 0, 1, 1, 0])
        stage = middle_stage("petra")
        assert stage.forward(Activation(3, streams(0), labels)).labels is labels

    def test_what_is_sent_has_no_graph(self):
        for method, keep in ALL_METHODS:
            stage = middle_stage(method, keep)
            message = forward(stage, 0)
            assert not any(y.requires_grad for y in message.streams)
            down = backward(stage, message)
            assert not any(g.requires_grad for g in down.gradients)
            assert not any(x.requires_grad for x in down.streams or ())

    @pytest.mark.parametrize(("method", "keep"), ALL_METHODS)
    def test_microbatches_are_told_apart(self, method, keep):
        """A backward finds what its own forward left, whatever the order."""

        def run(order):
            stage = middle_stage(method, keep)
            messages = [forward(stage, i) for i in range(3)]
            return {i: backward(stage, messages[i], gradients_seed=i).gradients for i in order}

        ours, theirs = run((0, 1, 2)), run((2, 0, 1))
        assert all(torch.equal(a, b) for i in ours for a, b in zip(ours[i], theirs[i], strict=True))


class TestGradients:
    @pytest.mark.parametrize("group", [1, 2, 3])
    def test_the_average_is_over_the_group(self, group):
        stage = middle_stage("delayed", "inputs")
        parameters = [p for keeper in stage.keepers for p in keeper.evaluator.parameters]
        single = []
        for i in range(group):
            backward(stage, forward(stage, i), gradients_seed=20 + i)
            single.append([p.grad for p in parameters])
            for p in parameters:
                p.grad = None
        for i in range(group):
            backward(stage, forward(stage, i), gradients_seed=20 + i, group_size=group)
        for n, p in enumerate(parameters):
            torch.testing.assert_close(p.grad, torch.stack([g[n] for g in single]).mean(0))

    def test_an_update_empties_the_gradients(self):
        stage = middle_stage("petra")
        backward(stage, forward(stage, 0))
        stage.update(partial=True)
        assert all(p.grad is None for keeper in stage.keepers for p in keeper.evaluator.parameters)
        assert stage.counters.updates == stage.counters.partial_groups == 1

    def test_gradients_lie_in_memory_like_their_parameters(self):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        stages = make_stages([conv, head], "petra", cuts=[1])
        for weight in (1, 2):
            x = torch.randn(2, 3, 8, 8)
            message = stages[0].forward(Activation(0, (x,), torch.tensor([0, 1])))
            stages[0].backward(stages[1].forward_backward(message, group_size=weight), group_size=weight)
            assert conv.weight.grad.stride() == conv.weight.stride()
            conv.weight.grad = None

    def test_only_the_last_stage_has_a_loss(self):
        stage = middle_stage("petra")
        with pytest.raises(AssertionError, match="only the last stage has a loss"):
            stage.forward_backward(Activation(0, streams(0), torch.zeros(SIZE)), group_size=1)

    def test_totals_are_sums_over_samples(self):
        units, data = make_units(), microbatches(3)
        stages = make_stages(units, "backprop", make_updater=lambda n: sgd_updater(n, lr=0.0))
        make_pipeline(stages, schedule="sequential").train(iter(data), num_microbatches=3)
        logits = [Network(make_units())(x) for x, _ in data]
        losses = [
            functional.cross_entropy(z, y, reduction="sum") for z, (_, y) in zip(logits, data, strict=True)
        ]
        correct = [(z.argmax(1) == y).sum() for z, (_, y) in zip(logits, data, strict=True)]
        totals = stages[-1].totals
        assert totals.samples == 15
        assert float(totals.loss) == pytest.approx(sum(loss.item() for loss in losses))
        assert int(totals.correct) == int(sum(correct))

    def test_a_sum_of_parameters_is_clipped_once(self):
        """W = A + B gives both the same gradient tensor; what scales it in place must not do so twice."""
        torch.manual_seed(0)
        units = [Sum(), nn.Linear(6, 3).double()]
        x, y = microbatches(1)[0]
        network = Network(copy.deepcopy(units))
        functional.cross_entropy(network(x), y).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.01)
        (stage,) = make_stages(units, "backprop", cuts=[], make_updater=ClippingUpdater)
        stage.forward_backward(Activation(0, (x,), y), group_size=1)
        stage.update(partial=False)
        for (name, p), g in zip(network.named_parameters(), stage.updater.gradients, strict=True):
            torch.testing.assert_close(g, p.grad, msg=name)

    def test_an_update_leaves_the_message_below_alone(self):
        """x + p gives p the very tensor that goes down as the gradient of x: clipping must not reach it."""
        stages = make_stages(
            [nn.Linear(6, 4).double(), Shift(), nn.Linear(4, 3).double()],
            "backprop",
            cuts=[1],
            make_updater=ClippingUpdater,
        )
        x, y = microbatches(1)[0]
        down = stages[1].forward_backward(stages[0].forward(Activation(0, (x,), y)), group_size=1)
        before = down.gradients[0].clone()
        stages[1].update(partial=False)
        assert torch.equal(down.gradients[0], before)


class Sum(nn.Module):
    """A layer whose weight is the sum of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(6, 6, dtype=torch.float64)) for _ in range(2))

    def forward(self, x):
        return x @ (self.a + self.b)


class Shift(nn.Module):
    """Adds a parameter of the activations' own shape."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(SIZE, 4, dtype=torch.float64))

    def forward(self, x):
        return x + self.shift


class ClippingUpdater(Updater):
    """Clips to a small norm and writes down the gradients."""

    def __init__(self, named):
        optimizer = torch.optim.SGD([p for _, p in named], lr=0.0)
        super().__init__(optimizer, learning_rate=lambda _: 0.0, clip=self.clip)

    def clip(self, gradients):
        norm = clip_norm_(gradients, 0.01)
        self.gradients = [g.clone() for g in gradients]
        return norm


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.two.weight = self.one.weight

    def forward(self, x):
        return torch.tanh(self.two(torch.tanh(self.one(x))))


class Swap(nn.Module):
    """No parameters."""

    def forward(self, x, xt):
        return xt, torch.tanh(x)


def plain_training(units, *, count: int = 5, k: int = 1):
    network = Network(units)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for i, (x, y) in enumerate(microbatches(count)):
        (functional.cross_entropy(network(x), y) / k).backward()
        if (i + 1) % k == 0:
            optimizer.step()
            optimizer.zero_grad()


def assert_like_plain_training(build, method: str, *, cuts, exact: bool) -> None:
    ours, theirs = build(), build()
    before = tensors(theirs)
    train(ours, method, cuts=cuts)
    plain_training(theirs)
    expected = tensors(theirs)
    assert any(not torch.equal(before[name], expected[name]) for name in expected)
    for name, value in tensors(ours).items():
        if exact:
            assert torch.equal(value, expected[name]), name
        else:
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)


class TestOddUnits:
    @pytest.mark.parametrize("method", ["backprop", "reversible"])
    def test_parameters_shared_inside_a_unit(self, method):
        assert_like_plain_training(lambda: make_units(Tied), method, cuts=CUTS, exact=method == "backprop")

    @pytest.mark.parametrize(("method", "keep"), STASHING)
    def test_shared_parameters_are_stashed_together(self, method, keep):
        units = make_units(Tied)
        train(units, method, keep, count=8)
        assert units[1].f.one.weight is units[1].f.two.weight

    @pytest.mark.parametrize("method", ["backprop", "reversible"])
    def test_a_stage_without_parameters(self, method):
        def build():
            units = make_units()
            units[3] = Swap()
            return units

        assert_like_plain_training(build, method, cuts=[1, 3, 4], exact=method == "backprop")

    @pytest.mark.parametrize(("method", "keep"), ALL_METHODS)
    def test_a_stage_without_parameters_in_any_method(self, method, keep):
        units = make_units()
        units[3] = Swap()
        stages = train(units, method, keep, count=6, cuts=[1, 3, 4])
        assert stages[2].counters.updates == 6

    @pytest.mark.parametrize("method", ["backprop", "reversible"])
    def test_frozen_parameters(self, method):
        def build():
            units = make_units()
            units[0].requires_grad_(False)
            units[1].requires_grad_(False)
            units[3].first.requires_grad_(False)
            units[4].f[0].requires_grad_(False)
            return units

        assert_like_plain_training(build, method, cuts=CUTS, exact=method == "backprop")

    @pytest.mark.parametrize(("method", "keep"), ALL_METHODS)
    def test_frozen_parameters_stay_in_any_method(self, method, keep):
        units = make_units()
        frozen = [*units[0].parameters(), *units[2].parameters(), units[3].first.weight]
        for p in frozen:
            p.requires_grad_(False)
        before = [p.clone() for p in frozen]
        train(units, method, keep, count=8)
        assert all(torch.equal(p, b) and p.grad is None for p, b in zip(frozen, before, strict=True))

    @pytest.mark.parametrize(("method", "keep"), ALL_METHODS)
    def test_a_module_that_keeps_references_to_its_parameters(self, method, keep):
        """A recurrent layer lists its weights for cuDNN; stashed ones must take their places there too."""
        units = make_units(Recurrent)
        before = tensors(units)
        train(units, method, keep, count=6)
        after = tensors(units)
        assert not any(torch.equal(before[name], after[name]) for name in before)

    @pytest.mark.parametrize(
        ("method", "keep"),
        ALL_METHODS,
    )
    def test_a_unit_that_changes_its_input_is_refused(self, method, keep):
        """Fails where the graph is kept: the input is a leaf there, and torch's own error names no unit."""
        units = make_units(lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)))
        with pytest.raises(UserError) as caught:
            train(units, method, keep)
        assert caught.value.where == "unit 1 (Coupling)"
        assert "in place" in caught.value.what
        assert "inplace=False" in caught.value.hint

    @pytest.mark.parametrize(("method", "keep"), ALL_METHODS)
    def test_a_first_unit_that_changes_the_images_is_refused(self, method, keep):
        units = make_units()
        units[0] = nn.Sequential(nn.ReLU(inplace=True), Split()).double()
        with pytest.raises(UserError, match=r"unit 0 \(Sequential\)"):
            train(units, method, keep)

    def test_a_last_unit_that_changes_its_input_is_refused(self):
        units = [*make_units()[:-1], InPlaceHead().double()]
        with pytest.raises(UserError, match=r"unit 6 \(InPlaceHead\)"):
            train(units, "petra")

    @pytest.mark.parametrize(("method", "keep"), [("petra", ""), ("delayed", "graph"), ("backprop", "")])
    def test_a_stream_of_integers_passes_through(self, method, keep):
        """A mask or an index beside the activations has no gradient."""
        torch.manual_seed(0)
        units = [WithMask().double(), UseMask().double(), UseMask().double(), DropMask().double()]
        train(units, method, keep, cuts=[1, 2])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(2, 2, batch_first=True)

    def forward(self, x):
        return self.gru(x.view(-1, 2, 2))[0].reshape(-1, WIDTH)


class InPlaceHead(Head):
    def forward(self, x, xt):
        return super().forward(x.relu_(), xt)


class WithMask(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 4)

    def forward(self, x):
        return super().forward(x), (x[:, :4] > 0).long()


class UseMask(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x, mask):
        return super().forward(x) * mask, mask


class DropMask(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, x, mask):
        return super().forward(x)
