"""How an image goes into a shard: as the bytes it is, or made smaller and compressed anew.

By default nothing is decoded, so nothing is lost; the header alone says what kind of image it is and how
large. With `resize` the short side becomes that many pixels where it has more (nothing is ever enlarged), by
the antialiased bilinear filter of the usual transforms; a JPEG is then a JPEG of `quality`, a PNG a PNG.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from petractl.data.crops import resized
from petractl.data.decoding import decode, image_size

DEFAULT_QUALITY = 90
"""Of a JPEG that is compressed anew, as Pillow and libjpeg count it."""

_JPEG_MAGIC = b"\xff\xd8\xff"


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image as it will stand in a shard: its bytes, the name of its entry, and (height, width)."""

    content: bytes
    entry: str
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Recoding:
    """What is done to every image; `resize` 0 leaves all of them as they are."""

    resize: int = 0
    quality: int = DEFAULT_QUALITY

    def __call__(self, image: bytes) -> StoredImage:
        """Return an image as it is to be stored; raises `ValueError` for what is no JPEG or PNG."""
        height, width = image_size(image)
        entry = "jpg" if image.startswith(_JPEG_MAGIC) else "png"
        if self.resize == 0 or min(height, width) <= self.resize:
            return StoredImage(image, entry, (height, width))
        size = resized(height, width, short=self.resize)
        return StoredImage(self._smaller(image, size, entry), entry, size)

    def _smaller(self, image: bytes, size: tuple[int, int], entry: str) -> bytes:
        from PIL import Image

        pixels = Image.fromarray(decode(image, decoder="pillow"))
        height, width = size
        smaller = pixels.resize((width, height), Image.Resampling.BILINEAR)
        # Pillow lets other threads run while it writes to a file of the system, but not to a BytesIO.
        with os.fdopen(os.memfd_create("image"), "w+b") as file:
            if entry == "jpg":
                smaller.save(file, format="JPEG", quality=self.quality)
            else:
                smaller.save(file, format="PNG")
            file.seek(0)
            return file.read()
