"""Worker processes on this machine: how they are started, how they report, how their end is told.

The launching side is `run_workers`; everything else is for the worker. Importing this package loads no torch:
a worker can bind its life to its parent's, and send its output to its log, before it loads anything heavy.
"""

from petractl.processes.launcher import local_network, run_workers
from petractl.processes.output import log_name, redirect_output
from petractl.processes.report import (
    die_with_launcher,
    die_with_parent,
    end_process,
    is_child_of_petractl,
    kind_of,
    reported,
)
from petractl.processes.verdict import WorkersFailed

__all__ = [
    "WorkersFailed",
    "die_with_launcher",
    "die_with_parent",
    "end_process",
    "is_child_of_petractl",
    "kind_of",
    "local_network",
    "log_name",
    "redirect_output",
    "reported",
    "run_workers",
]
