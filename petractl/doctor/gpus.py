"""What torch says of the GPUs, as JSON: `python -m petractl.doctor.gpus`, run by `machine.check_gpus`.

Each GPU computes something small: a build of torch may see a GPU that it has no code for.
"""

import json
import sys
import warnings
from typing import Any


def gpus() -> dict[str, Any]:
    """Return the version of CUDA that torch is built for, its GPUs, and why it finds none."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    found = []
    for index in range(torch.cuda.device_count() if usable else 0):
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        assert float((ones @ ones).sum()) == 64.0**3, f"cuda:{index} computes wrongly"
        properties = torch.cuda.get_device_properties(index)
        found.append({"name": properties.name, "memory_bytes": properties.total_memory})
    why = " ".join(str(said[-1].message).split()) if said and not found else ""
    return {"cuda": torch.version.cuda, "gpus": found, "why": why}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(gpus()) + "\n")
