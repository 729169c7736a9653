from statistics import fmean

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize

from petractl.data.crops import (
    MAX_ASPECT,
    Box,
    bounded_box,
    centre_box,
    default_resize,
    random_box,
    resized,
)
from petractl.data.randomness import Purpose, stream_key

_KEY = stream_key(Purpose.AUGMENTATION, 5, 0)
_RATIO = (3 / 4, 4 / 3)


# Among them: images that some tries do not fit, and one that none fits.
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.3, 0.5)])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (224, 224), (64, 400), (300, 120), (1000, 30)])
def test_crops_have_the_law_of_torchvision(height: int, width: int, scale: tuple[float, float]) -> None:
    count = 3000
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(_RATIO)) for _ in range(count)])
    ours = np.array([_box(height, width, sample, scale) for sample in range(count)])
    measures = (
        lambda box: box[:, 2] * box[:, 3] / (height * width),
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0] / height,
        lambda box: box[:, 1] / width,
        lambda box: (height - box[:, 0] - box[:, 2]) / height,
        lambda box: (width - box[:, 1] - box[:, 3]) / width,
    )
    for place, measure in enumerate(measures):
        test = ks_2samp(measure(ours), measure(theirs))
        assert test.pvalue > 0.001, (place, test)


def test_half_of_the_crops_are_flipped_whatever_their_place() -> None:
    drawn = [random_box(375, 500, key=_KEY, sample=sample, scale=(0.08, 1.0)) for sample in range(4000)]
    assert 0.47 < fmean(flip for _, flip in drawn) < 0.53
    areas = ([box.height * box.width for box, flip in drawn if flip is which] for which in (True, False))
    assert ks_2samp(*areas).pvalue > 0.001


@settings(deadline=None)
@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    sample=st.integers(0, 2**40),
    low=st.floats(0.001, 1),
)
def test_a_crop_lies_in_the_image(height: int, width: int, sample: int, low: float) -> None:
    box, _ = random_box(height, width, key=_KEY, sample=sample, scale=(low, 1.0))
    assert box.height >= 1
    assert box.width >= 1
    assert 0 <= box.top <= height - box.height
    assert 0 <= box.left <= width - box.width


def test_a_crop_is_a_function_of_key_and_sample() -> None:
    def drawn(key: int, sample: int) -> tuple[Box, bool]:
        return random_box(375, 500, key=key, sample=sample, scale=(0.08, 1.0))

    assert drawn(_KEY, 7) == drawn(_KEY, 7)
    keys = [_KEY, stream_key(Purpose.AUGMENTATION, 5, 1), stream_key(Purpose.AUGMENTATION, 6, 0)]
    assert len({drawn(key, sample)[0] for key in keys for sample in range(100)}) > 290


@settings(deadline=None)
@given(height=st.integers(1, 700), width=st.integers(1, 700), short=st.integers(1, 64), part=st.data())
def test_the_centre_is_that_of_torchvision(height: int, width: int, short: int, part: st.DataObject) -> None:
    rows, columns = resized(height, width, short=short)
    # One row of the image says where each column comes from, one column where each row comes from.
    whole = torch.empty(1, height, width, device="meta")
    assert tuple(Resize(short, antialias=True)(whole).shape[1:]) == (rows, columns)
    side = part.draw(st.integers(1, short))
    places = torch.arange(rows * columns).reshape(1, rows, columns)
    box = centre_box(rows, columns, side=side)
    mine = places[:, box.top : box.top + box.height, box.left : box.left + box.width]
    assert torch.equal(mine, CenterCrop(side)(places))


def test_only_an_image_of_absurd_length_is_cut_before_it_is_resized() -> None:
    assert bounded_box(375, 500) == Box(0, 0, 375, 500)
    assert bounded_box(100, 100 * MAX_ASPECT) == Box(0, 0, 100, 100 * MAX_ASPECT)
    assert bounded_box(1, 1000) == Box(0, (1000 - MAX_ASPECT) // 2, 1, MAX_ASPECT)
    assert bounded_box(1000, 2) == Box((1000 - 2 * MAX_ASPECT) // 2, 0, 2 * MAX_ASPECT, 2)


def test_the_short_side_is_the_usual_one_in_proportion() -> None:
    assert [default_resize(side) for side in (224, 112, 64, 32)] == [256, 128, 73, 37]


def _box(height: int, width: int, sample: int, scale: tuple[float, float]) -> Box:
    return random_box(height, width, key=_KEY, sample=sample, scale=scale)[0]
