"""Threads beside the training compute with one thread each.

OpenMP gives every thread that computes in parallel a pool of its own, and with more of them than cores its
waits no longer spin: the training thread, with a hundred small operations per microbatch, then takes twice as
long (measured: 15 ms to 33 ms, two cores), for as long as the other thread lives.
"""


def compute_alone() -> None:
    """Have the calling thread compute without others; how many others use stays as it is."""
    import torch

    torch.set_num_threads(1)
