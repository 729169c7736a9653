"""Runs a command that ends in order when the sweep is gone: `python -m petractl.sweep.tether PID COMMAND...`

A sweep that is killed outright cannot stop its runs. So each asks the kernel for SIGTERM at that moment,
which a run takes as it takes Ctrl-C; the request outlasts the `exec` of the run (Linux only; elsewhere such
runs go on to their end). It is asked for here, not between fork and exec in a process that has threads.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Sequence

EXIT_INTERRUPTED = 130
_PR_SET_PDEATHSIG = 1


def tethered(command: Sequence[str]) -> list[str]:
    """Return the command line that runs a command bound to the life of this process."""
    return [sys.executable, "-m", "petractl.sweep.tether", str(os.getpid()), *command]


def main(arguments: Sequence[str]) -> None:
    """Bind this process to the sweep, and become the command."""
    sweep, *command = arguments
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != int(sweep):
            sys.exit(EXIT_INTERRUPTED)  # it was gone before it could be asked for
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
