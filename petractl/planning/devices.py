"""What a device can do, for planning for machines that are not here: speed, memory, links.

The table holds the figures of the vendors' data sheets: FP32 without tensor cores, memory in units of 10^9
bytes, a link's bytes per second in one direction (half of what NVLink and PCIe data sheets add up). They are
peaks: a net reaches a part of them, and the same part on every device of a kind, so cuts and speed-ups are
right where images/s are too high. What a data sheet does not say is N/A (None), never a guess.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from petractl.errors import UserError

GIB = 2**30
NOMINAL = "nominal device of 1 TFLOP/s"


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A device: TFLOP/s, bytes of memory, bytes per second and seconds of its links; None where unknown."""

    name: str
    tflops: float | None = None
    memory_bytes: int | None = None
    link_bytes_per_s: float | None = None
    link_latency_s: float | None = None

    @property
    def memory_gib(self) -> float | None:
        """The memory in GiB."""
        return None if self.memory_bytes is None else self.memory_bytes / GIB


def _gpu(name: str, *, tflops: float, gigabytes: int, link_gb_per_s: float | None) -> DeviceSpec:
    bandwidth = None if link_gb_per_s is None else link_gb_per_s * 1e9
    return DeviceSpec(name, tflops, gigabytes * 10**9, bandwidth)


# Sources: NVIDIA's published figures, read in reprints of its data sheets (A40, L40S, A100) and in tables of
# cloud vendors ("cloud"), not in the sheets themselves. PCIe 4.0 x16: 64 GB/s over both directions.
DEVICES: dict[str, DeviceSpec] = {
    spec.name: spec
    for spec in (
        # Cloud; six NVLinks of 25 GB/s each way. All six only through an NVSwitch: in a DGX-1 two neighbours
        # share one or two of them, 25 or 50 GB/s.
        _gpu("v100-16gb", tflops=15.7, gigabytes=16, link_gb_per_s=150.0),
        _gpu("v100-32gb", tflops=15.7, gigabytes=32, link_gb_per_s=150.0),
        # Cloud; PCIe 3.0 x16, for which no figure was found in a data sheet.
        _gpu("t4", tflops=8.1, gigabytes=16, link_gb_per_s=None),
        # 9,216 cores x 2 x 1.695 GHz = 31.2; PCIe 4.0 x16.
        _gpu("a10", tflops=31.2, gigabytes=24, link_gb_per_s=32.0),
        # NVIDIA's data sheet of the A40; PCIe 4.0 x16 (its NVLink joins pairs only: 112.5 GB/s both ways).
        _gpu("a40", tflops=37.4, gigabytes=48, link_gb_per_s=32.0),
        # NVIDIA's data sheet of the A100, SXM: NVLink of 600 GB/s both ways.
        _gpu("a100-40gb", tflops=19.5, gigabytes=40, link_gb_per_s=300.0),
        _gpu("a100-80gb", tflops=19.5, gigabytes=80, link_gb_per_s=300.0),
        # Cloud; PCIe 4.0 x16.
        _gpu("l4", tflops=30.3, gigabytes=24, link_gb_per_s=32.0),
        # NVIDIA's data sheet of the L40S.
        _gpu("l40s", tflops=91.6, gigabytes=48, link_gb_per_s=32.0),
        # Cloud; H100 SXM, NVLink of 900 GB/s both ways. The H200 is the same chip with other memory.
        _gpu("h100-80gb", tflops=67.0, gigabytes=80, link_gb_per_s=450.0),
        _gpu("h200-141gb", tflops=67.0, gigabytes=141, link_gb_per_s=450.0),
        # 10,496 cores x 2 x 1.695 GHz = 35.6 and 16,384 x 2 x 2.52 GHz = 82.6; PCIe without peer-to-peer.
        _gpu("rtx3090", tflops=35.6, gigabytes=24, link_gb_per_s=None),
        _gpu("rtx4090", tflops=82.6, gigabytes=24, link_gb_per_s=None),
    )
}
"""V100, A100, H100, H200: the SXM versions. Latencies stand in no data sheet: N/A."""

_MOST_DEVICES = 16384
_KEYS = ("name", "count", "tflops", "memory_gib", "link_gb_per_s", "link_latency_us")


def devices_of(text: str, *, count: int) -> tuple[DeviceSpec, ...]:
    """Return `count` devices from "NAME", "NAME:2,NAME:6" or a TOML file; one device stands for all.

    Raises:
        UserError: an unknown name or key, a value out of range, or another number of devices.
    """
    path = Path(text)
    found = _from_file(path) if path.suffix == ".toml" or path.is_file() else _from_names(text)
    if len(found) == 1:
        return tuple(found) * count
    if len(found) != count:
        raise UserError(
            f"{len(found)} devices are listed, and {count} are needed",
            where="--device-spec",
            hint=f"list {count} in the order of the stages, or one that stands for all",
        )
    return tuple(found)


def _from_names(text: str) -> list[DeviceSpec]:
    result: list[DeviceSpec] = []
    for part in text.split(","):
        name, _, times = part.strip().lower().partition(":")
        if name not in DEVICES:
            raise UserError(
                f'no device is called "{part.strip()}", and there is no such file',
                where="--device-spec",
                hint=f"there are {', '.join(DEVICES)}, or give a TOML file (docs/partition.md)",
            )
        if times and not (times.isascii() and times.isdigit() and 0 < int(times) <= _MOST_DEVICES):
            raise UserError(
                f'"{part.strip()}": {times} is no number of devices',
                where="--device-spec",
                hint=f"give 1 to {_MOST_DEVICES:,}",
            )
        result += [DEVICES[name]] * int(times or 1)
    return result


def _from_file(path: Path) -> list[DeviceSpec]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError:
        raise UserError("is no text in UTF-8", where=str(path), hint="give a TOML file") from None
    except ValueError as error:
        raise UserError(f"not valid TOML: {error}", where=str(path)) from None
    entries = table.pop("device", None)
    if entries is None:
        entries, table = [table], {}
    if table or not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError("must hold one device, or a list of [[device]] tables", where=str(path))
    return [spec for entry in entries for spec in _from_table(entry, where=str(path))]


def _from_table(entry: Mapping[str, Any], *, where: str) -> Sequence[DeviceSpec]:
    unknown = [key for key in entry if key not in _KEYS]
    if unknown:
        raise UserError(
            f"unknown keys {', '.join(unknown)}", where=where, hint=f"there are {', '.join(_KEYS)}"
        )
    name = str(entry.get("name", "device"))
    numbers = {key: entry[key] for key in _KEYS[1:] if key in entry}
    for key, value in numbers.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value < float("inf"):
            raise UserError(f"{key} = {value!r} is no positive number", where=where)
        if value == 0 and key != "link_latency_us":
            raise UserError(f"{key} = 0 is no device", where=where, hint="leave out what is not known")
    count = numbers.get("count", 1)
    if not isinstance(count, int) or count > _MOST_DEVICES:
        raise UserError(
            f"count = {count} is no number of devices", where=where, hint=f"give 1 to {_MOST_DEVICES:,}"
        )
    spec = replace(DEVICES.get(name.lower(), DeviceSpec(name)), name=name)
    scales = {"tflops": 1.0, "memory_gib": GIB, "link_gb_per_s": 1e9, "link_latency_us": 1e-6}
    fields = {
        "memory_gib": "memory_bytes",
        "link_gb_per_s": "link_bytes_per_s",
        "link_latency_us": "link_latency_s",
    }
    given = {fields.get(key, key): numbers[key] * scale for key, scale in scales.items() if key in numbers}
    if "memory_bytes" in given:
        given["memory_bytes"] = int(given["memory_bytes"])
    return [replace(spec, **given)] * count
