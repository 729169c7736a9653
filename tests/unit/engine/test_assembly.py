"""From units and cuts to stages: who holds what, under which name."""

import pytest
from small_nets import make_stages, make_units, sgd_updater
from torch import nn

from petractl.engine.assembly import stage_bounds
from petractl.methods.keeping import GraphKeeper, InputKeeper, Reconstructor
from petractl.models.units import Network


@pytest.mark.parametrize(
    ("cuts", "bounds"), [([], [(0, 7)]), ([3], [(0, 3), (3, 7)]), ([1, 6], [(0, 1), (1, 6), (6, 7)])]
)
def test_bounds(cuts, bounds):
    assert stage_bounds(cuts, num_units=7) == bounds


def test_every_unit_is_in_one_stage_in_order():
    units = make_units()
    stages = make_stages(units, "petra", cuts=[1, 3, 5])
    assert [stage.index for stage in stages] == [0, 1, 2, 3]
    assert [k.evaluator.unit for stage in stages for k in stage.keepers] == units
    assert [k.evaluator.index for stage in stages for k in stage.keepers] == list(range(7))


def test_parameters_are_named_by_unit_whatever_the_partition():
    for cuts in ([], [2], [1, 2, 3, 4, 5, 6]):
        units, given = make_units(), []

        def make_updater(named, given=given):
            given.append(named)
            return sgd_updater(named)

        make_stages(units, "petra", cuts=cuts, make_updater=make_updater)
        assert len(given) == len(cuts) + 1
        expected = dict(Network(units).named_parameters())
        flat = dict(pair for named in given for pair in named)
        assert flat.keys() == expected.keys()
        assert all(flat[name] is p for name, p in expected.items())


def test_frozen_parameters_have_no_updater():
    units, given = make_units(), []
    units[0].requires_grad_(False)

    def make_updater(named):
        given.append([name for name, _ in named])
        return sgd_updater(named)

    make_stages(units, "petra", cuts=[1], make_updater=make_updater)
    assert given[0] == []
    assert len(given[1]) == sum(len(list(unit.parameters())) for unit in units[1:])


def test_the_loss_is_the_last_stages():
    stages = make_stages(make_units(), "petra")
    assert [stage.loss is not None for stage in stages] == [False, False, False, True]


@pytest.mark.parametrize(
    ("method", "keep", "plain", "coupling", "stashes"),
    [
        ("petra", "", InputKeeper, Reconstructor, False),
        ("reversible", "", InputKeeper, Reconstructor, False),
        ("backprop", "", GraphKeeper, GraphKeeper, True),
        ("delayed", "graph", GraphKeeper, GraphKeeper, True),
        ("delayed", "inputs", InputKeeper, InputKeeper, False),
        ("delayed", "inputs+parameters", InputKeeper, InputKeeper, True),
        ("delayed", "parameters", InputKeeper, Reconstructor, True),
    ],
)
def test_keepers_of_a_method(method, keep, plain, coupling, stashes):
    (stage,) = make_stages(make_units(), method, keep, cuts=[])
    kinds = [plain, coupling, coupling, plain, coupling, coupling, GraphKeeper]
    assert [type(keeper) for keeper in stage.keepers] == kinds
    assert stage.stashes == [stashes] * 6 + [False]


def test_a_net_of_one_unit():
    (stage,) = make_stages([nn.Linear(6, 3)], "petra", cuts=[])
    assert isinstance(stage.keepers[0], GraphKeeper)
    assert not stage.sends_streams
