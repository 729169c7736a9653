"""Whether processes of this machine can talk to each other, as those of a run do.

Two of them are started by the launcher of `petractl run`, join as stages do, and exchange what a run does: a
message from one to the other, and a sum over both. NCCL wants a GPU for each; where there is one GPU, one
process tries what it can alone. Each process ends by itself after a time, however it hangs.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from petractl.doctor.check import Check, failure, ok
from petractl.errors import RunError, UserError

LIMIT_VARIABLE = "PETRACTL_DOCTOR"
ANSWER = "answer.json"
TIMEOUT_S = 60
_TALK = "petractl.doctor.talk"
_HINTS = {
    "gloo": "processes of this machine must reach each other at 127.0.0.1: look at firewall, sandbox and "
    'GLOO_SOCKET_IFNAME; runs of one process need none of it (engine.mode = "in-process")',
    "nccl": 'look at NCCL_* variables and the driver; engine.backend = "gloo" does without NCCL',
}


def check_messages(
    backend: str, *, processes: int = 2, timeout_s: int = TIMEOUT_S, module: str = _TALK
) -> Check:
    """Have processes talk over "gloo" or "nccl", for `timeout_s` seconds at most.

    `module` is what each runs.
    """
    from petractl.processes import run_workers

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="petractl-doctor-") as scratch:
        task = {"backend": backend, "timeout_s": timeout_s, "folder": scratch}
        try:
            code = run_workers(
                [sys.executable, "-m", module],
                titles=[f"process {rank}" for rank in range(processes)],
                log_dir=Path(scratch) / "logs",
                environment={LIMIT_VARIABLE: json.dumps(task)},
            )
            if code:
                raise KeyboardInterrupt
            answer = json.loads((Path(scratch) / ANSWER).read_text(encoding="utf-8"))
        except (UserError, RunError, OSError, ValueError) as error:
            words = str(error).splitlines()[0] or type(error).__name__
            if time.monotonic() - started >= timeout_s:
                words = f"no answer within {timeout_s} s"
            return failure(backend, words, _HINTS[backend])
    return ok(backend, _in_words(backend, processes, answer["message_s"]))


def _in_words(backend: str, processes: int, message_s: float) -> str:
    if processes == 1:
        return f"{backend} works on the GPU; between two it could not be tried, with one GPU here"
    return f"2 processes summed a tensor and exchanged messages, 1 MiB in {1000 * message_s:.2f} ms"
