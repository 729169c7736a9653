"""How much staleness full speed needs: `least` against `tight` and `paper` on the zoo's unbalanced stages.

Every model is cut into J stages made even, and once into one stage per unit (ImageNet size, microbatches of
64, PETRA). The units' times are measured here, or follow from FLOPs (--flops). The simulator gives each
schedule's throughput as a part of the limit, the rate of the slowest stage.

"Fastest pair": the time of the two neighbours that are fastest together, over the slowest stage's. Above 1
every boundary of the pipeline needs a microbatch of lookahead, and `tight` is the least there is.

    python benchmarks/simulate/least.py
    python benchmarks/simulate/least.py --flops
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from petractl.methods.family import method_spec
from petractl.models.registry import build_model
from petractl.planning.costing import Clock, cost_net
from petractl.planning.least import bound_s
from petractl.planning.net import Net
from petractl.planning.optimal import optimal_cuts
from petractl.planning.simulation import simulate
from petractl.planning.times import Link, StageTimes, links_between

MODELS = ("revnet18", "revnet34", "revnet50", "revnet101", "resnet18", "resnet34", "resnet50", "resnet101")
STAGES = (2, 4, 8, 10, 16)
SCHEDULES = ("tight", "paper", "least")
BATCH = 64


def main() -> None:
    """Print the table."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    print("| model | J | slowest / mean | fastest pair | " + " | ".join(f"{s}" for s in SCHEDULES), end=" | ")
    print(" | ".join(f"{s}, l = {options.latency:g}" for s in SCHEDULES) + " |")
    print("|---|---|---|---|" + "---|" * 2 * len(SCHEDULES))
    counts: Counter[str] = Counter()
    for model in options.models:
        for times in pipelines(cost(model, flops=options.flops), accumulation=options.accumulation):
            cells, verdict = row(times, latency=options.latency, accumulation=options.accumulation)
            counts[verdict] += 1
            print("| " + " | ".join([model, *cells]) + " |", flush=True)
    print(f"\nstaleness of `least` without latency: {dict(counts)}")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--flops", action="store_true", help="times from FLOPs, measure nothing")
    parser.add_argument("--threads", type=int, default=1, help="of the measurement; 0 = as torch")
    parser.add_argument("--latency", type=float, default=0.1, help="one way, in times of the slowest stage")
    parser.add_argument("--accumulation", type=int, default=1, help="microbatches per update")
    return parser.parse_args()


def cost(model: str, *, flops: bool) -> Net:
    """Return what the model's units cost."""
    with torch.device("meta"):
        built = build_model(model, classes=1000, stem="imagenet")
    return cost_net(
        built.units,
        built.names,
        method=method_spec("petra"),
        input_shape=(3, 224, 224),
        batch_size=BATCH,
        clock=Clock() if flops else Clock(torch.device("cpu")),
    )


def pipelines(net: Net, *, accumulation: int) -> Iterator[tuple[StageTimes, ...]]:
    """Yield the stage times of a net's cuts."""
    units = net.unit_times_s(accumulation=accumulation, speeds=(1.0,))
    for num_stages in sorted({*(count for count in STAGES if count < net.num_units), net.num_units}):
        cuts = optimal_cuts(units, num_stages=num_stages)
        assert cuts is not None, "nothing limits them"
        yield net.stage_times(cuts, speeds=(1.0,) * num_stages, accumulation=accumulation)


def row(times: Sequence[StageTimes], *, latency: float, accumulation: int) -> tuple[list[str], str]:
    """Return the cells of a line, and how `least` compares with `tight`.

    A cell of a schedule is its part of the limit and its mean lookahead in microbatches.
    """
    slots = [time.busy_s for time in times]
    pair = min(a + b for a, b in pairwise(slots)) / max(slots)
    cells = [str(len(times)), f"{max(slots) * len(slots) / sum(slots):.2f}", f"{pair:.3f}"]
    verdict = ""
    for link in (Link(), Link(latency_s=latency * max(slots))):
        limit = 1.0 / bound_s(times, links_between(link, num_stages=len(times)), accumulation=accumulation)
        ahead = {}
        for schedule in SCHEDULES:
            result = simulate(schedule, times, link=link, accumulation=accumulation)
            ahead[schedule] = result.staleness_updates * accumulation
            cells.append(f"{result.microbatches_per_s / limit:.3f} ({ahead[schedule]:.2f})")
            assert schedule != "least" or result.microbatches_per_s >= 0.99 * limit, cells
        if not link.latency_s:
            verdict = "below tight" if ahead["least"] < ahead["tight"] else "equal to tight"
            assert ahead["least"] <= ahead["tight"], cells
            assert pair <= 1.0 or ahead["least"] >= ahead["tight"], cells
    return cells, verdict


if __name__ == "__main__":
    main()
