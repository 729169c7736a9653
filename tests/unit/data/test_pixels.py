import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import CenterCrop, Compose, Resize
from torchvision.transforms.v2 import functional as v2

from petractl.data.crops import random_box
from petractl.data.decoding import DECODERS, decode
from petractl.data.pixels import Pixels

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
_KEY = 99


def _photograph(height: int, width: int, kind: str = "JPEG") -> bytes:
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / width, 255 * y / height, 127 + 100 * np.sin((x + y) / 9)]
    noise = np.random.default_rng(0).integers(-9, 10, (height, width, 3))
    pixels = np.clip(np.stack(planes, axis=-1) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind)
    return file.getvalue()


_WIDE = _photograph(150, 201)


def _tensor(image: bytes) -> torch.Tensor:
    return torch.from_numpy(decode(image)).permute(2, 0, 1)


@pytest.mark.parametrize("size", [16, 96, 224])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_training_pixels_are_those_of_transforms_v2(size: int, kind: str) -> None:
    image, pixels = _photograph(150, 201, kind), Pixels(size=size)
    for sample in range(12):
        box, flip = random_box(150, 201, key=_KEY, sample=sample, scale=(0.08, 1.0))
        plain = v2.resized_crop(_tensor(image), *box, size=[size, size], antialias=True)
        plain = v2.horizontal_flip(plain) if flip else plain
        result = pixels.train(image, key=_KEY, sample=sample)
        assert result.shape == (3, size, size)
        assert result.dtype == np.uint8
        assert result.flags.c_contiguous
        assert np.array_equal(result, plain.numpy())


@pytest.mark.parametrize(("size", "resize"), [(64, 0), (64, 64), (112, 150), (224, 256)])
@pytest.mark.parametrize(("height", "width"), [(150, 201), (201, 150), (64, 64), (30, 500)])
def test_evaluation_pixels_are_those_of_transforms_v2(
    size: int, resize: int, height: int, width: int
) -> None:
    image = _photograph(height, width)
    plain = Compose([Resize(resize or round(size * 256 / 224), antialias=True), CenterCrop(size)])
    result = Pixels(size=size, resize=resize).eval(image)
    assert result.flags.c_contiguous
    assert np.array_equal(result, plain(_tensor(image)).numpy())


def test_pixels_differ_from_pillows_by_rounding_only() -> None:
    for sample in range(20):
        box, flip = random_box(150, 201, key=_KEY, sample=sample, scale=(0.08, 1.0))
        opened = Image.open(io.BytesIO(_WIDE))
        pillow = v2.resized_crop(opened, *box, size=[64, 64], interpolation=InterpolationMode.BILINEAR)
        plain = np.asarray(v2.horizontal_flip(pillow) if flip else pillow).transpose(2, 0, 1).astype(int)
        difference = np.abs(Pixels(size=64).train(_WIDE, key=_KEY, sample=sample) - plain)
        assert difference.max() <= 2
        assert difference.mean() < 0.25


def _all(pixels: Pixels) -> NDArray[np.uint8]:
    return np.stack([pixels.train(_WIDE, key=_KEY, sample=sample) for sample in range(8)])


def test_neither_decoder_nor_threads_change_a_bit() -> None:
    expected = _all(Pixels(size=48))
    for decoder in DECODERS:
        assert np.array_equal(_all(Pixels(size=48, decoder=decoder)), expected)
    with ThreadPoolExecutor(3) as pool:
        assert all(np.array_equal(result, expected) for result in pool.map(_all, [Pixels(size=48)] * 6))
    assert np.array_equal(_all(pickle.loads(pickle.dumps(Pixels(size=48)))), expected)


def test_the_crop_follows_key_sample_and_scale() -> None:
    whole = Pixels(size=32, scale=(1.0, 1.0))
    results = [
        Pixels(size=32).train(_WIDE, key=1, sample=0),
        Pixels(size=32).train(_WIDE, key=2, sample=0),
        Pixels(size=32).train(_WIDE, key=1, sample=1),
        whole.train(_WIDE, key=1, sample=0),
    ]
    assert len({result.tobytes() for result in results}) == 4


def test_an_image_of_absurd_length_takes_little_memory() -> None:
    image = _photograph(1, 20000, "PNG")
    assert Pixels(size=64).eval(image).shape == (3, 64, 64)
    assert Pixels(size=64).train(image, key=_KEY, sample=0).shape == (3, 64, 64)


def test_a_bad_image_is_a_value_error_with_the_reason() -> None:
    pixels = Pixels(size=32, formats=("JPEG",))
    for content, reason in ((_WIDE[:900], "truncated"), (_photograph(9, 9, "PNG"), "is a PNG, not a JPEG")):
        with pytest.raises(ValueError, match=reason):
            pixels.train(content, key=_KEY, sample=0)
        with pytest.raises(ValueError, match=reason):
            pixels.eval(content)
