import io
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from petractl.data.decode import decode_shard
from petractl.data.values import Samples
from petractl.errors import DataError

_GREY = np.arange(1024, dtype=np.uint16).reshape(32, 32)


def test_pixels_and_labels_survive(tmp_path: Path, write_cifar_shard: Callable[..., Samples]) -> None:
    # More than one chunk of the threads' work.
    expected = write_cifar_shard(tmp_path / "s.tar", 300)
    samples = decode_shard(tmp_path / "s.tar", side=32, classes=10)
    assert np.array_equal(samples.images, expected.images)
    assert np.array_equal(samples.labels, expected.labels)
    assert samples.images.flags.c_contiguous


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_other_pixel_formats_become_rgb(tmp_path: Path, write_shard: Callable[..., Path], mode: str) -> None:
    image = Image.fromarray((_GREY // 4).astype(np.uint8)).convert(mode)
    file = io.BytesIO()
    image.save(file, format="PNG")
    path = write_shard(tmp_path / "s.tar", [("0.png", file.getvalue()), ("0.cls", b"1\n")])
    samples = decode_shard(path, side=32, classes=10)
    assert np.array_equal(samples.images[0].transpose(1, 2, 0), np.asarray(image.convert("RGB")))
    assert samples.labels.tolist() == [1]


@pytest.mark.parametrize("label", [b"10", b"-1", b"", b"cat", b"3.0", b"\xff\xfe", "\u0663".encode()])
def test_a_bad_label_is_named(
    tmp_path: Path, write_shard: Callable[..., Path], png: Callable[..., bytes], label: bytes
) -> None:
    good = png(np.zeros((32, 32, 3), np.uint8))
    entries = [("0.png", good), ("0.cls", b"9"), ("17.png", good), ("17.cls", label)]
    path = write_shard(tmp_path / "s.tar", entries)
    with pytest.raises(DataError, match=r"sample '17': its label .* is not a number 0 \.\.\. 9") as caught:
        decode_shard(path, side=32, classes=10)
    assert caught.value.where == str(path)


def _as(format_name: str, image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format_name)
    return file.getvalue()


_SMALL = Image.new("RGB", (32, 32), (1, 2, 3))
_NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "are not a PNG"),
        (b"junk", "are not a PNG"),
        (_as("JPEG", _SMALL), "are not a PNG"),
        (_as("PNG", _SMALL)[:20], ""),
        (_as("PNG", _NOISE)[:1500], "truncated"),
        (_as("PNG", _NOISE)[:40] + b"\x00" * 200, ""),
        (_as("PNG", Image.new("RGB", (31, 32))), "it is 31x32, not 32x32"),
        (_as("PNG", Image.fromarray(_GREY)), "not 8 bits"),
    ],
    ids=["empty", "junk", "jpeg", "cut-header", "cut-pixels", "damaged", "other-size", "16-bit"],
)
def test_a_bad_image_is_named_with_the_reason(
    tmp_path: Path, write_shard: Callable[..., Path], content: bytes, reason: str
) -> None:
    path = write_shard(tmp_path / "s.tar", [("42.png", content), ("42.cls", b"0")])
    with pytest.raises(DataError, match=f"sample '42': cannot decode its image: .*{reason}") as caught:
        decode_shard(path, side=32, classes=10)
    assert caught.value.where == str(path)


def test_a_huge_image_is_refused_by_its_header(tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    header = b"IHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    content = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    path = write_shard(tmp_path / "s.tar", [("0.png", content), ("0.cls", b"0")])
    with pytest.raises(DataError, match="sample '0'"):
        decode_shard(path, side=32, classes=10)


def test_an_empty_shard_is_an_error(tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    for entries in ([], [("README", b"hello")]):
        with pytest.raises(DataError, match="no sample"):
            decode_shard(write_shard(tmp_path / "s.tar", entries), side=32, classes=10)
