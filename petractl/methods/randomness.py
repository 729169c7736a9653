"""Randomness inside a unit, as a function of (seed, unit, microbatch).

A recomputation must see the numbers that the forward saw (dropout), and the same run in one process or in
many must see the same. So no unit draws from a running stream: before each evaluation its generator is set to
a seed that is a hash of where the evaluation stands in the run.
"""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on their order."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_device(seed: int, *, device: torch.device) -> None:
    """Set the default generator of the CPU, and of the device if it is another, without a synchronisation."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
