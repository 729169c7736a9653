"""Throughput predicted against measured: two processes on this machine's CPU, several models and methods.

A round plans (measuring afresh, as `petractl partition --fresh` does) and then trains with `petractl bench`;
rounds alternate, so that a machine whose speed changes changes both. Every pipeline has the cuts that the
first plan chose for the first method. A round in which other processes took more than a twentieth of the
machine (/proc/stat against the time of our own) is told and run again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

from petractl.methods.family import method_spec
from petractl.models.registry import build_model
from petractl.planning.costing import Clock, cost_net
from petractl.planning.devices import DeviceSpec
from petractl.planning.plan import PipelinePlan, Setting, plan_pipeline

METHODS = ("petra", "petra/paper", "delayed:graph", "delayed:inputs", "backprop")
MOST_OF_OTHERS = 0.05
MOST_TRIES = 3
RECIPE = """[model]
name = "{model}"
width = {width}
[data]
name = "fake"
batch_size = {batch}
[method]
accumulation = {accumulation}
[partition]
cuts = [{cuts}]
[engine]
mode = "processes"
threads = 1
device = "cpu"
[tracking]
mlflow = false
"""


def planned(text: str, cuts: tuple[int, ...] | None, given: argparse.Namespace) -> PipelinePlan:
    """Plan a method, written as for `petractl bench`, with times measured now, on one thread."""
    text, _, schedule = text.partition("/")
    name, _, keep = text.partition(":")
    with torch.device("meta"):
        built = build_model(given.model, width=given.width, classes=10, stem="cifar")
    net = cost_net(
        built.units,
        built.names,
        method=method_spec(name, keep=keep),
        input_shape=(3, 32, 32),
        batch_size=given.batch,
        clock=Clock(torch.device("cpu"), use_cache=False, processes=given.stages),
    )
    setting = Setting(
        devices=(DeviceSpec("cpu"),) * given.stages,
        speeds=(1.0,) * given.stages,
        schedule=schedule or "auto",
        accumulation=given.accumulation,
        cuts=cuts,
    )
    plan = plan_pipeline(net, setting)
    assert plan is not None
    return plan


def measured(cuts: tuple[int, ...], given: argparse.Namespace) -> list[list[float]]:
    """Return the images/s that `petractl bench` finds, of every method and repeat."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.toml"
        keys = {"model": given.model, "width": given.width, "batch": given.batch}
        keys |= {"accumulation": given.accumulation, "cuts": ", ".join(map(str, cuts))}
        recipe.write_text(RECIPE.format(**keys))
        command = [sys.executable, "-m", "petractl", "bench", str(recipe), "--json"]
        command += ["--methods", ",".join(given.methods), "--repeats", str(given.repeats)]
        command += ["--microbatches", str(given.microbatches), "--warmup", "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [result["images_per_s"]["all"] for result in json.loads(done.stdout)]


def others_share(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    """Return the part of all cores that processes other than ours took between two readings."""
    seconds, busy, own = (b - a for a, b in zip(before, after, strict=True))
    return (busy - own) / (seconds * (os.cpu_count() or 1))


def reading() -> tuple[float, float, float]:
    """Return the time, the seconds that all cores were busy, and those that we and our children were."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    idle, waiting = (int(fields[n]) for n in (3, 4))
    busy = (sum(map(int, fields[:8])) - idle - waiting) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), busy, sum(os.times()[:4])


def main() -> None:
    """Write rows of a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="of training, in each round")
    parser.add_argument("--microbatches", type=int, default=4, help="timed in each repeat")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cuts: tuple[int, ...] | None = None
    rates: defaultdict[str, list[float]] = defaultdict(list)
    found: defaultdict[str, list[float]] = defaultdict(list)
    tries = 0
    while len(rates[given.methods[0]]) < given.rounds:
        tries += 1
        before, predictions = reading(), {}
        for method in given.methods:
            plan = planned(method, cuts, given)
            cuts = plan.cuts
            predictions[method] = plan.forecast.images_per_s
        assert cuts is not None
        repeats = measured(cuts, given)
        share = others_share(before, reading())
        if share > MOST_OF_OTHERS:
            sys.stderr.write(f"round {tries}: others took {100 * share:.0f} % of the machine\n")
            if tries < MOST_TRIES * given.rounds:
                continue
            sys.exit("this machine is too busy to measure")
        for method, values in zip(given.methods, repeats, strict=True):
            rates[method].append(predictions[method])
            found[method] += values
    for method in given.methods:
        rate, real = statistics.fmean(rates[method]), statistics.median(found[method])
        cells = [
            f"{given.model}, width {given.width}",
            str(given.batch),
            method,
            str(given.accumulation),
            str(list(cuts or ())),
            f"{rate:.1f} ({min(rates[method]):.1f} - {max(rates[method]):.1f})",
            f"{real:.1f} ({min(found[method]):.1f} - {max(found[method]):.1f})",
            f"{rate / real:.2f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
