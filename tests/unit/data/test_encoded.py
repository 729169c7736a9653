import pickle

import pytest

from petractl.data.encoded import MAX_IMAGE_BYTES, BadSample, bad_size
from petractl.errors import DataError


def test_a_bad_sample_survives_another_process() -> None:
    again = pickle.loads(pickle.dumps(BadSample("a/s.tar", "000/7", "its image is empty")))
    assert (again.place, again.key, again.reason) == ("a/s.tar", "000/7", "its image is empty")
    assert str(again) == "a/s.tar: 000/7: its image is empty"


def test_its_error_names_all_and_the_remedy() -> None:
    error = BadSample("a/s.tar", "000/7", "its image is empty").error()
    assert isinstance(error, DataError)
    assert error.where == "a/s.tar"
    assert error.what == "sample '000/7': its image is empty"
    assert 'data.on_error="skip"' in error.hint


@pytest.mark.parametrize(("size", "said"), [(0, "empty"), (1, ""), (MAX_IMAGE_BYTES + 1, "above the limit")])
def test_what_cannot_be_a_photograph_is_told_unread(size: int, said: str) -> None:
    assert said in bad_size(size)
    assert bool(said) == bool(bad_size(size))
