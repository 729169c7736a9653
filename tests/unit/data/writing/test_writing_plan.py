from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from petractl.data.writing.building import BuildOptions, build_shards
from petractl.data.writing.plan import (
    default_samples_per_shard,
    plan_shards,
    sample_order,
    samples_within,
)
from petractl.data.writing.recoding import Recoding
from petractl.data.writing.sources import SourceSplit, Wanted, open_sources
from petractl.errors import UserError


@pytest.fixture
def sources(both_splits: Path) -> list[SourceSplit]:
    return open_sources(str(both_splits), "folder", Wanted())


def test_shards_have_even_shares(sources: list[SourceSplit]) -> None:
    plans = plan_shards(sources, name="x", samples_per_shard=5, seed=0)
    assert [(plan.name, len(plan.rows)) for plan in plans] == [
        ("x-train-000000.tar", 4),
        ("x-train-000001.tar", 4),
        ("x-train-000002.tar", 4),
        ("x-val-000000.tar", 4),
    ]
    rows = np.concatenate([plan.rows for plan in plans[:3]])
    assert sorted(rows) == list(range(12))


def test_the_order_is_the_seeds(sources: list[SourceSplit]) -> None:
    assert sample_order(5, None).tolist() == [0, 1, 2, 3, 4]
    assert sample_order(100, 1).tolist() != sample_order(100, 2).tolist()
    assert sample_order(6, 0).tolist() == [5, 4, 0, 1, 3, 2]


def test_the_usual_number_depends_on_the_images(sources: list[SourceSplit]) -> None:
    assert default_samples_per_shard(sources, Recoding()) == 1000
    assert default_samples_per_shard(sources, Recoding(resize=64)) == 10_000
    small = [SourceSplit(source.split, source.samples, is_small=True) for source in sources]
    assert default_samples_per_shard(small, Recoding()) == 10_000


def test_no_shard_exceeds_the_megabytes(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    source = write_folder(tmp_path / "src", count=60)
    built = build_shards(str(source), tmp_path / "out", BuildOptions(max_mb=0.15))
    sizes = [entry.bytes for entry in built.index.shards]
    assert len(sizes) > 2
    assert max(sizes) <= 150_000
    assert max(sizes) > 90_000


def test_too_few_megabytes(sources: list[SourceSplit]) -> None:
    with pytest.raises(UserError, match="--max-mb: a sample has about"):
        samples_within(11_000, sources, Recoding(), seed=0)
