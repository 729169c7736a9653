"""Starts the workers of a run on this machine, and tells clearly how they ended.

torch's elastic agent starts and watches the processes, and holds the store in which they find each other. It
is asked for no restarts: whoever starts the workers again says what they go on from. Around it stands what it
lacks, see `agent`.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from petractl.errors import RunError
from petractl.processes.output import LAUNCHER_LOG, LogHandler
from petractl.processes.report import LAUNCHER_VARIABLE
from petractl.processes.safe_path import safe_path
from petractl.processes.verdict import exit_code

_ELASTIC_LOGGER = "torch.distributed.elastic"
_LOOPBACKS = ("lo", "lo0")
_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


class StopSignals:
    """Counts Ctrl-C, SIGTERM and SIGHUP: they are for the workers, who save and end."""

    def __init__(self) -> None:
        self.count = 0
        self.first_at: float | None = None

    @contextlib.contextmanager
    def counted(self) -> Iterator["StopSignals"]:
        """Count within the block; elsewhere than in the main thread they are someone else's."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else: nohup
            numbers.append(signal.SIGHUP)
        try:
            before = {number: signal.signal(number, self._count) for number in numbers}
        except ValueError:
            yield self
            return
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.first_at is None:
            self.first_at = time.monotonic()


def run_workers(
    command: Sequence[str],
    *,
    titles: Sequence[str],
    log_dir: Path,
    environment: Mapping[str, str] | None = None,
    shutdown_s: float = 10.0,
) -> int:
    """Run `command` once per title, as ranks 0, 1, ..., and wait for all of them.

    Every worker gets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as under torchrun, and
    `environment`. Rank 0 keeps the terminal. Ctrl-C, SIGTERM and SIGHUP are handed to the workers as SIGTERM;
    who has not ended `shutdown_s` seconds later, or at the third signal, is killed. Nothing outlives it.

    Returns 0, or 130 after an interruption.

    Raises:
        UserError: a worker found the user's input to be wrong.
        WorkersFailed: a worker failed. The message names the first that did, with its traceback, then the
            others.
        RunError: the workers cannot be started, or not be ended.
    """
    from petractl.processes.agent import watch_workers  # loads torch

    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix="petractl-", ignore_cleanup_errors=True) as scratch,
            _elastic_log(log_dir / LAUNCHER_LOG),
            StopSignals().counted() as signals,
        ):
            endings = watch_workers(
                command,
                titles=titles,
                environment={
                    **(environment or {}),
                    **local_network(),
                    **safe_path((environment or {}).get("PYTHONPATH")),
                    LAUNCHER_VARIABLE: str(os.getpid()),
                },
                scratch=Path(scratch),
                log_dir=log_dir,
                signals=signals,
                shutdown_s=shutdown_s,
            )
    except OSError as error:
        file = f": {error.filename}" if error.filename else ""
        raise RunError(f"the processes cannot be started: {error.strerror or error}{file}") from error
    if endings[0].exit_code < 0 and sys.stderr.isatty():
        sys.stderr.write("\033[?25h")  # whoever drew the console could not give the cursor back
    return exit_code(endings, interrupted_at=signals.first_at)


def local_network() -> dict[str, str]:
    """Return what keeps the messages of processes on this machine within it, where nobody has said otherwise.

    Without it, gloo looks up this machine's own name, and what it finds may be open to others.
    """
    found = [name for _, name in socket.if_nameindex() if name in _LOOPBACKS][:1]
    return {key: name for name in found for key in _INTERFACE_VARIABLES if key not in os.environ}


@contextlib.contextmanager
def _elastic_log(path: Path) -> Iterator[None]:
    """Keep what torch's launcher says out of the terminal: it goes to a file, made when needed."""
    logger = logging.getLogger(_ELASTIC_LOGGER)
    handler = LogHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = before
        logger.removeHandler(handler)
        handler.close()
