"""Small sources of shards."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def encoded(seed: int, *, size: tuple[int, int] = (24, 32), kind: str = "JPEG") -> bytes:
    """Return a picture of a few soft colours, (height, width) in size."""
    rough = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(rough).resize((size[1], size[0]), Image.Resampling.BICUBIC).save(file, format=kind)
    return file.getvalue()


@pytest.fixture
def picture() -> Callable[..., bytes]:
    """Encode a made-up picture: its number, `size` (height, width), `kind`."""
    return encoded


@pytest.fixture
def write_folder() -> Callable[..., Path]:
    """Write a folder of classes with `count` pictures each."""

    def write(
        folder: Path, *, classes: tuple[str, ...] = ("ant", "bee", "cat"), count: int = 4, **how
    ) -> Path:
        for label, name in enumerate(classes):
            (folder / name).mkdir(parents=True)
            for number in range(count):
                path = folder / name / f"{name}_{number}.jpg"
                path.write_bytes(encoded(100 * label + number, **how))
        return folder

    return write


@pytest.fixture
def both_splits(tmp_path: Path, write_folder: Callable[..., Path]) -> Path:
    """A folder with 12 training pictures of 3 classes and 4 to validate on, of 2 of them."""
    write_folder(tmp_path / "src" / "train")
    write_folder(tmp_path / "src" / "val", classes=("ant", "cat"), count=2)
    return tmp_path / "src"
