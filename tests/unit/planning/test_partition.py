"""Cuts: equal to brute force, even among equals, fast."""

import itertools
import random
import time
from collections.abc import Sequence

import pytest

from petractl.errors import UserError
from petractl.planning.partition import partition, partition_uniform


def stage_sums(costs: Sequence[float], cuts: Sequence[int]) -> list[float]:
    edges = [0, *cuts, len(costs)]
    return [sum(costs[start:end]) for start, end in itertools.pairwise(edges)]


def quality(costs: Sequence[float], cuts: Sequence[int]) -> tuple[float, float]:
    sums = stage_sums(costs, cuts)
    return max(sums), sum(value * value for value in sums)


def brute_force(costs: Sequence[float], num_stages: int) -> tuple[float, float]:
    candidates = itertools.combinations(range(1, len(costs)), num_stages - 1)
    return min(quality(costs, cuts) for cuts in candidates)


def test_equal_to_brute_force() -> None:
    generator = random.Random(0)
    for _ in range(200):
        num_units = generator.randint(1, 11)
        num_stages = generator.randint(1, num_units)
        costs = [generator.choice([0, 1, 1, 2, 3, 7, generator.randint(0, 1000)]) for _ in range(num_units)]
        cuts = partition(costs, num_stages)
        assert len(cuts) == num_stages - 1
        assert list(cuts) == sorted(set(cuts) - {0, num_units})
        assert quality(costs, cuts) == brute_force(costs, num_stages)


def test_largest_stage_is_optimal_for_times_too() -> None:
    generator = random.Random(1)
    for _ in range(50):
        costs = [generator.random() for _ in range(9)]
        num_stages = generator.randint(1, 9)
        assert max(stage_sums(costs, partition(costs, num_stages))) == pytest.approx(
            brute_force(costs, num_stages)[0], rel=1e-12
        )


def test_known_cuts() -> None:
    assert partition([1, 1, 1, 1], 2) == (2,)
    assert partition([9, 1, 1, 1], 2) == (1,)
    # The largest stage is 9 whatever the rest does: the rest is split evenly.
    assert partition([9, 1, 1, 1, 1], 3) == (1, 3)
    assert partition([0, 0, 0], 3) == (1, 2)
    assert partition([5], 1) == ()


def test_thousand_units_in_a_second() -> None:
    generator = random.Random(2)
    costs = [generator.randint(1, 10**9) for _ in range(1000)]
    # Processor time: the machine may have other things to do.
    start = time.process_time()
    cuts = partition(costs, 64)
    assert time.process_time() - start < 1.0
    assert max(stage_sums(costs, cuts)) < 1.1 * sum(costs) / 64


@pytest.mark.parametrize("num_units", range(1, 12))
def test_uniform(num_units: int) -> None:
    for num_stages in range(1, num_units + 1):
        cuts = partition_uniform(num_units, num_stages)
        sizes = stage_sums([1] * num_units, cuts)
        assert len(sizes) == num_stages
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("num_stages", [0, -1, 4])
def test_impossible_numbers_of_stages(num_stages: int) -> None:
    for cut in (lambda: partition([1, 2, 3], num_stages), lambda: partition_uniform(3, num_stages)):
        with pytest.raises(UserError) as caught:
            cut()
        assert caught.value.where == "partition.stages"
    if num_stages > 3:
        assert "stages(4) > units(3)" in str(caught.value)
