"""What is not finite is named where it first was, and stops the run or costs one update."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from small_nets import make_pipeline, make_stages, make_units, microbatches, sgd_updater, tensors
from torch import Tensor, nn

from petractl.engine.sentinel import (
    Kind,
    NonFinite,
    Place,
    Sentinel,
    guard,
    require_finite,
    settle_all,
)
from petractl.engine.stage import Stage
from petractl.errors import PeerLost, RunError
from petractl.methods.family import method_spec

CPU = torch.device("cpu")
COUNT = 7
METHODS = [("petra", ""), ("delayed", "graph"), ("delayed", "inputs"), ("reversible", ""), ("backprop", "")]


class Breaks(nn.Module):
    """Passes on what an inner module gives, but for one element of call `at`: in value or in gradient."""

    def __init__(self, inner: nn.Module, *, at: int, way: str, value: float = math.nan) -> None:
        super().__init__()
        self.inner = inner
        self._at, self._way, self._value = at, way, value

    def forward(self, *inputs: Tensor) -> object:
        outputs = self.inner(*inputs)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        # Every microbatch is told by its first number: units are evaluated more than once.
        if round(float(self.tag), 6) == self._at:
            if self._way == "value":
                hit = torch.zeros_like(first)
                hit[1, 0] = self._value
                first = first + hit
            elif first.requires_grad:
                first.register_hook(self._broken)
        return (first, *outputs[1:]) if isinstance(outputs, tuple) else first

    def _broken(self, gradient: Tensor) -> Tensor:
        hit = torch.zeros_like(gradient)
        hit[1, 0] = self._value
        return gradient + hit


def broken_units(unit: int, *, at: int, way: str, value: float = math.nan) -> list[nn.Module]:
    """Return the small net with f of a coupling, or a plain unit, that breaks at one microbatch."""
    units = make_units()
    if hasattr(units[unit], "f"):
        units[unit].f = Breaks(units[unit].f, at=at, way=way, value=value)
    else:
        units[unit] = Breaks(units[unit], at=at, way=way, value=value)
    return units


def train(
    units: Sequence[nn.Module],
    method: str = "petra",
    keep: str = "",
    *,
    skips: bool = False,
    k: int = 1,
    sentinels: Callable[[list[Stage]], list[Sentinel]] | None = None,
    **options,
) -> list[Stage]:
    """Train one epoch under sentinels; each unit is told the microbatch by its keeper."""
    stages = make_stages(units, method, keep, **options)
    for stage in stages:
        for keeper in stage.keepers:
            tell(keeper)
    if sentinels is None:
        guard(stages, device=CPU, skips=skips)
    else:
        sentinels(stages)
    locked = method_spec(method, keep=keep).locked
    pipeline = make_pipeline(stages, k=k, schedule="sequential" if locked else "tight")
    pipeline.train(iter(microbatches(COUNT)), num_microbatches=COUNT)
    return stages


def tell(keeper) -> None:
    """Have the unit's broken module know the microbatch that it is evaluated for."""
    evaluator = keeper.evaluator
    modules = [module for module in evaluator.unit.modules() if isinstance(module, Breaks)]
    conditions = evaluator._conditions

    def told(microbatch: int, **rest):
        for module in modules:
            module.tag = microbatch
        return conditions(microbatch, **rest)

    evaluator._conditions = told


@pytest.mark.parametrize(("method", "keep"), METHODS)
@pytest.mark.parametrize("unit", [0, 2, 3, 5, 6])
def test_the_first_bad_activation_is_named(method: str, keep: str, unit: int) -> None:
    with pytest.raises(NonFinite) as raised:
        train(broken_units(unit, at=3, way="value"), method, keep)
    place = raised.value.place
    assert (place.unit, place.kind, place.microbatch) == (unit, Kind.ACTIVATION, 3)
    assert place.stage == [0, 1, 1, 2, 2, 3, 3][unit]


@pytest.mark.parametrize(("method", "keep"), METHODS)
@pytest.mark.parametrize("unit", [1, 3, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_bad_gradient_is_named(method: str, keep: str, unit: int, value: float) -> None:
    with pytest.raises(NonFinite) as raised:
        train(broken_units(unit, at=4, way="gradient", value=value), method, keep)
    place = raised.value.place
    assert (place.unit, place.kind, place.microbatch) == (unit, Kind.GRADIENT, 4)


def test_a_loss_that_alone_is_bad_is_named() -> None:
    units = make_units()
    stages = make_stages(units, "petra")
    stages[-1].loss = lambda logits, labels: logits.sum() * math.inf
    guard(stages, device=CPU, skips=False)
    with pytest.raises(NonFinite, match="loss, stage 3, microbatch 0"):
        make_pipeline(stages).train(iter(microbatches(COUNT)), num_microbatches=COUNT)


class Loud(nn.Module):
    """Its parameter's gradient overflows where that of its inputs does not."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.tag = -1
        self.at = at

    def forward(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        factor = math.inf if self.tag == self.at else 1.0
        return x + _Scaled.apply(self.weight, factor), xt


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return weight * 1.0

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient.abs() * ctx.factor, None


def loud_stages(at: int, *, skips: bool) -> list[Stage]:
    units = make_units()
    units[3] = Loud(at)
    stages = make_stages(units, "petra")
    for keeper in stages[2].keepers:
        evaluator = keeper.evaluator
        conditions = evaluator._conditions

        def told(microbatch, *, _conditions=conditions, _unit=evaluator.unit, **rest):
            _unit.tag = microbatch
            return _conditions(microbatch, **rest)

        evaluator._conditions = told
    guard(stages, device=CPU, skips=skips)
    return stages


def test_a_parameter_gradient_that_alone_is_bad_is_named_and_never_saved() -> None:
    stages = loud_stages(2, skips=False)
    with pytest.raises(NonFinite) as raised:
        make_pipeline(stages).train(iter(microbatches(COUNT)), num_microbatches=COUNT)
    assert raised.value.place == Place(2, 3, "Loud", Kind.PARAMETER_GRADIENT, 2)


def test_the_last_update_is_looked_at_when_the_epoch_ends() -> None:
    stages = loud_stages(COUNT - 1, skips=False)
    make_pipeline(stages).train(iter(microbatches(COUNT)), num_microbatches=COUNT)
    with pytest.raises(NonFinite, match="parameter gradient of unit 3"):
        settle_all([stage.sentinel for stage in stages])


def test_a_bad_parameter_gradient_alone_costs_one_stage_one_update() -> None:
    stages = loud_stages(2, skips=True)
    make_pipeline(stages).train(iter(microbatches(COUNT)), num_microbatches=COUNT)
    skipped = [stage.sentinel.take_skipped() for stage in stages]
    assert [each and each.count for each in skipped] == [None, None, 1, None]
    assert skipped[2].first == Place(2, 3, "Loud", Kind.PARAMETER_GRADIENT, 2)


class TestSkip:
    @pytest.mark.parametrize(("method", "keep"), METHODS)
    @pytest.mark.parametrize("way", ["value", "gradient"])
    def test_training_goes_on_with_finite_numbers(self, method: str, keep: str, way: str) -> None:
        units = broken_units(4, at=3, way=way)
        stages = train(units, method, keep, skips=True)
        assert all(bool(torch.isfinite(x).all()) for x in tensors(units).values())
        assert all(stage.counters.updates == COUNT for stage in stages)
        skipped = [stage.sentinel.take_skipped() for stage in stages]
        through = range(4) if way == "value" else range(3)
        assert [j for j, each in enumerate(skipped) if each is not None] == [*through]
        assert all(skipped[j].count == 1 for j in through)
        assert skipped[2].first.unit == 4
        assert skipped[2].first.microbatch == 3
        assert all(stage.sentinel.take_skipped() is None for stage in stages)

    def test_a_whole_group_is_left_out(self) -> None:
        units = broken_units(6, at=2, way="value")
        before = tensors(units)
        stages = train(units, "backprop", skips=True, k=COUNT)
        assert [stage.sentinel.take_skipped().count for stage in stages] == [1] * 4
        after = tensors(units)
        assert all(torch.equal(after[n], before[n]) for n in before if "weight" in n or "bias" in n)

    def test_one_group_is_left_out_and_the_others_are_as_without_it(self) -> None:
        units, other = broken_units(6, at=4, way="value"), broken_units(6, at=99, way="value")
        train(units, "backprop", skips=True, k=2)
        # By hand: the other net makes the same updates but the third.
        stages = make_stages(other, "backprop")
        for stage in stages:
            for keeper in stage.keepers:
                tell(keeper)
            step, skip = stage.updater.step, stage.updater.skip

            def chosen(*, delay, position, _step=step, _skip=skip):
                return _skip(position=position) if position == 2 else _step(delay=delay, position=position)

            stage.updater.step = chosen
        pipeline = make_pipeline(stages, k=2, schedule="sequential")
        pipeline.train(iter(microbatches(COUNT)), num_microbatches=COUNT)
        found, wanted = tensors(units), tensors(other)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    def test_the_loss_of_a_bad_microbatch_is_not_counted(self) -> None:
        stages = train(broken_units(2, at=1, way="value"), skips=True)
        loss, _ = stages[-1].totals.means()
        assert math.isfinite(loss)
        assert stages[-1].totals.samples == 5 * (COUNT - 1)

    def test_all_replicas_leave_out_what_one_has_marked(self) -> None:
        stages = make_stages(make_units(), "petra")
        sentinel, *_ = guard(stages, device=CPU, skips=True)
        gradients = [None, torch.ones(3), torch.ones(2)]
        sentinel.outputs(0, 5, (), (torch.tensor([math.nan]),))
        sentinel.gradients(0, 5, (), (torch.ones(1),), gradients)
        assert gradients[0] is None
        assert bool(gradients[1].isnan().all())
        # The reducer's sum then is not finite anywhere: what decides are the gradients alone.
        for p in stages[0].updater.parameters:
            p.grad = torch.full_like(p, math.nan)
        assert not sentinel.may_update()
        for p in stages[0].updater.parameters:
            p.grad = torch.ones_like(p)
        assert sentinel.may_update()


class TestDeferred:
    """On a GPU flags are read later; here the same on the CPU."""

    @staticmethod
    def sentinels(stages: list[Stage]) -> list[Sentinel]:
        for stage in stages:
            stage.sentinel = Sentinel(stage.index, stage.evaluators, device=CPU, defers=True)
        return [stage.sentinel for stage in stages]

    @pytest.mark.parametrize(("unit", "way"), [(0, "value"), (3, "value"), (6, "value"), (1, "gradient")])
    def test_the_first_place_is_named_a_little_later(self, unit: int, way: str) -> None:
        with pytest.raises(NonFinite) as raised:
            train(broken_units(unit, at=2, way=way), sentinels=self.sentinels)
        place = raised.value.place
        assert (place.unit, place.microbatch) == (unit, 2)
        assert place.kind == (Kind.ACTIVATION if way == "value" else Kind.GRADIENT)

    def test_nothing_is_read_in_between(self, monkeypatch) -> None:
        monkeypatch.setattr(Tensor, "item", _refuse)
        stages = train(make_units(), sentinels=self.sentinels)
        monkeypatch.undo()
        settle_all([stage.sentinel for stage in stages])

    def test_what_was_only_received_waits_for_the_sender(self) -> None:
        stages = make_stages(make_units(), "petra")
        first, second, *_ = self.sentinels(stages)
        bad, good = (torch.tensor([math.nan]),), (torch.ones(1),)
        second.received(3, bad, upwards=True)
        second.outputs(0, 3, bad, (torch.tensor([math.nan]),))
        assert second.may_update()
        first.outputs(0, 3, good, bad)
        with pytest.raises(PeerLost, match="received activation, stage 1, microbatch 3"):
            second.settle()
        with pytest.raises(NonFinite, match="unit 0 "):
            settle_all([second, first])


def test_a_number_too_large_for_the_wire_is_named_as_received() -> None:
    stages = make_stages(make_units(), "petra")
    guard(stages, device=CPU, skips=False)
    streams = (torch.full((2, 4), math.inf, dtype=torch.float64),) * 2
    with pytest.raises(NonFinite, match="received activation, stage 1, microbatch 8"):
        stages[1].sentinel.outputs(0, 8, streams, tuple(x + 1 for x in streams))
    with pytest.raises(NonFinite, match="received gradient, stage 1, microbatch 8"):
        stages[1].sentinel.gradients(1, 8, streams, tuple(x + 1 for x in streams), [])


def test_nothing_changes_where_all_is_well() -> None:
    plain, guarded, skipping = make_units(), make_units(), make_units()
    stages = make_stages(plain, "petra")
    make_pipeline(stages).train(iter(microbatches(COUNT)), num_microbatches=COUNT)
    train(guarded)
    train(skipping, skips=True)
    for name, value in tensors(plain).items():
        assert torch.equal(value, tensors(guarded)[name])
        assert torch.equal(value, tensors(skipping)[name])


def test_what_is_not_finite_is_not_saved() -> None:
    require_finite([("a", torch.ones(2)), ("b", torch.tensor([1]))])
    with pytest.raises(RunError, match=r"units\.0\.weight is no longer finite"):
        require_finite([("a", torch.ones(2)), ("units.0.weight", torch.tensor([math.inf]))])


def test_what_else_is_trained_in_a_stage_is_looked_at() -> None:
    other = nn.Parameter(torch.ones(2))
    sentinel = Sentinel(4, [], device=CPU, others=[other], skips=True)
    other.grad = torch.tensor([1.0, math.inf])
    assert not sentinel.may_update()
    assert sentinel.take_skipped().first == Place(4, None, "", Kind.PARAMETER_GRADIENT, -1)


def test_a_skipped_update_moves_the_rate_and_drops_the_gradients() -> None:
    p = nn.Parameter(torch.ones(2))
    updater = sgd_updater([("p", p)], lr=0.3)
    p.grad = torch.ones(2)
    updater.skip(position=1)
    assert updater.rate == 0.3
    assert p.grad is None
    assert torch.equal(p.detach(), torch.ones(2))


def _refuse(*_: object) -> None:
    raise AssertionError("the device was waited for")
