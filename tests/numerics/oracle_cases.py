"""Runs that several oracles look at: one epoch at rest (a learning rate of 0), each made once."""

import functools
from collections.abc import Sequence

from oracle_nets import CUTS, OptimizerFactory, Trace, epochs, make_net, run_engine, sgd_at_rest
from oracle_references import lookahead, stages_of_units, train_plainly

EXACT = [("delayed", "graph"), ("delayed", "inputs"), ("delayed", "inputs+parameters")]
REBUILT = [("delayed", "parameters"), ("petra", "")]
"""Methods whose gradients at rest are backprop's, to the bit and to float tolerance (RevNets)."""


def engine_at_rest(
    J: int,
    k: int,
    schedule: str | Sequence[int],
    *,
    method: str,
    keep: str,
    net: str = "revnet18",
    optimizer: OptimizerFactory = sgd_at_rest,
    statistics_in_forward: bool = False,
) -> Trace:
    """Return the run of a method at rest."""
    key = schedule if isinstance(schedule, str) else tuple(schedule)
    return _engine_at_rest(J, k, key, method, keep, net, optimizer, statistics_in_forward)


@functools.cache
def _engine_at_rest(J, k, schedule, method, keep, net, optimizer, statistics_in_forward) -> Trace:
    return run_engine(
        make_net(net),
        epochs(J)[:1],
        J=J,
        k=k,
        schedule=schedule,
        method=method,
        keep=keep,
        optimizer=optimizer,
        statistics_in_forward=statistics_in_forward,
    )


@functools.cache
def plain_at_rest(J: int, k: int, *, net: str = "revnet18") -> Trace:
    """Return plain training at rest on the same microbatches (J only chooses how many)."""
    return train_plainly(make_net(net), epochs(J)[:1], k=k, optimizer=sgd_at_rest)


def geometry(J: int, schedule: str | Sequence[int]) -> dict:
    """Return what the references ask for about the stages of a net of 10 units."""
    return {"stage_of": stages_of_units(CUTS[J], num_units=10), "W": lookahead(schedule, J=J)}
