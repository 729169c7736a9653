"""Runs that several oracles look at: one epoch at rest (a learning rate of 0), each made once."""

import functools
from collections.abc import Sequence

from oracle_nets import CUTS, OptimizerFactory, Trace, make_net, microbatches, run_engine, sgd_at_rest
from oracle_references import lookahead_of, stages_of_units, train_plainly

EXACT = [("delayed", "graph"), ("delayed", "inputs"), ("delayed", "inputs+parameters")]
REBUILT = [("delayed", "parameters"), ("petra", "")]
"""Methods whose gradients at rest are backprop's, to the bit and to float tolerance (RevNets)."""


AT_REST = [microbatches(7)]
"""One epoch; where nothing moves, seven microbatches are enough for any schedule and leave partial groups."""


def engine_at_rest(
    stages: int,
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
    return _engine_at_rest(stages, k, key, method, keep, net, optimizer, statistics_in_forward)


@functools.cache
def _engine_at_rest(stages, k, schedule, method, keep, net, optimizer, statistics_in_forward) -> Trace:
    return run_engine(
        make_net(net),
        AT_REST,
        stages=stages,
        k=k,
        schedule=schedule,
        method=method,
        keep=keep,
        optimizer=optimizer,
        statistics_in_forward=statistics_in_forward,
    )


@functools.cache
def plain_at_rest(k: int, *, net: str = "revnet18") -> Trace:
    """Return plain training at rest on the same microbatches."""
    return train_plainly(make_net(net), AT_REST, k=k, optimizer=sgd_at_rest)


def geometry(stages: int, schedule: str | Sequence[int]) -> dict:
    """Return what the references ask for about the stages of a net of 10 units."""
    return {
        "stage_of": stages_of_units(CUTS[stages], num_units=10),
        "lookahead": lookahead_of(schedule, stages=stages),
    }
