from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petractl.data.shuffle import ShardShuffle, WholeShuffle


def _shards_of(order: Sequence[int], sizes: Sequence[int]) -> list[int]:
    bounds = np.cumsum(sizes)
    return np.searchsorted(bounds, order, side="right").tolist()


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=8),
    buffer=st.integers(0, 60),
    key=st.integers(0, 2**64 - 1),
)
def test_every_sample_once_whatever_the_shards_and_the_buffer(
    sizes: list[int], buffer: int, key: int
) -> None:
    shuffle = ShardShuffle(sizes, buffer=buffer)
    order = shuffle.order(key)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    assert shuffle.order(key).tolist() == order.tolist()


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=8),
    buffer=st.integers(1, 60),
    key=st.integers(0, 2**64 - 1),
)
def test_no_sample_moves_further_than_the_buffer(sizes: list[int], buffer: int, key: int) -> None:
    shuffle = ShardShuffle(sizes, buffer=buffer)
    if shuffle.is_whole:
        return
    before = {int(sample): place for place, sample in enumerate(shuffle._by_shard(key))}
    assert all(abs(before[int(s)] - place) <= buffer for place, s in enumerate(shuffle.order(key)))


def test_the_shards_come_in_an_order_of_their_own_in_every_pass() -> None:
    sizes = (10,) * 20
    shuffle = ShardShuffle(sizes, buffer=1)
    first, second = (_shards_of(shuffle.order(key)[4::10].tolist(), sizes) for key in (1, 2))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert first != sorted(first)


def test_few_shards_are_in_use_at_a_time() -> None:
    sizes = (100,) * 50
    shards = np.array(_shards_of(ShardShuffle(sizes, buffer=200).order(3).tolist(), sizes))
    live = [len(set(shards[first : first + 100])) for first in range(0, 4900, 100)]
    assert max(live) <= 1 + (100 + 2 * 200) // 100 + 1
    assert np.mean(live) > 2.5, "and they are mixed"


def test_samples_are_mixed_within_the_buffer() -> None:
    order = ShardShuffle((500, 500), buffer=100).order(5)
    moves = np.diff(order)
    assert np.count_nonzero(moves == 1) < 50


@pytest.mark.parametrize(("sizes", "buffer"), [((6, 5), 0), ((6, 5), 11), ((6, 5), 500), ((11,), 3)])
def test_a_buffer_that_holds_everything_shuffles_the_whole_set(sizes: tuple[int, ...], buffer: int) -> None:
    shuffle = ShardShuffle(sizes, buffer=buffer)
    assert shuffle.is_whole
    assert shuffle.order(9).tolist() == WholeShuffle(11).order(9).tolist()


def test_the_order_never_changes() -> None:
    # A run that is resumed with a later version sees the same samples.
    order = ShardShuffle((3, 4, 2), buffer=6).order(12345)
    assert order.tolist() == [7, 0, 8, 1, 2, 3, 6, 5, 4]
