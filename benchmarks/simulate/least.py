"""How much staleness full speed needs: `least` against `tight` and `paper` on the zoo's unbalanced stages.

Every model is cut into J stages balanced by FLOPs, and once into one stage per unit (ImageNet size, PETRA's
backward); the FLOPs are the stage times. The simulator gives each schedule's throughput as a part of the
limit, the rate of the slowest stage.

    python benchmarks/simulate/least.py
"""

import argparse
from collections.abc import Iterator, Sequence

import torch

from petractl.methods.family import keepings, method_spec
from petractl.models.registry import build_model
from petractl.models.units import is_reversible
from petractl.planning.flops import unit_costs
from petractl.planning.least import bound_s
from petractl.planning.nominal import nominal_times
from petractl.planning.simulation import simulate
from petractl.planning.stages import balanced_cuts
from petractl.planning.times import Link, StageTimes, links_between

MODELS = ("revnet18", "revnet34", "revnet50", "revnet101", "resnet18", "resnet34", "resnet50", "resnet101")
STAGES = (2, 4, 8, 10, 16)
SCHEDULES = ("tight", "paper", "least")
BATCH = 64


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.1, help="one way, in times of the slowest stage")
    latency = parser.parse_args().latency
    print("| model | J | slowest / mean | " + " | ".join(f"{s}" for s in SCHEDULES) + " | ", end="")
    print(" | ".join(f"{s}, l = {latency:g}" for s in SCHEDULES) + " |")
    print("|---|---|---|" + "---|" * 2 * len(SCHEDULES))
    for model in MODELS:
        for times in pipelines(model):
            print(row(model, times, latency=latency))


def pipelines(model: str) -> Iterator[tuple[StageTimes, ...]]:
    """Yield the stage times of a model's cuts."""
    with torch.device("meta"):
        units = build_model(model, classes=1000, stem="imagenet").units
    costs = unit_costs(units, input_shape=(3, 224, 224))
    kept = keepings(method_spec("petra"), [is_reversible(unit) for unit in units])
    for num_stages in sorted({*(count for count in STAGES if count < len(units)), len(units)}):
        cuts = balanced_cuts(costs, kept=kept, num_stages=num_stages, balance="flops")
        yield nominal_times(costs, kept=kept, cuts=cuts, batch_size=BATCH)


def row(model: str, times: Sequence[StageTimes], *, latency: float) -> str:
    """Return a line of the table: for every schedule the part of the limit, and the mean lookahead."""
    slots = [time.busy_s for time in times]
    cells = [model, str(len(times)), f"{max(slots) * len(slots) / sum(slots):.2f}"]
    for link in (Link(), Link(latency_s=latency * max(slots))):
        limit = 1.0 / bound_s(times, links_between(link, num_stages=len(times)))
        staleness = {}
        for schedule in SCHEDULES:
            result = simulate(schedule, times, link=link)
            staleness[schedule] = result.staleness_updates
            cells.append(f"{result.microbatches_per_s / limit:.3f} ({result.staleness_updates:.2f})")
            assert schedule != "least" or result.microbatches_per_s >= 0.99 * limit, (model, len(times))
        assert link.latency_s or staleness["least"] <= staleness["tight"], (model, len(times))
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
