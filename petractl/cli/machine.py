"""The devices that `partition` and `simulate` plan for: those at hand, or those of a `--device-spec`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from petractl.errors import UserError

if TYPE_CHECKING:
    import torch

    from petractl.planning.devices import DeviceSpec

_GIB = 2**30
_TIB = 2**40


@dataclass(frozen=True, slots=True)
class Machine:
    """One device for each stage of a pipeline, in order, and how fast each is beside what times are of."""

    devices: "tuple[DeviceSpec, ...]"
    speeds: tuple[float, ...]
    by_flops: bool
    """Whether times follow from FLOPs; else they are measured here."""
    knows_tflops: bool = False

    @property
    def holds_messages(self) -> bool:
        """Whether messages wait in the same memory that stages compute in."""
        return self.devices[0].name == "cpu"

    def clock(self, said: str) -> str:
        """Return where times are from; `said` is what the profile says of itself."""
        if self.by_flops and self.knows_tflops:
            return "FLOPs at the TFLOP/s given for the devices, as if a net reached them"
        return said


def machine_of(
    count: int, *, device_spec: str, flops: bool, device: str = "auto", memory_gib: float = 0.0
) -> Machine:
    """Return `count` devices; `device` is the one at hand, which is looked at where nothing else is named.

    Raises:
        UserError: devices that are unknown, not as many as stages, or half of whose TFLOP/s are unknown.
    """
    from petractl.planning.devices import NOMINAL, DeviceSpec, devices_of

    by_flops = flops
    if device_spec:
        devices = devices_of(device_spec, count=count)
        by_flops = flops or any(spec.tflops is not None for spec in devices)
    elif flops:
        devices = (DeviceSpec(NOMINAL),) * count
    else:
        devices = (device_here(device),) * count
    if memory_gib:
        devices = tuple(replace(spec, memory_bytes=int(memory_gib * _GIB)) for spec in devices)
    return Machine(devices, _speeds(devices, by_flops=by_flops), by_flops, devices[0].tflops is not None)


def _speeds(devices: "Sequence[DeviceSpec]", *, by_flops: bool) -> tuple[float, ...]:
    unknown = [spec.name for spec in devices if spec.tflops is None]
    if by_flops and unknown and len(unknown) < len(devices):
        raise UserError(
            f"no TFLOP/s are known of {unknown[0]}",
            where="--device-spec",
            hint="give tflops in a TOML file (docs/partition.md)",
        )
    return tuple((spec.tflops or 1.0) if by_flops else 1.0 for spec in devices)


def device_here(name: str) -> "DeviceSpec":
    """Return the device at hand; nothing limits the memory of a CPU."""
    import torch

    from petractl.planning.devices import DeviceSpec
    from petractl.planning.profile import device_name

    device = torch_device(name)
    if device.type != "cuda":
        return DeviceSpec("cpu")
    memory = torch.cuda.get_device_properties(device).total_memory
    return DeviceSpec(device_name(device), memory_bytes=int(memory))


def torch_device(name: str) -> "torch.device":
    """Return where to measure.

    Raises:
        UserError: a device that is not there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(f'"{name}" is no device', where="--device", hint='"auto", "cpu" or "cuda"')
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine has no usable GPU", where="--device", hint='use "cpu", or --flops')
    return torch.device(name)


def threads_of(processes: int) -> int:
    """Return the CPU threads that `run` would give each of so many processes on this machine."""
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if given.isdigit() and int(given) > 0:
        return int(given)
    return max(1, len(os.sched_getaffinity(0)) // processes)


def side_by_side(processes: int, *, threads: int) -> int:
    """Return how many of the processes this machine's cores can run at once."""
    return max(1, min(processes, len(os.sched_getaffinity(0)) // threads))


def bytes_in_words(count: float) -> str:
    """Return a number of bytes in the unit that suits it."""
    for size, unit in ((_TIB, "TiB"), (_GIB, "GiB")):
        if count >= 0.1 * size:
            return f"{count / size:,.2f} {unit}"
    return f"{count / 2**20:,.1f} MiB"
