"""What a run ran on, for `environment.json`: enough to explain a number or to repeat it, and nothing private.

Machine, versions, commit and command line; no host name, no user, no environment variables, and no
credentials in the command line.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from petractl import __version__
from petractl.tracking.masking import mask_arguments

_PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "mlflow",
    "webdataset",
    "safetensors",
    "scikit-learn",
    "pillow",
    "pydantic",
    "typer",
    "rich",
    "matplotlib",
)
_GIT_TIMEOUT_S = 5.0


def environment(
    *, arguments: Sequence[str] | None = None, directory: Path | None = None
) -> dict[str, object]:
    """Return what the run runs on, ready for JSON; what cannot be found out is null.

    `arguments` is the command line (this process's if None), `directory` the folder whose git commit is
    told (the working directory if None). Memory is in bytes. Imports torch.
    """
    return {
        "petractl": __version__,
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "usable_cores": _usable_cores()},
        "memory_bytes": _memory_bytes(),
        "torch": _torch_facts(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git": _git(directory or Path.cwd()),
        "command": mask_arguments(sys.argv if arguments is None else arguments),
    }


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or None


def _usable_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _torch_facts() -> dict[str, object]:
    import torch

    cudnn: Any = torch.backends.cudnn
    found = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    properties = [torch.cuda.get_device_properties(i) for i in found]
    return {
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version() if properties else None,
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in properties],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(directory: Path) -> dict[str, object] | None:
    """Return commit and whether tracked files differ from it; None outside of git, or without git."""
    commit = _git_output(directory, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    changes = _git_output(directory, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": bool(changes) if changes is not None else None}


def _git_output(directory: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
