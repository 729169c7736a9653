"""The simulator against the engine with stages that sleep in place of computing (benchmarks/scaling).

All that the simulator is told is measured in plain model parallelism: how long a stage is busy with a
microbatch (its sleeps, and the engine's own work), and what a message takes on its way, the rest of a
microbatch's time divided by the number of messages. With that it predicts the other schedules.

    python benchmarks/simulate/against_engine.py scaling/scaling.json
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from petractl.planning.simulation import simulate
from petractl.planning.times import Link, StageTimes

PLAIN = "sequential"
FORWARD_PART = 0.25


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scaling", type=Path, nargs="+", help="what bench_scaling.py wrote")
    files = parser.parse_args().scaling
    records = [run for file in files for run in json.loads(file.read_text(encoding="utf-8"))["runs"]]
    groups: defaultdict[tuple[int, float], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["stages"], record["latency_s"]].append(record)
    print("| J | latency added | way of a message | schedule | simulated | engine | difference |")
    print("|---|---|---|---|---|---|---|")
    for (num_stages, latency), runs in groups.items():
        for line in compare(runs, num_stages=num_stages):
            print(f"| {num_stages} | {1e3 * latency:g} ms | {line} |")


def compare(runs: Sequence[Mapping[str, Any]], *, num_stages: int) -> list[str]:
    """Return a line for each schedule but the plain one, all of one number of stages and latency."""
    plain = [run["per_microbatch"] for run in runs if run["schedule"] == PLAIN]
    busy = [statistics.median(_busy_s(run[j]) for run in plain) for j in range(num_stages)]
    period = statistics.median(run[-1]["time_s"] for run in plain)
    way = max(0.0, (period - sum(busy)) / (2 * (num_stages - 1)))
    times = [StageTimes(FORWARD_PART * t, (1 - FORWARD_PART) * t) for t in busy]
    lines = []
    for schedule in dict.fromkeys(run["schedule"] for run in runs if run["schedule"] != PLAIN):
        found = [run["per_microbatch"][-1]["time_s"] for run in runs if run["schedule"] == schedule]
        measured = 1 / statistics.median(found)
        simulated = simulate(schedule, times, link=Link(latency_s=way)).microbatches_per_s
        off = 100 * (simulated / measured - 1)
        rates = f"{simulated:.3f}/s | {measured:.3f}/s ({1 / max(found):.3f} - {1 / min(found):.3f})"
        lines.append(f"{1e3 * way:.2f} ms | {schedule} | {rates} | {off:+.1f} %")
    return lines


def _busy_s(stage: Mapping[str, float]) -> float:
    return stage["time_s"] - stage["wait_forward_s"] - stage["wait_backward_s"]


if __name__ == "__main__":
    main()
