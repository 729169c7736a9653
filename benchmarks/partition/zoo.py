"""Every model of the zoo on 2, 4, 8 and 16 devices: the slowest stage over the mean, ours and others' rules.

Writes a Markdown table to stdout. FLOPs, so the same on every machine.
"""

import argparse

import torch
from rules import bisection, block_partition

from petractl.methods.family import keepings, method_spec
from petractl.models.registry import build_model, list_models
from petractl.models.units import is_reversible
from petractl.planning.flops import unit_costs
from petractl.planning.net import times_by_flops
from petractl.planning.optimal import optimal_cuts, stage_times
from petractl.planning.partition import partition_uniform


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4, 8, 16])
    wanted = parser.parse_args().devices
    print(
        "| model | devices | slowest / mean | torchgpipe's rule | DeepSpeed's rule | equal numbers of units |"
    )
    print("|---|---|---|---|---|---|")
    for name in list_models():
        with torch.device("meta"):
            units = build_model(name, classes=1000, stem="imagenet").units
        costs = unit_costs(units, input_shape=(3, 224, 224))
        kept = keepings(method_spec("petra"), [is_reversible(unit) for unit in units])
        times = [t.forward_s + t.backward_s for t in times_by_flops(costs, kept, batch_size=64)]
        for stages in wanted:
            if stages > len(units):
                print(f"| {name} | {stages} | - ({len(units)} units) | | | |")
                continue
            cuts = optimal_cuts(times, num_stages=stages)
            assert cuts is not None
            mean = sum(times) / stages
            found = [
                max(stage_times(times, cuts)),
                block_partition(times, stages),
                bisection(times, stages),
                max(stage_times(times, partition_uniform(len(times), stages))),
            ]
            print(f"| {name} | {stages} | " + " | ".join(f"{value / mean:.2f}" for value in found) + " |")


if __name__ == "__main__":
    main()
