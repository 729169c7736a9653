"""Oracle 4: delayed with stashed parameters is the gradient at each stage's own stale parameters.

Stage j's gradient of microbatch i is the whole net's at (theta_j after floor(max(0, i - W_j) / k) updates)_j:
to the bit where graph or inputs are kept, to float tolerance where reversible units rebuild their input.
"""

import pytest
from oracle_cases import geometry
from oracle_nets import case_id, cases, compare, epochs, make_net, run_engine
from oracle_references import train_at_stale_parameters

from petractl.engine.versions import Versions

TOLERANCE = 1e-11


@pytest.mark.parametrize(("stages", "k", "schedule"), cases(), ids=case_id)
def test_stashed_parameters_give_the_stale_gradient(stages, k, schedule):
    expected = train_at_stale_parameters(make_net(), epochs(stages), k=k, **geometry(stages, schedule))
    options = {"stages": stages, "k": k, "schedule": schedule, "method": "delayed"}
    compare(run_engine(make_net(), epochs(stages), keep="graph", **options), expected)
    compare(run_engine(make_net(), epochs(stages), keep="inputs+parameters", **options), expected)
    compare(
        run_engine(make_net(), epochs(stages), keep="parameters", **options), expected, tolerance=TOLERANCE
    )


@pytest.mark.parametrize(("stages", "k", "schedule"), cases([3], [1, 2]), ids=case_id)
@pytest.mark.parametrize("net", ["resnet18", "revnet-iso"])
def test_other_nets(net, stages, k, schedule):
    expected = train_at_stale_parameters(make_net(net), epochs(stages), k=k, **geometry(stages, schedule))
    options = {"stages": stages, "k": k, "schedule": schedule, "method": "delayed"}
    compare(run_engine(make_net(net), epochs(stages), keep="graph", **options), expected)
    compare(run_engine(make_net(net), epochs(stages), keep="inputs+parameters", **options), expected)
    if net == "revnet-iso":
        actual = run_engine(make_net(net), epochs(stages), keep="parameters", **options)
        compare(actual, expected, tolerance=TOLERANCE)


def test_the_staleness_matters():
    """The same run with every gradient at the current parameters is another one: the test is not vacuous."""
    wrong = train_at_stale_parameters(make_net(), epochs(3), k=2, **geometry(3, "sequential"))
    actual = run_engine(
        make_net(), epochs(3), stages=3, k=2, schedule="tight", method="delayed", keep="parameters"
    )
    with pytest.raises(AssertionError, match="relative error"):
        compare(actual, wrong, tolerance=TOLERANCE)


@pytest.mark.parametrize("keep", ["graph", "inputs+parameters", "parameters"])
def test_an_unprotected_stash_is_detected(keep, monkeypatch):
    """Versions that share the parameters' memory change with the next update."""

    def unprotected(self, in_use):
        self._now = None

    monkeypatch.setattr(Versions, "protect", unprotected)
    expected = train_at_stale_parameters(make_net(), epochs(3), k=1, **geometry(3, "tight"))
    actual = run_engine(make_net(), epochs(3), stages=3, k=1, schedule="tight", method="delayed", keep=keep)
    with pytest.raises(AssertionError, match="relative error"):
        compare(actual, expected, tolerance=TOLERANCE)


def test_a_schedule_off_by_one_is_detected():
    expected = train_at_stale_parameters(make_net(), epochs(3), k=1, **geometry(3, [2, 1, 0]))
    actual = run_engine(
        make_net(), epochs(3), stages=3, k=1, schedule=[3, 1, 0], method="delayed", keep="graph"
    )
    with pytest.raises(AssertionError, match="relative error"):
        compare(actual, expected, tolerance=TOLERANCE)
