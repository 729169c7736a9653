"""Processes that keep the other cores busy while units are timed, as the other stages will.

Processes share the memory's bandwidth, so stages that train side by side are a few percent slower than each
of them alone. A rival trains a small convolutional net until it is stopped, or its parent is gone.

    python -m petractl.planning.rival THREADS
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

_READY = b"r"
_CHANNELS, _SIDE, _SAMPLES = 64, 32, 16


@contextmanager
def rivals(count: int, *, threads: int) -> Iterator[None]:
    """Keep `count` processes of so many threads busy; returns when all of them are."""
    command = [sys.executable, "-m", "petractl.planning.rival", str(threads)]
    with ExitStack() as stack:
        started = [
            stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))
            for _ in range(count)
        ]
        for process in started:
            stack.callback(process.kill)
        for process in started:
            assert process.stdout is not None
            process.stdout.read(len(_READY))
        yield


def train_until_orphaned(threads: int) -> None:
    """Train; says when it has begun."""
    torch.set_num_threads(threads)
    parent = os.getppid()
    net = nn.Sequential(
        nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1, bias=False),
        nn.BatchNorm2d(_CHANNELS),
        nn.ReLU(),
        nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1, bias=False),
        nn.BatchNorm2d(_CHANNELS),
    ).to(memory_format=torch.channels_last)
    images = torch.randn(_SAMPLES, _CHANNELS, _SIDE, _SIDE).contiguous(memory_format=torch.channels_last)
    images.requires_grad_()
    told = False
    while os.getppid() == parent:
        net(images).square().mean().backward()
        if not told:
            os.write(sys.stdout.fileno(), _READY)
            told = True


if __name__ == "__main__":
    train_until_orphaned(int(sys.argv[1]))
