import pickle

import numpy as np
import pytest
import torch
from photograph_cases import SIDE, photograph_data

from petractl.data.dataset import PHOTOGRAPH_NORMALISATION
from petractl.data.order import Pick
from petractl.data.photographs import Photographs
from petractl.data.pixels import Pixels
from petractl.data.randomness import Purpose, stream_key
from petractl.errors import DataError


def _photographs(bad: dict[int, str] | None = None, *, training: bool = True, **options) -> Photographs:
    data = photograph_data(20, 20, bad=bad)
    assert data.train is not None
    how = {"pixels": Pixels(size=SIDE), "normalisation": PHOTOGRAPH_NORMALISATION, "seed": 3}
    return Photographs(data.train, training=training, **how, **options)


def _pick(*samples: int, pass_number: int = 0) -> Pick:
    return Pick(index=4, pass_number=pass_number, samples=np.array(samples, dtype=np.int64))


def test_a_batch_holds_bytes_to_be_normalised_and_labels() -> None:
    batch = _photographs().prepare(_pick(5, 30, 2))
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (3, 3, SIDE, SIDE)
    assert batch.images.is_contiguous()
    assert batch.labels.tolist() == [5, 30, 2]
    assert batch.labels.dtype == torch.int64
    assert (batch.index, batch.skipped, batch.normalisation) == (4, (), PHOTOGRAPH_NORMALISATION)


def test_a_sample_looks_the_same_in_whichever_batch_of_a_pass() -> None:
    photographs = _photographs()
    alone = photographs.prepare(_pick(7, pass_number=2)).images[0]
    among = photographs.prepare(_pick(1, 9, 7, pass_number=2)).images[2]
    later = photographs.prepare(_pick(7, pass_number=3)).images[0]
    assert torch.equal(alone, among)
    assert not torch.equal(alone, later)


def test_crops_are_those_of_the_pixels() -> None:
    data = photograph_data(20, 20)
    assert data.train is not None
    image = data.train.read(9).image
    key = stream_key(Purpose.AUGMENTATION, 3, 6)
    found = _photographs().prepare(_pick(9, pass_number=6)).images[0]
    assert np.array_equal(found, data.pixels.train(image, key=key, sample=9))
    plain = data.pixels.eval(image)
    for photographs in (_photographs(training=False), _photographs(augment=False)):
        assert np.array_equal(photographs.prepare(_pick(9)).images[0], plain)


def test_it_goes_to_another_process_as_it_is() -> None:
    photographs = _photographs()
    copy = pickle.loads(pickle.dumps(photographs))
    assert torch.equal(photographs.prepare(_pick(1, 2)).images, copy.prepare(_pick(1, 2)).images)


@pytest.mark.parametrize(
    ("kind", "reason"), [("image", "truncated|cannot|decode"), ("label", "not a number")]
)
def test_a_bad_sample_stops_by_default(kind: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        _photographs({9: kind}).prepare(_pick(1, 9, 2))
    assert "sample '0009'" in caught.value.what
    assert caught.value.where == "train-0.tar"
    assert 'data.on_error="skip"' in caught.value.hint


def test_bad_samples_are_left_out_where_asked() -> None:
    photographs = _photographs({9: "image", 3: "label"}, on_error="skip")
    batch = photographs.prepare(_pick(3, 1, 9, 2))
    assert batch.labels.tolist() == [1, 2]
    assert torch.equal(batch.images, photographs.prepare(_pick(1, 2)).images)
    assert [(bad.place, bad.key) for bad in batch.skipped] == [
        ("train-0.tar", "0003"),
        ("train-0.tar", "0009"),
    ]
    assert all(bad.__traceback__ is None for bad in batch.skipped), "it would hold on to the images"


def test_the_fault_of_the_set_is_never_left_out() -> None:
    with pytest.raises(DataError, match="the shard is gone"):
        _photographs({9: "set"}, on_error="skip").prepare(_pick(1, 9, 2))


@pytest.mark.parametrize(
    ("samples", "left"),
    [((3, 9), "none"), ((3, 9, 1), "1"), ((3,), "none")],
)
def test_a_batch_needs_something_left_to_train_on(samples: tuple[int, ...], left: str) -> None:
    photographs = _photographs({9: "label", 3: "label"}, on_error="skip")
    with pytest.raises(DataError, match=f"which leaves {left}: '0003': its label 'x'") as caught:
        photographs.prepare(_pick(*samples))
    assert caught.value.where == "train-0.tar"
    assert "data.batch_size" in caught.value.hint
    assert "data.shuffle_buffer = 0" in caught.value.hint


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_goes_on_where_a_batch_is_lost(workers: int) -> None:
    data = photograph_data(8, val=11, bad_val=dict.fromkeys(range(4, 8), "image"), on_error="skip")
    loader = data.eval_loader(batch_size=4, workers=workers)
    batches = list(loader)
    assert [batch.labels.tolist() for batch in batches] == [[0, 1, 2, 3], [], [8, 9, 10]]
    assert batches[1].images.shape == (0, 3, SIDE, SIDE)
    assert [bad.key for bad in loader.skipped] == ["0004", "0005", "0006", "0007"]


def test_one_sample_that_is_left_is_enough_to_evaluate_or_where_there_was_one() -> None:
    photographs = _photographs({9: "label"}, on_error="skip", training=False)
    assert photographs.prepare(_pick(9, 1)).labels.tolist() == [1]
    assert _photographs().prepare(_pick(1)).labels.tolist() == [1]


def test_a_set_in_memory_gives_what_is_decoded_as_it_is_read() -> None:
    data = photograph_data(20, 20, bad={9: "image"}, crop="pad", on_error="skip")
    loaders = [kind.train_loader(batch_size=8) for kind in (data, data.in_memory(workers=0))]
    found = [
        {
            int(label): batch.normalisation(image[None]) if batch.normalisation else image[None]
            for batch in loader.epoch(0)
            for label, image in zip(batch.labels, batch.images, strict=True)
        }
        for loader in loaders
    ]
    assert sorted(found[0]) == sorted(found[1]) == [n for n in range(40) if n != 9]
    # A sample that was left out moves the numbers of those behind it, and with them what is drawn.
    assert all(torch.equal(found[0][n], found[1][n]) for n in range(9))


def test_a_set_in_memory_is_evaluated_as_its_photographs_are() -> None:
    data = photograph_data(30)
    mine, other = data.eval_loader(batch_size=4), data.in_memory().eval_loader(batch_size=4)
    for left, right in zip(mine, other, strict=True):
        assert left.normalisation is not None
        assert torch.equal(left.normalisation(left.images), right.images)
        assert torch.equal(left.labels, right.labels)


def test_more_than_the_memory_of_the_machine_is_refused() -> None:
    data = photograph_data(20, val=10)
    data.val.sizes = (10**12,)
    with pytest.raises(DataError, match="GiB, and this machine has") as caught:
        data.in_memory()
    assert caught.value.where == "data.resident"


def test_bad_samples_of_all_loaders_count_together() -> None:
    data = photograph_data(20, bad={3: "label"}, bad_val={1: "image"}, on_error="skip", max_skipped=2)
    loader, evaluation = data.train_loader(batch_size=5), data.eval_loader(batch_size=5)
    for _ in range(2):
        assert sum(len(batch.labels) for batch in loader.epoch(0)) == 19
    assert sum(len(batch.labels) for batch in evaluation) == 9
    assert [bad.key for bad in loader.skipped] == ["0003", "0003", "0001"]
    assert evaluation.skipped is loader.skipped


def test_too_many_bad_samples_end_it() -> None:
    data = photograph_data(20, bad={3: "label", 8: "label"}, on_error="skip", max_skipped=1)
    with pytest.raises(DataError, match="more than max_skipped = 1"):
        list(data.train_loader(batch_size=5).epoch(0))
