import subprocess
import sys
from collections.abc import Iterator

import pytest

from petractl.data import (
    Request,
    Source,
    dataset_summary,
    describe_data,
    list_datasets,
    open_data,
    register_dataset,
    registry,
)
from petractl.errors import DataError


def test_the_sets_there_are() -> None:
    names = ["cifar10", "cifar100", "digits", "fake", "fashion-mnist", "imagenet", "imagenet32", "shards"]
    assert list_datasets() == names
    assert all(len(dataset_summary(name)) > 20 for name in list_datasets())


def test_an_unknown_name_gets_a_suggestion() -> None:
    for use in (
        lambda: open_data("cifar-10", train="", val="", seed=0),
        lambda: describe_data("cifar-10", train="", val=""),
    ):
        with pytest.raises(DataError, match="no data set is called 'cifar-10'") as caught:
            use()
        assert caught.value.where == "data.name"
        assert "did you mean 'cifar10'?" in caught.value.hint


@pytest.fixture
def mine() -> Iterator[list[Request]]:
    requests: list[Request] = []

    def my_set(request: Request) -> Source:
        """A set of mine.

        More of it.
        """
        requests.append(request)
        data = open_data("digits", train="", val="", seed=request.seed)
        return Source(describe=lambda: data.info, load=lambda: data)

    register_dataset(my_set)
    yield requests
    del registry._BUILDERS["my-set"]


def test_a_set_of_ones_own(mine: list[Request]) -> None:
    assert dataset_summary("my-set") == "A set of mine."
    assert open_data("my-set", train="a.tar", val=["b.tar", "c.tar"], seed=4, classes=3).seed == 4
    assert mine == [Request(train=("a.tar",), val=("b.tar", "c.tar"), seed=4, classes=3)]


@pytest.mark.parametrize(
    ("key", "value"), [("image_size", 16), ("channels", 3), ("classes", 5), ("fake_samples", 99)]
)
def test_sizes_that_would_be_ignored_are_refused(key: str, value: int) -> None:
    with pytest.raises(DataError) as caught:
        describe_data("digits", train="", val="", **{key: value})
    assert caught.value.where == f"data.{key}"


def test_sizes_that_are_the_sets_own_are_accepted() -> None:
    assert describe_data("digits", train="", val="", image_size=8, channels=1, classes=10).classes == 10


def test_naming_and_describing_need_no_torch() -> None:
    code = (
        "import sys; from petractl.data import describe_data, list_datasets; list_datasets(); "
        "describe_data('digits', train='', val=''); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
