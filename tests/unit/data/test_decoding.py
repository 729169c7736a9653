import io
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from petractl.data import decoding
from petractl.data.decoding import DECODERS, decode, formats_of, image_size
from petractl.errors import DataError

# torchvision announces the end of its decoders at each call; Pillow stands ready.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
_ROWS, _COLUMNS = 53, 70


def _scene(height: int = _ROWS, width: int = _COLUMNS) -> Image.Image:
    """Slopes of colour with a little noise: what JPEG is made for."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / width, 255 * y / height, 127 + 100 * np.sin((x + y) / 9)]
    noise = np.random.default_rng(0).integers(-6, 7, (height, width, 3))
    return Image.fromarray(np.clip(np.stack(planes, axis=-1) + noise, 0, 255).astype(np.uint8))


def _encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _png16(pixels: NDArray[np.uint16]) -> bytes:
    """Encode (h, w, channels) at 16 bits, which Pillow cannot for colour: grey 1, RGB 3, RGBA 4 channels."""
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in pixels)
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


_SCENE = _scene()
_JPEG = _encoded(_SCENE, quality=90)
_PNG = _encoded(_SCENE, "PNG")
_FRAME = _JPEG.index(b"\xff\xc0")


def _with_size(jpeg: bytes, height: int, width: int) -> bytes:
    return jpeg[: _FRAME + 5] + struct.pack(">HH", height, width) + jpeg[_FRAME + 9 :]


_KINDS = {
    "444": _encoded(_SCENE, subsampling=0),
    "422": _encoded(_SCENE, subsampling=1),
    "420": _encoded(_SCENE, subsampling=2),
    "progressive": _encoded(_SCENE, progressive=True),
    "restarts": _encoded(_SCENE, restart_marker_blocks=2),
    "rgb": _encoded(_SCENE, keep_rgb=True),
    "grey": _encoded(_SCENE.convert("L")),
    "cmyk": _encoded(_SCENE.convert("CMYK")),
    "rough": _encoded(_SCENE, quality=5),
    "one-pixel": _encoded(_SCENE.resize((1, 1))),
    "column": _encoded(_SCENE.resize((1, 40))),
    "trailing-junk": _JPEG + b"junk" * 9,
}


@pytest.mark.parametrize("name", _KINDS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_jpeg_has_pillows_pixels_by_each_decoder(name: str, decoder: str) -> None:
    plain = np.asarray(Image.open(io.BytesIO(_KINDS[name])).convert("RGB"))
    pixels = decode(_KINDS[name], decoder=decoder)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    assert np.array_equal(pixels, plain)
    assert image_size(_KINDS[name]) == plain.shape[:2]


@pytest.mark.parametrize("decoder", DECODERS)
def test_photographs_for_printing_keep_their_colours(decoder: str) -> None:
    cmyk, negative = _KINDS["cmyk"], Image.eval(_SCENE, lambda value: 255 - value)
    # Pillow's writer inverts what it is given, as Adobe's programs do.
    bands = [Image.eval(band, lambda value: 255 - value) for band in negative.convert("YCbCr").split()]
    stored = _encoded(Image.merge("CMYK", [*bands, Image.new("L", negative.size)]), quality=95)
    # Adobe's marker ends in the transform: 0 for CMYK, 2 for YCCK.
    place = stored.index(b"Adobe") + 11
    assert stored[place] == cmyk[cmyk.index(b"Adobe") + 11] == 0
    ycck = stored[:place] + b"\x02" + stored[place + 1 :]
    for content in (cmyk, ycck):
        error = np.abs(decode(content, decoder=decoder).astype(int) - np.asarray(_SCENE)).mean()
        assert error < 4, error


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_opaque_pngs_become_rgb(mode: str) -> None:
    image = _SCENE.convert(mode)
    pixels = decode(_encoded(image, "PNG"))
    assert np.array_equal(pixels, np.asarray(image.convert("RGB")))
    assert image_size(_encoded(image, "PNG")) == (_ROWS, _COLUMNS)


def test_transparency_is_laid_over_black() -> None:
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, _COLUMNS), (_ROWS, 1)).astype(np.uint8))
    for mode in ("RGBA", "LA"):
        image = _SCENE.convert(mode)
        image.putalpha(alpha)
        opaque = np.asarray(image.convert("RGB"), dtype=float)
        expected = opaque * np.asarray(alpha)[..., None] / 255
        assert np.abs(decode(_encoded(image, "PNG")) - expected).max() <= 0.51


def test_a_transparent_colour_of_a_palette_or_of_plain_pixels_is_black() -> None:
    image = Image.new("P", (4, 2), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 0)
    assert decode(_encoded(image, "PNG", transparency=1))[0].tolist() == [[10, 20, 30]] + [[0, 0, 0]] * 3
    plain = Image.new("RGB", (2, 1), (9, 8, 7))
    plain.putpixel((0, 0), (1, 2, 3))
    assert decode(_encoded(plain, "PNG", transparency=(9, 8, 7)))[0].tolist() == [[1, 2, 3], [0, 0, 0]]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_are_cut_to_the_upper_eight(channels: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 65536, (5, 6, channels), dtype=np.uint16)
    if channels == 4:
        pixels[..., 3] = 65535
    upper = (pixels >> 8).astype(np.uint8)[..., :3]
    assert np.array_equal(decode(_png16(pixels)), np.broadcast_to(upper, (5, 6, 3)))


def test_rotation_by_exif_is_left_alone() -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    assert np.array_equal(decode(_encoded(_SCENE, quality=90, exif=tags)), decode(_JPEG))


_BAD = {
    "empty": (b"", "its image is empty"),
    "text": (b"junk", "its image's 4 bytes are not a JPEG or PNG"),
    "zeros": (bytes(5000), "its image's 5000 bytes are not a JPEG or PNG"),
    "gif": (_encoded(_SCENE, "GIF"), "its image is a GIF, not a JPEG or PNG"),
    "webp": (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "its image is a WebP"),
    "tiff": (_encoded(_SCENE, "TIFF"), "its image is a TIFF"),
    "jpeg-start": (_JPEG[:3], "truncated or damaged in the header"),
    "jpeg-header": (_JPEG[:_FRAME], "truncated or damaged in the header"),
    "jpeg-half": (_JPEG[: len(_JPEG) // 2], "truncated"),
    "jpeg-end": (_JPEG[:-2], "truncated"),
    "jpeg-zeros": (_JPEG[: len(_JPEG) // 2] + bytes(len(_JPEG) // 2), "truncated"),
    "jpeg-no-tables": (_JPEG[:2] + _JPEG[_FRAME:], "its JPEG cannot be decoded"),
    "jpeg-progressive": (_KINDS["progressive"][: len(_KINDS["progressive"]) * 2 // 3], "truncated"),
    "jpeg-no-pixels": (_with_size(_JPEG, 0, 70), "its header is damaged: 70x0 pixels"),
    "jpeg-bomb": (_with_size(_JPEG, 65535, 65535), "too large: 65535x65535 pixels"),
    "png-start": (_PNG[:20], "truncated or damaged in the header"),
    "png-half": (_PNG[: len(_PNG) // 2], "truncated"),
    "png-zeros": (_PNG[:60] + bytes(400), "cannot be decoded|damaged"),
    "png-bomb": (_PNG[:16] + struct.pack(">II", 60000, 60000) + _PNG[24:], "too large: 60000x60000"),
    "png-sum": (_PNG[:29] + b"\x00\x00\x00\x00" + _PNG[33:], "cannot be decoded|damaged"),
}


@pytest.mark.parametrize("name", _BAD)
@pytest.mark.parametrize("decoder", DECODERS)
def test_bad_bytes_are_a_plain_reason(name: str, decoder: str) -> None:
    content, reason = _BAD[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with pytest.raises(ValueError, match=reason) as caught:
            decode(content, decoder=decoder)
    message = str(caught.value)
    assert message.startswith("its "), message
    assert "object at" not in message, message
    assert "\n" not in message, message


@settings(deadline=None, max_examples=150)
@given(data=st.data(), whole=st.sampled_from([_JPEG, _PNG, _KINDS["cmyk"], _KINDS["progressive"]]))
def test_no_damage_raises_anything_else(data: st.DataObject, whole: bytes) -> None:
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(damaged[: data.draw(st.integers(0, len(whole)))])
    try:
        pixels = decode(content)
    except ValueError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.shape == (*image_size(content), 3)


def test_only_the_formats_asked_for_are_parsed() -> None:
    assert decode(_PNG, formats=("PNG",)).shape == (_ROWS, _COLUMNS, 3)
    for content, formats, reason in (
        (_JPEG, ("PNG",), "its image is a JPEG, not a PNG"),
        (_PNG, ("JPEG",), "its image is a PNG, not a JPEG"),
    ):
        with pytest.raises(ValueError, match=reason):
            decode(content, formats=formats)
        with pytest.raises(ValueError, match=reason):
            image_size(content, formats=formats)


def test_the_format_is_that_of_the_entries() -> None:
    assert formats_of(["jpg", "JPEG"]) == ("JPEG",)
    assert formats_of(("jpg", "jpeg", "png")) == ("JPEG", "PNG")
    with pytest.raises(ValueError, match="'npy' is no kind of image that is read: jpg, jpeg, png"):
        formats_of(["png", "npy"])


@pytest.fixture
def without_torchvision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have torchvision's decoders gone, as is announced, with nothing remembered from before."""
    monkeypatch.setitem(sys.modules, "torchvision.io", SimpleNamespace())
    decoding._torchvision_decoder.cache_clear()
    yield
    decoding._torchvision_decoder.cache_clear()


@pytest.mark.usefixtures("without_torchvision")
def test_without_torchvision_pillow_decodes_unless_torchvision_is_asked_for() -> None:
    assert np.array_equal(decode(_JPEG), decode(_JPEG, decoder="pillow"))
    assert decode(_PNG, decoder="torchvision").shape == (_ROWS, _COLUMNS, 3)
    with pytest.raises(DataError, match="torchvision cannot be imported, or decodes no JPEG") as caught:
        decode(_JPEG, decoder="torchvision")
    assert caught.value.where == "data.decoder"
