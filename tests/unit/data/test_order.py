from itertools import chain, zip_longest

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from petractl.data.order import TrainOrder
from petractl.errors import DataError


def _epoch(order: TrainOrder, epoch: int) -> list[list[int]]:
    return [order.pick(epoch, index).samples.tolist() for index in range(order.microbatches)]


def _shares(samples: int, *, replicas: int, **options) -> list[TrainOrder]:
    return [
        TrainOrder(samples, seed=3, replica=replica, replicas=replicas, **options)
        for replica in range(replicas)
    ]


def _dealt(shares: list[list[list[int]]]) -> list[list[int]]:
    """Return the microbatches of all replicas, row by row."""
    rows = zip_longest(*shares)
    return [batch for row in rows for batch in row if batch is not None]


@settings(deadline=None)
@given(
    samples=st.integers(2, 80),
    batch_size=st.integers(1, 90),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 1000),
)
def test_every_sample_exactly_once_per_pass(samples: int, batch_size: int, seed: int, epoch: int) -> None:
    assume(samples % batch_size != 1 or batch_size == 1)
    batches = _epoch(TrainOrder(samples, batch_size=batch_size, seed=seed), epoch)
    assert sorted(chain.from_iterable(batches)) == list(range(samples))
    assert all(len(batch) == batch_size for batch in batches[:-1])


@settings(deadline=None)
@given(
    samples=st.integers(2, 40),
    batch_size=st.integers(1, 12),
    steps_per_epoch=st.integers(1, 30),
    drop_last=st.booleans(),
)
def test_windows_of_steps_walk_over_successive_passes(
    samples: int, batch_size: int, steps_per_epoch: int, drop_last: bool
) -> None:
    assume(samples >= batch_size)
    assume(drop_last or samples % batch_size != 1 or batch_size == 1)
    whole = TrainOrder(samples, batch_size=batch_size, seed=3, drop_last=drop_last)
    windows = TrainOrder(
        samples, batch_size=batch_size, seed=3, drop_last=drop_last, steps_per_epoch=steps_per_epoch
    )
    by_windows = [batch for epoch in range(3) for batch in _epoch(windows, epoch)]
    passes = -(-len(by_windows) // whole.steps_per_epoch)
    by_passes = [batch for epoch in range(passes) for batch in _epoch(whole, epoch)]
    assert by_windows == by_passes[: len(by_windows)]


def test_the_order_is_a_function_of_seed_epoch_and_index_alone() -> None:
    order = TrainOrder(50, batch_size=8, seed=1)
    expected = {
        (epoch, index): batch for epoch in range(4) for index, batch in enumerate(_epoch(order, epoch))
    }
    other = TrainOrder(50, batch_size=8, seed=1)
    for epoch, index in reversed(expected):
        assert other.pick(epoch, index).samples.tolist() == expected[epoch, index]
    assert _epoch(order, 0) != _epoch(order, 1)
    assert _epoch(order, 0) != _epoch(TrainOrder(50, batch_size=8, seed=2), 0)


def test_drop_last_leaves_out_the_rest() -> None:
    batches = _epoch(TrainOrder(10, batch_size=4, seed=0, drop_last=True), 0)
    assert [len(batch) for batch in batches] == [4, 4]


def test_a_ragged_last_batch_is_kept() -> None:
    assert [len(batch) for batch in _epoch(TrainOrder(10, batch_size=4, seed=0), 0)] == [4, 4, 2]


@pytest.mark.parametrize("steps_per_epoch", [0, 3])
def test_a_last_batch_of_one_sample_is_refused(steps_per_epoch: int) -> None:
    with pytest.raises(DataError, match="129 samples = 2 x 64 \\+ 1") as caught:
        TrainOrder(129, batch_size=64, seed=0, steps_per_epoch=steps_per_epoch)
    assert caught.value.where == "data.batch_size"
    assert "data.drop_last=true" in caught.value.hint
    assert TrainOrder(129, batch_size=64, seed=0, drop_last=True).steps_per_epoch == 2


def test_single_samples_are_allowed_where_they_are_asked_for() -> None:
    assert [len(batch) for batch in _epoch(TrainOrder(3, batch_size=1, seed=0), 0)] == [1, 1, 1]


def test_drop_last_may_not_drop_everything() -> None:
    with pytest.raises(DataError, match="5 samples fill no microbatch of 8"):
        TrainOrder(5, batch_size=8, seed=0, drop_last=True)


@settings(deadline=None)
@given(
    samples=st.integers(2, 80),
    batch_size=st.integers(1, 20),
    replicas=st.integers(1, 7),
    epoch=st.integers(0, 1000),
    drop_last=st.booleans(),
)
def test_replicas_deal_a_pass_among_them(
    samples: int, batch_size: int, replicas: int, epoch: int, drop_last: bool
) -> None:
    assume(samples >= batch_size if drop_last else samples % batch_size != 1 or batch_size == 1)
    whole = TrainOrder(samples, batch_size=batch_size, seed=3, drop_last=drop_last)
    assume(whole.microbatches >= replicas)
    orders = _shares(samples, replicas=replicas, batch_size=batch_size, drop_last=drop_last)
    shares = [_epoch(order, epoch) for order in orders]
    assert _dealt(shares) == _epoch(whole, epoch), "every sample as often as without replicas"
    rows = -(-whole.microbatches // replicas)
    assert {order.steps_per_epoch for order in orders} == {rows}
    assert {order.microbatches for order in orders} <= {rows, rows - 1}
    assert orders[0].microbatches == rows
    assert all(order.pick(epoch, 0).pass_number == epoch for order in orders)


@settings(deadline=None)
@given(
    samples=st.integers(2, 40),
    batch_size=st.integers(1, 12),
    steps_per_epoch=st.integers(1, 30),
    replicas=st.integers(1, 7),
)
def test_replicas_deal_windows_of_rows(
    samples: int, batch_size: int, steps_per_epoch: int, replicas: int
) -> None:
    assume(samples % batch_size != 1 or batch_size == 1)
    alone = TrainOrder(samples, batch_size=batch_size, seed=3, steps_per_epoch=steps_per_epoch * replicas)
    orders = _shares(samples, replicas=replicas, batch_size=batch_size, steps_per_epoch=steps_per_epoch)
    for order in orders:
        assert order.steps_per_epoch == order.microbatches == steps_per_epoch
    for epoch in range(3):
        assert _dealt([_epoch(order, epoch) for order in orders]) == _epoch(alone, epoch)


def test_a_replica_may_not_be_left_with_nothing() -> None:
    for replica in range(4):
        with pytest.raises(DataError, match="10 samples in microbatches of 4 are 3 per pass") as caught:
            TrainOrder(10, batch_size=4, seed=0, replica=replica, replicas=4)
    assert caught.value.where == "engine.replicas"
    assert "at most 3" in caught.value.hint
    windows = TrainOrder(10, batch_size=4, seed=0, replica=3, replicas=4, steps_per_epoch=2)
    assert windows.microbatches == 2


def test_picks_name_their_pass() -> None:
    order = TrainOrder(6, batch_size=2, seed=0, steps_per_epoch=4)
    passes = [order.pick(epoch, index).pass_number for epoch in range(2) for index in range(4)]
    assert passes == [0, 0, 0, 1, 1, 1, 2, 2]
    assert order.pick(0, 0).samples.dtype == np.int64
