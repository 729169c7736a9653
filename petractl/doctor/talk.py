"""One process of the trial of messages: `python -m petractl.doctor.talk`, run by `messages.check_messages`.

Rank 0 leaves an answer in the folder that the environment names. What anybody says goes to a log there: the
terminal is the doctor's.
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from petractl.doctor.messages import ANSWER, LIMIT_VARIABLE
from petractl.processes import die_with_parent, end_process, reported

if TYPE_CHECKING:
    from torch import Tensor

    from petractl.engine.world import World

_ROUNDS = 5
_NUMBERS = 2**18  # 1 MiB of float32


def main() -> None:
    """Talk to the others."""
    die_with_parent()
    task = json.loads(os.environ[LIMIT_VARIABLE])
    # The kernel's alarm ends a process that hangs in a library too.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(task["timeout_s"]))
    rank, folder = int(os.environ["RANK"]), Path(task["folder"])
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    with reported(f"process {rank}", rank):
        message_s = talk(task["backend"])
        if rank == 0:
            (folder / ANSWER).write_text(json.dumps({"message_s": message_s}), encoding="utf-8")
    end_process(0)


def talk(backend: str) -> float:
    """Sum a tensor over all and send one to and fro; returns the seconds of the quickest message."""
    import torch
    import torch.distributed as dist

    from petractl.engine.world import Launch, Seat, connect, join

    launch = Launch.from_environment()
    assert launch is not None, "started by the launcher"
    size = launch.world_size
    device = torch.device("cuda", launch.local_rank) if backend == "nccl" else torch.device("cpu")
    world = join(launch, Seat(launch.rank, size), store=connect(launch), device=device, backend=backend)
    total = torch.full((1000,), float(launch.rank + 1), device=device)
    dist.all_reduce(total, group=world.pipeline)
    assert float(total.sum()) == 1000 * size * (size + 1) / 2, "the sum over all processes is wrong"
    message = torch.full((_NUMBERS,), float(launch.rank), device=device)
    message_s = min(_round_trip_s(message, world) for _ in range(_ROUNDS)) / 2 if size > 1 else 0.0
    assert float(message.sum()) == 0.0, "the message is not what was sent"
    world.close()
    return message_s


def _round_trip_s(message: "Tensor", world: "World") -> float:
    """Send rank 0's message to rank 1 and back; returns the seconds it took."""
    import torch.distributed as dist

    started = time.perf_counter()
    if world.seat.rank == 0:
        dist.send(message, 1, group=world.forward)
        dist.recv(message, 1, group=world.backward)
    else:
        dist.recv(message, 0, group=world.forward)
        dist.send(message, 0, group=world.backward)
    float(message[-1])  # a GPU has it now
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
