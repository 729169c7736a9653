"""How many cells run at a time, and how the cores are shared out among them."""

import os
from collections.abc import Sequence

from petractl.sweep.cells import CheckedSetting
from petractl.sweep.runner import THREADS_VARIABLE


def usable_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def automatic_jobs(allowed: Sequence[CheckedSetting]) -> int:
    """Return how many cells the cores have room for; one at a time on a GPU, which is not shared out.

    A cell takes as many threads as its recipe, or OMP_NUM_THREADS, says; where neither does, all cores.
    """
    if any(each.is_on_gpu for each in allowed):
        return 1
    most = max((each.processes * each.threads for each in allowed), default=1)
    return max(1, usable_cores() // most)


def threads_of_a_process(each: CheckedSetting, *, num_jobs: int) -> int | None:
    """Return the threads that OMP_NUM_THREADS is to give each process of a cell; None where it is set."""
    if os.environ.get(THREADS_VARIABLE, "").split(",")[0].isdigit():
        return None
    return max(1, usable_cores() // (num_jobs * each.processes))


def overload(allowed: Sequence[CheckedSetting], *, num_jobs: int) -> str:
    """Return what is wrong where the cells ask for more threads than there are cores; else ""."""
    for each in allowed:
        assert each.recipe is not None
        threads = each.recipe.engine.threads or (
            each.threads if threads_of_a_process(each, num_jobs=num_jobs) is None else 0
        )
        asked = num_jobs * each.processes * threads
        if asked > usable_cores() and num_jobs > 1:
            return (
                f"{num_jobs} cells at a time x {each.processes} processes x {threads} threads = {asked}, "
                f"but {usable_cores()} cores"
            )
    return ""
