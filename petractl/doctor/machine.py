"""Python, torch and its GPUs.

GPUs are asked in a process of their own: a driver that is broken may hang, and one that is too old for this
build of torch shows only when something is computed.
"""

import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from petractl.doctor.check import Check, failure, ok, warning
from petractl.doctor.child import NoAnswerError, ask

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 9)
_GPUS_TIMEOUT_S = 60.0
_NVIDIA_DEVICE = Path("/dev/nvidiactl")
_NVIDIA_VERSION = Path("/proc/driver/nvidia/version")


def check_python(version: tuple[int, int, int] | None = None, system: str | None = None) -> Check:
    """Look at Python and the operating system; by default those that run."""
    found, system = version or sys.version_info[:3], system or platform.system()
    name = f"{'.'.join(map(str, found))} on {system}"
    if found[:2] < OLDEST_PYTHON:
        return failure("Python", name, f"install Python {'.'.join(map(str, OLDEST_PYTHON))} or later")
    if system != "Linux":
        return warning("Python", name, "petractl is tested on Linux only: processes and signals may differ")
    return ok("Python", name)


def check_torch() -> Check:
    """Look at torch: whether it can be imported, and is new enough."""
    try:
        import torch
        import torchvision  # noqa: F401 (built for another torch, it fails here)
    except Exception as error:
        what = " ".join(str(error).split()) or type(error).__name__
        return failure("torch", f"cannot be imported: {what}", "pip install --force-reinstall petractl")
    return judge_torch(torch.__version__, _version("torchvision"), threads=torch.get_num_threads())


def judge_torch(version: str, torchvision: str, *, threads: int) -> Check:
    """Return what there is to say of these versions."""
    what = f"{version}, torchvision {torchvision}, {threads} thread{'s' if threads > 1 else ''}"
    parts = [int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit()]
    if tuple(parts) < OLDEST_TORCH:
        return failure("torch", what, f"pip install 'torch>={'.'.join(map(str, OLDEST_TORCH))}'")
    return ok("torch", what)


def check_gpus() -> tuple[Check, int]:
    """Look at the GPUs; returns how many can be used too."""
    try:
        answer = ask("petractl.doctor.gpus", {}, timeout_s=_GPUS_TIMEOUT_S)
    except NoAnswerError as error:
        hint = "look at the driver with nvidia-smi; without the GPU: --set engine.device=cpu"
        return failure("CUDA", f"torch cannot use the GPU: {error}", hint), 0
    return judge_gpus(answer, has_driver=_NVIDIA_DEVICE.exists(), driver=_driver()), len(answer["gpus"])


def judge_gpus(answer: Mapping[str, Any], *, has_driver: bool, driver: str) -> Check:
    """Return what there is to say of what torch said of the GPUs."""
    gpus = answer["gpus"]
    if gpus:
        names = ", ".join(f"{gpu['name']} ({gpu['memory_bytes'] / 2**30:.0f} GiB)" for gpu in gpus)
        count = f"{len(gpus)} GPU{'s' if len(gpus) > 1 else ''}"
        return ok("CUDA", f"{count}: {names}; CUDA {answer['cuda']}, driver {driver or 'unknown'}")
    if not has_driver:
        return ok("CUDA", "no GPU: training runs on the CPU")
    if answer["cuda"] is None:
        hint = "for the GPU, install a build of torch for CUDA (pytorch.org says which)"
        return warning("CUDA", "there is a GPU, but this build of torch is for CPUs only", hint)
    why = answer["why"] or "torch finds none"
    hint = (
        f"the driver ({driver or 'version unknown'}) must be new enough for CUDA {answer['cuda']}, and "
        "CUDA_VISIBLE_DEVICES must not hide the GPU"
    )
    return warning("CUDA", f"there is a GPU driver, but no GPU can be used: {why}", hint)


def _driver() -> str:
    """Return the version of NVIDIA's driver, "" where there is none."""
    try:
        words = _NVIDIA_VERSION.read_text(encoding="utf-8").splitlines()[0].split()
    except (OSError, IndexError):
        return ""
    return next((word for word in words if word[0].isdigit() and "." in word), "")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"
