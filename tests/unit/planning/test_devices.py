"""Devices by name and by file."""

from pathlib import Path

import pytest

from petractl.errors import UserError
from petractl.planning.devices import DEVICES, GIB, devices_of
from petractl.planning.net import links_of


def test_names() -> None:
    assert devices_of("A100-40GB", count=3) == (DEVICES["a100-40gb"],) * 3
    mixed = devices_of("v100-16gb, a100-40gb:2", count=3)
    assert [spec.name for spec in mixed] == ["v100-16gb", "a100-40gb", "a100-40gb"]
    links = links_of(mixed)
    assert [link.bytes_per_s for link in links] == [150e9, 300e9]


def test_a_file_may_build_on_a_known_device(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(
        '[[device]]\nname = "a100-40gb"\ncount = 2\nlink_latency_us = 10\n'
        '[[device]]\nname = "mine"\ntflops = 5\nmemory_gib = 12.5\nlink_gb_per_s = 1.5\n'
    )
    first, second, mine = devices_of(str(path), count=3)
    assert first == second
    assert (first.tflops, first.memory_bytes) == (19.5, 40 * 10**9)
    assert first.link_latency_s == pytest.approx(1e-5)
    assert (mine.tflops, mine.memory_bytes, mine.link_bytes_per_s) == (5, int(12.5 * GIB), 1.5e9)
    assert mine.link_latency_s is None
    path.write_text("memory_gib = 4\n")
    assert [spec.memory_gib for spec in devices_of(str(path), count=2)] == [4, 4]


def test_what_is_unknown_is_not_guessed() -> None:
    assert DEVICES["t4"].link_bytes_per_s is None
    assert links_of((DEVICES["t4"],) * 2)[0].bytes_per_s == float("inf")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tflop = 1", "unknown keys tflop"),
        ("tflops = -1", "no positive number"),
        ("tflops = true", "no positive number"),
        ("memory_gib = 0", "no device"),
        ("tflops = [", "not valid TOML"),
        ("count = 1.5", "no number of devices"),
        ("count = 1000000", "no number of devices"),
        ("tflops = nan", "no positive number"),
        ("memory_gib = inf", "no positive number"),
        ("other = 1\n[[device]]\nname = 'a'", "must hold one device"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        devices_of(str(path), count=1)


def test_wrong_names_and_numbers() -> None:
    with pytest.raises(UserError, match='no device is called "a1000"'):
        devices_of("a1000", count=1)
    with pytest.raises(UserError, match="2 devices are listed, and 3 are needed"):
        devices_of("t4:2", count=3)
    with pytest.raises(UserError, match="cannot be read"):
        devices_of("missing.toml", count=1)
