import numpy as np
from numpy.typing import NDArray

from petractl.data.preparation import augment, normalise

_IMAGES = np.random.default_rng(0).integers(0, 256, (400, 3, 8, 8), dtype=np.uint8)


def _crops(image: NDArray[np.uint8], pad: int) -> list[bytes]:
    """Every crop of one padded image, row offset first, written out."""
    _, height, width = image.shape
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
    offsets = range(2 * pad + 1)
    return [padded[:, y : y + height, x : x + width].tobytes() for y in offsets for x in offsets]


def test_a_crop_is_a_window_of_the_black_padded_image_and_all_windows_occur() -> None:
    result = augment(_IMAGES, key=1, samples=np.arange(400), pad=1, flip=False)
    places = [
        _crops(image, 1).index(cropped.tobytes()) for image, cropped in zip(_IMAGES, result, strict=True)
    ]
    counts = np.bincount(places, minlength=9)
    assert counts.min() > 20, counts


def test_about_half_of_the_images_are_flipped() -> None:
    result = augment(_IMAGES, key=1, samples=np.arange(400), pad=0, flip=True)
    same = (result == _IMAGES).all(axis=(1, 2, 3))
    mirrored = (result == _IMAGES[..., ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 150 < same.sum() < 250


def test_what_happens_to_a_sample_does_not_depend_on_its_batch() -> None:
    whole = augment(_IMAGES, key=7, samples=np.arange(400), pad=4, flip=True)
    chosen = np.array([300, 4, 17, 4])
    part = augment(_IMAGES[chosen], key=7, samples=chosen, pad=4, flip=True)
    assert np.array_equal(part, whole[chosen])
    other = augment(_IMAGES, key=8, samples=np.arange(400), pad=4, flip=True)
    assert not np.array_equal(other, whole)


def test_the_images_given_are_left_alone() -> None:
    images = _IMAGES.copy()
    for pad in (0, 2):
        augment(images, key=7, samples=np.arange(400), pad=pad, flip=True)
    assert np.array_equal(images, _IMAGES)


def test_normalise_is_the_textbook_formula() -> None:
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    result = normalise(_IMAGES, mean=mean, std=std)
    centre, spread = np.reshape(mean, (1, 3, 1, 1)), np.reshape(std, (1, 3, 1, 1))
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    np.testing.assert_allclose(result, (_IMAGES / 255 - centre) / spread, rtol=0, atol=1e-6)
