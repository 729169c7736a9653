"""From an encoded photograph, JPEG or PNG, to RGB pixels.

A file says by its first bytes what it is and by its header how large: both are read here, before any library
sees it, so that nothing but the formats asked for is ever parsed and a small file cannot claim the memory of
a huge image. Then JPEG goes to torchvision's decoder, which writes packed RGB in one go, and what that one
refuses to Pillow, which knows more kinds and says more plainly what is wrong. Both are libjpeg-turbo and give
the same pixels; benchmarks/data has their speeds. PNG goes to Pillow.

Every image becomes RGB of 8 bits: grey and palettes are looked up, CMYK and YCCK converted, 16 bits cut to
the upper 8, transparency laid over black. Rotation by EXIF and colour profiles are left alone, as the usual
loaders of ImageNet leave them.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from petractl.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

JpegDecoder = Callable[[bytes], NDArray[np.uint8]]

DECODERS = ("auto", "pillow", "torchvision")
"""What can decode JPEG: "auto" is torchvision where it can be imported, else Pillow."""

IMAGE_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG"}
"""The format of each entry of a sample, or extension of a file, that can hold an image."""

ALL_FORMATS = ("JPEG", "PNG")

MAX_PIXELS = 89_478_485
"""An image of more pixels is refused (268 MB as RGB): the limit above which Pillow warns of a bomb."""

_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"RIFF": "WebP",
}
# Start-of-frame markers, and markers that no length follows.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BARE = frozenset((0x01, *range(0xD0, 0xD8)))
_END_OF_HEADER = (0xD9, 0xDA)


def formats_of(entries: Iterable[str]) -> tuple[str, ...]:
    """Return the formats, sorted, of entries such as "jpg".

    Raises `ValueError` for an entry that holds no image.
    """
    entries = list(entries)
    unknown = [entry for entry in entries if entry.lower() not in IMAGE_FORMATS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no kind of image that is read: {', '.join(IMAGE_FORMATS)}")
    return tuple(sorted({IMAGE_FORMATS[entry.lower()] for entry in entries}))


def image_size(image: bytes, *, formats: tuple[str, ...] = ALL_FORMATS) -> tuple[int, int]:
    """Return (height, width) by the header; raises `ValueError` as `decode` does for a bad one."""
    return _size(image, _format(image, formats))


def decode(
    image: bytes, *, decoder: str = "auto", formats: tuple[str, ...] = ALL_FORMATS
) -> NDArray[np.uint8]:
    """Return the pixels of an encoded image as RGB, uint8 (height, width, 3), contiguous.

    `decoder` is one of `DECODERS`: it changes the speed, not the pixels. Raises `ValueError` with a plain
    reason for bytes that are no whole image of one of `formats`, and `DataError` where `decoder` is not
    installed.
    """
    assert decoder in DECODERS, decoder
    kind = _format(image, formats)
    _size(image, kind)
    if kind == "JPEG" and (fast := _fast_decoder(decoder)):
        # What it refuses, Pillow may know, or else say why not.
        with suppress(RuntimeError):
            return fast(image)
    return _by_pillow(image, kind)


def _format(image: bytes, formats: tuple[str, ...]) -> str:
    wanted = " or ".join(formats)
    if not image:
        raise ValueError("its image is empty")
    kind = next((name for magic, name in _MAGIC.items() if image.startswith(magic)), None)
    if kind is None:
        raise ValueError(f"its image's {len(image)} bytes are not a {wanted}")
    if kind not in formats:
        raise ValueError(f"its image is a {kind}, not a {wanted}")
    return kind


def _size(image: bytes, kind: str) -> tuple[int, int]:
    height, width = _png_size(image) if kind == "PNG" else _jpeg_size(image)
    if height == 0 or width == 0:
        raise ValueError(f"its header is damaged: {width}x{height} pixels")
    if height * width > MAX_PIXELS:
        raise ValueError(f"its image is too large: {width}x{height} pixels are over {MAX_PIXELS}")
    return height, width


def _png_size(image: bytes) -> tuple[int, int]:
    if len(image) < 26 or image[12:16] != b"IHDR":
        raise ValueError("its PNG is truncated or damaged in the header")
    width, height = struct.unpack(">II", image[16:24])
    return height, width


def _jpeg_size(image: bytes) -> tuple[int, int]:
    """Return the size that the first frame header says, found as libjpeg finds it: from marker to marker."""
    place = 2
    while 0 <= place < len(image) - 8:
        marker = image[place + 1]
        if image[place] != 0xFF or marker == 0xFF:
            # Fill bytes before a marker are allowed, others are passed over by the decoders.
            place = image.find(b"\xff", place + 1)
        elif marker in _FRAMES:
            height, width = struct.unpack(">HH", image[place + 5 : place + 9])
            return height, width
        elif marker in _END_OF_HEADER:
            break
        else:
            place += 2 if marker in _BARE else 2 + int.from_bytes(image[place + 2 : place + 4], "big")
    raise ValueError("its JPEG is truncated or damaged in the header")


def _fast_decoder(decoder: str) -> JpegDecoder | None:
    """Return torchvision's decoder where it is asked for and there; `DataError` where it must be there."""
    if decoder == "pillow":
        return None
    found = _torchvision_decoder()
    if found is None and decoder == "torchvision":
        raise DataError(
            "torchvision cannot be imported, or decodes no JPEG",
            where="data.decoder",
            hint='install torchvision, or set data.decoder = "auto" (Pillow gives the same pixels)',
        )
    return found


@cache
def _torchvision_decoder() -> JpegDecoder | None:
    """Return torchvision's decoder of JPEG, or None where it is missing or broken."""
    import torch

    # Built beside another torch it raises RuntimeError or OSError as it is imported; and it is announced that
    # its decoders will go, to torchcodec (as fast, but it turns images by their EXIF).
    try:
        from torchvision.io import decode_jpeg
    except (ImportError, RuntimeError, OSError):
        return None

    def decode_by_torchvision(image: bytes) -> NDArray[np.uint8]:
        # torch warns about memory that it may not write to, so the bytes are copied.
        buffer = torch.frombuffer(bytearray(image), dtype=torch.uint8)
        pixels: NDArray[np.uint8] = decode_jpeg(buffer, mode="RGB").permute(1, 2, 0).numpy()
        return np.ascontiguousarray(pixels)

    return decode_by_torchvision


def _by_pillow(image: bytes, kind: str) -> NDArray[np.uint8]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(image), formats=(kind,)) as opened:
            return np.array(_rgb(opened), dtype=np.uint8)
    except UnidentifiedImageError:
        raise ValueError(f"its {kind} is truncated or damaged in the header") from None
    # Pillow raises OSError, SyntaxError, ValueError, struct.error ... for a damaged file.
    except Exception as error:
        raise ValueError(f"its {kind} cannot be decoded: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):
        # Pillow would clip 16 bits of grey to 255 and not scale them.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        opaque = Image.new("RGB", layer.size)
        opaque.paste(layer, mask=layer.getchannel("A"))
        return opaque
    return image if image.mode == "RGB" else image.convert("RGB")
