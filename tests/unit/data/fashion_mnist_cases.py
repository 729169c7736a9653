"""Small files in the format of Fashion-MNIST's authors."""

import gzip
from pathlib import Path

import numpy as np

SIZES = {"train": 12, "t10k": 5}


def idx(array: np.ndarray) -> bytes:
    lengths = b"".join(length.to_bytes(4, "big") for length in array.shape)
    return bytes((0, 0, 8, array.ndim)) + lengths + array.astype(np.uint8).tobytes()


def images_of(name: str) -> np.ndarray:
    return np.random.default_rng(SIZES[name]).integers(0, 256, (SIZES[name], 28, 28))


def write(folder: Path, *, zipped: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in SIZES.items():
        parts = {"images-idx3": images_of(name), "labels-idx1": np.arange(count) % 10}
        for part, array in parts.items():
            content = gzip.compress(idx(array)) if zipped else idx(array)
            (folder / f"{name}-{part}-ubyte{'.gz' if zipped else ''}").write_bytes(content)
    return folder
