"""The table of methods."""

import itertools

import pytest

from petractl.methods.family import METHODS, Keep, Keeping, keepings, method_names, method_spec

INPUT, NOTHING, GRAPH = Keeping(Keep.INPUT), Keeping(Keep.NOTHING), Keeping(Keep.GRAPH)
STASHED_INPUT = Keeping(Keep.INPUT, parameters=True)
STASHED_NOTHING = Keeping(Keep.NOTHING, parameters=True)
OWN_GRAPH = Keeping(Keep.GRAPH)
STASHED_GRAPH = Keeping(Keep.GRAPH, parameters=True)


@pytest.mark.parametrize(
    ("name", "keep", "locked", "plain", "reversible", "needs_reversible"),
    [
        ("petra", "", False, INPUT, NOTHING, False),
        ("delayed", "graph", False, STASHED_GRAPH, STASHED_GRAPH, False),
        ("delayed", "inputs+parameters", False, STASHED_INPUT, STASHED_INPUT, False),
        ("delayed", "inputs", False, INPUT, INPUT, False),
        ("delayed", "parameters", False, STASHED_INPUT, STASHED_NOTHING, True),
        ("reversible", "", True, INPUT, NOTHING, True),
        ("backprop", "", True, STASHED_GRAPH, STASHED_GRAPH, False),
        ("local", "", False, OWN_GRAPH, OWN_GRAPH, False),
        ("forward-gradient", "", False, STASHED_GRAPH, STASHED_GRAPH, False),
    ],
)
def test_every_row(name, keep, locked, plain, reversible, needs_reversible):
    spec = method_spec(name, keep=keep)
    assert (spec.name, spec.keep) == (name, keep)
    assert (spec.locked, spec.plain, spec.reversible) == (locked, plain, reversible)
    assert spec.needs_reversible == needs_reversible
    assert spec.summary


def test_there_are_no_other_rows():
    assert len(METHODS) == len({(spec.name, spec.keep) for spec in METHODS}) == 9
    assert method_names() == ("petra", "delayed", "reversible", "backprop", "local", "forward-gradient")


def test_methods_that_train_block_by_block_run_in_sequence_unless_told_otherwise():
    schedules = {spec.name: (spec.blocks, spec.default_schedule) for spec in METHODS}
    assert schedules == {
        "petra": (False, "tight"),
        "delayed": (False, "tight"),
        "reversible": (False, "sequential"),
        "backprop": (False, "sequential"),
        "local": (True, "sequential"),
        "forward-gradient": (True, "sequential"),
    }


def test_delayed_keeps_the_graph_by_default():
    assert method_spec("delayed").keep == "graph"


def test_unknown_rows():
    with pytest.raises(
        ValueError, match=r'unknown method "petre" .known: petra, delayed, reversible, backprop'
    ):
        method_spec("petre")
    with pytest.raises(
        ValueError, match=r'unknown keep "input" .known: graph, inputs\+parameters, inputs, par'
    ):
        method_spec("delayed", keep="input")


@pytest.mark.parametrize("spec", METHODS, ids=lambda s: f"{s.name} {s.keep}".strip())
def test_the_last_unit_keeps_its_graph_whatever_the_method(spec):
    for flags in itertools.chain.from_iterable(
        itertools.product([False, True], repeat=n) for n in range(1, 5)
    ):
        kept = keepings(spec, flags)
        assert kept[-1] == GRAPH
        wanted = [spec.reversible if flag else spec.plain for flag in flags[:-1]]
        assert list(kept[:-1]) == wanted
