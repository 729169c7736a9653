import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from petractl.data.decoding import decode
from petractl.data.writing.recoding import Recoding


@pytest.mark.parametrize(("kind", "entry"), [("JPEG", "jpg"), ("PNG", "png")])
def test_an_image_is_left_as_it_is(picture: Callable[..., bytes], kind: str, entry: str) -> None:
    image = picture(0, kind=kind)
    stored = Recoding()(image)
    assert (stored.content, stored.entry, stored.size) == (image, entry, (24, 32))


@pytest.mark.parametrize(("kind", "entry"), [("JPEG", "jpg"), ("PNG", "png")])
def test_the_short_side_is_made_smaller(picture: Callable[..., bytes], kind: str, entry: str) -> None:
    image = picture(1, size=(48, 72), kind=kind)
    stored = Recoding(resize=24, quality=95)(image)
    assert (stored.entry, stored.size) == (entry, (24, 36))
    pixels = decode(stored.content)
    assert pixels.shape == (24, 36, 3)
    plain = Image.open(io.BytesIO(image)).convert("RGB").resize((36, 24), Image.Resampling.BILINEAR)
    assert np.abs(pixels.astype(int) - np.asarray(plain)).mean() < 3


def test_nothing_is_enlarged(picture: Callable[..., bytes]) -> None:
    image = picture(2, size=(24, 32))
    assert Recoding(resize=24)(image).content == image
    assert Recoding(resize=200)(image).content == image


def test_quality_counts(picture: Callable[..., bytes]) -> None:
    image = picture(3, size=(90, 90))
    sizes = [len(Recoding(resize=64, quality=quality)(image).content) for quality in (20, 90)]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("image", [b"", b"GIF89a", b"no image", b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_is_refused(image: bytes) -> None:
    with pytest.raises(ValueError):
        Recoding()(image)
