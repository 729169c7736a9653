"""From a recipe to everything that trains it: the only package that sees both a recipe and the parts.

`check` finds out all that can be known before the first step, without memory for the weights, and reports
every problem at once. `build` then makes the net, the data, the stages and the pipeline from what `check`
found.
"""

from petractl.build.layout import IN_PROCESS, PROCESSES, Layout, choose_mode
from petractl.build.make import (
    Built,
    DataHere,
    build,
    build_network,
    evaluation_data,
    evaluation_placement,
    open_data_here,
    process_device,
)
from petractl.build.parts import num_threads, wire_formats
from petractl.build.plan import CheckedPlan, check

__all__ = [
    "IN_PROCESS",
    "PROCESSES",
    "Built",
    "CheckedPlan",
    "DataHere",
    "Layout",
    "build",
    "build_network",
    "check",
    "choose_mode",
    "evaluation_data",
    "evaluation_placement",
    "num_threads",
    "open_data_here",
    "process_device",
    "wire_formats",
]
