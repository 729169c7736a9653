"""Small shards and batches, written where a test needs them."""

import io
import pickle
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from petractl.data.values import Samples

Entries = Iterable[tuple[str, bytes]]


def _png(image: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def _write_shard(path: Path, entries: Entries) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = "w" if path.suffix == ".tar" else "w:gz"
    with tarfile.open(str(path), mode) as archive:  # type: ignore[call-overload]
        for name, content in entries:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def _samples(count: int, *, classes: int, seed: int) -> Samples:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    return Samples(images=images, labels=generator.integers(0, classes, count))


@pytest.fixture
def png() -> Callable[[NDArray[np.uint8]], bytes]:
    """Encode an image (h, w, 3) or (h, w) as PNG."""
    return _png


@pytest.fixture
def write_shard() -> Callable[[Path, Entries], Path]:
    """Write a tar, gzipped unless its name ends in .tar, of named entries."""
    return _write_shard


@pytest.fixture
def write_cifar_shard() -> Callable[..., Samples]:
    """Write a shard of random samples and return them."""

    def write(path: Path, count: int, *, classes: int = 10, seed: int = 0) -> Samples:
        samples = _samples(count, classes=classes, seed=seed)
        entries: list[tuple[str, bytes]] = []
        for index, (image, label) in enumerate(zip(samples.images, samples.labels, strict=True)):
            entries.append((f"{index:06}.png", _png(np.ascontiguousarray(image.transpose(1, 2, 0)))))
            entries.append((f"{index:06}.cls", str(label).encode()))
        _write_shard(path, entries)
        return samples

    return write


@pytest.fixture
def write_cifar_batches() -> Callable[..., dict[str, Samples]]:
    """Write the authors' batches of a set, pickled or binary, and return the samples of each file."""

    def write(folder: Path, names: Iterable[str], *, count: int = 4, classes: int = 10) -> dict[str, Samples]:
        folder.mkdir(parents=True, exist_ok=True)
        written = {}
        for seed, name in enumerate(names):
            samples = _samples(count, classes=classes, seed=seed)
            rows = samples.images.reshape(count, -1)
            if name.endswith(".bin"):
                labels = samples.labels[:, None].astype(np.uint8)
                coarse = [labels // 5] if classes == 100 else []
                np.concatenate([*coarse, labels, rows], axis=1).tofile(folder / name)
            else:
                label_name = "labels" if classes == 10 else "fine_labels"
                table = {"data": rows, label_name: samples.labels.tolist()}
                (folder / name).write_bytes(pickle.dumps(table, protocol=2))
            written[name] = samples
        return written

    return write
