import pytest

from petractl.data.encoded import BadSample
from petractl.data.skips import Skips
from petractl.errors import DataError


def test_the_limit_counts_different_samples() -> None:
    skips = Skips(2)
    one, other = BadSample("a.tar", "1", "broken"), BadSample("b.tar", "1", "broken")
    for _ in range(5):
        skips.add([one, other])
    assert len(skips.samples) == 10
    with pytest.raises(
        DataError, match="3 different bad samples were met, more than max_skipped = 2"
    ) as caught:
        skips.add([BadSample("c.tar", "9", "no label")])
    assert "'9': no label" in caught.value.what
    assert caught.value.where == "c.tar"
    assert "data.max_skipped" in caught.value.hint


def test_no_bad_sample_may_be_allowed() -> None:
    with pytest.raises(DataError, match="max_skipped = 0"):
        Skips(0).add([BadSample("a.tar", "1", "broken")])
