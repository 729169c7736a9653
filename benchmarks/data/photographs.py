"""Photographs to measure with, the same bytes as an image folder and as shards.

Made-up ones have what makes natural images slow to decode: detail at all scales (amplitude falling as one
over frequency) and colours that vary more slowly than brightness. 500 x 375 pixels at quality 90 make about
100 kB, as in ImageNet. Or the images of given shards, as they are.
"""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 10
IMAGES_PER_SHARD = 256


def made_up(count: int, *, height: int = 375, width: int = 500, quality: int = 90) -> list[bytes]:
    """Return `count` JPEGs."""
    return [_jpeg(_scene(seed, height, width), quality) for seed in range(count)]


def of_shards(folder: Path, count: int) -> list[bytes]:
    """Return the first `count` JPEGs of the training shards in `folder`."""
    found: list[bytes] = []
    for path in sorted(folder.glob("*train*.tar*")):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    found.append(archive.extractfile(member).read())
                if len(found) == count:
                    return found
    raise SystemExit(f"{folder} has only {len(found)} training images")


def write_folder(images: list[bytes], root: Path) -> Path:
    """Write a folder per class, for torchvision's ImageFolder."""
    for number, image in enumerate(images):
        path = root / f"class{number % CLASSES}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return root


def write_shards(images: list[bytes], root: Path) -> Path:
    """Write shards with `.jpg` and `.cls` per sample."""
    root.mkdir(parents=True)
    for first in range(0, len(images), IMAGES_PER_SHARD):
        with tarfile.open(root / f"train-{first // IMAGES_PER_SHARD:06}.tar", "w") as archive:
            for number, image in enumerate(images[first : first + IMAGES_PER_SHARD], start=first):
                _add(archive, f"{number:06}.jpg", image)
                _add(archive, f"{number:06}.cls", str(number % CLASSES).encode())
    return root


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _scene(seed: int, height: int, width: int) -> Image.Image:
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    planes = []
    for falloff, spread in ((1.0, 55.0), (1.6, 20.0), (1.6, 20.0)):
        phases = np.exp(2j * np.pi * random.random(frequency.shape))
        field = np.fft.irfft2(phases / frequency**falloff, s=(height, width))
        planes.append(128 + spread * field / field.std())
    pixels = np.clip(np.stack(planes, axis=-1), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels, mode="YCbCr").convert("RGB")


def _jpeg(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=quality)
    return file.getvalue()
