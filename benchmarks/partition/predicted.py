"""Predicted against measured: two processes on this machine's CPU, several models and methods.

The plan's cuts are given to `petractl bench`, which trains in processes and watches the memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from petractl.methods.family import method_spec
from petractl.models.registry import build_model
from petractl.planning.costing import Clock, cost_net
from petractl.planning.devices import DeviceSpec
from petractl.planning.plan import PipelinePlan, Setting, plan_pipeline

METHODS = ("petra", "delayed:inputs", "delayed:graph", "backprop")
RECIPE = """[model]
name = "{model}"
width = {width}
[data]
name = "fake"
batch_size = {batch}
[method]
[partition]
cuts = [{cuts}]
[engine]
mode = "processes"
threads = 1
device = "cpu"
[tracking]
mlflow = false
"""


def planned(model: str, method: str, *, width: int, batch: int, stages: int) -> PipelinePlan:
    """Plan with times measured now, on one thread."""
    name, _, keep = method.partition(":")
    with torch.device("meta"):
        built = build_model(model, width=width, classes=10, stem="cifar")
    net = cost_net(
        built.units,
        built.names,
        method=method_spec(name, keep=keep),
        input_shape=(3, 32, 32),
        batch_size=batch,
        clock=Clock(torch.device("cpu"), use_cache=False),
    )
    devices = (DeviceSpec("cpu"),) * stages
    plan = plan_pipeline(net, Setting(devices=devices, speeds=(1.0,) * stages, schedule="auto"))
    assert plan is not None
    return plan


def measured(model: str, method: str, plan: PipelinePlan, *, width: int, batch: int, repeats: int) -> dict:
    """Run `petractl bench` with the plan's cuts."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.toml"
        cuts = ", ".join(map(str, plan.cuts))
        recipe.write_text(RECIPE.format(model=model, width=width, batch=batch, cuts=cuts))
        command = [sys.executable, "-m", "petractl", "bench", str(recipe), "--methods", method, "--json"]
        command += ["--repeats", str(repeats), "--microbatches", "8", "--warmup", "2"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict = json.loads(done.stdout)[0]
    return result


def main() -> None:
    """Write a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["revnet18", "resnet18", "revnet50"])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| model | method | cuts | images/s predicted | measured | ratio | MiB predicted | measured | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for model in given.models:
        for method in given.methods:
            plan = planned(model, method, width=given.width, batch=given.batch, stages=given.stages)
            run = measured(model, method, plan, width=given.width, batch=given.batch, repeats=given.repeats)
            rate, real = plan.forecast.images_per_s, statistics.median(run["images_per_s"]["all"])
            # The profiler sees the training thread alone: not the buffers of what is received, nor the data.
            sizes = [int(s.memory.total - s.memory.received - s.memory.data) / 2**20 for s in plan.stages]
            peaks = [process["peak_memory_bytes"] / 2**20 for process in run["processes"]]
            ratios = [a / b for a, b in zip(sizes, peaks, strict=True)]
            cells = [
                model,
                method,
                str(list(plan.cuts)),
                f"{rate:.1f}",
                f"{real:.1f}",
                f"{rate / real:.2f}",
                " / ".join(f"{size:.0f}" for size in sizes),
                " / ".join(f"{size:.0f}" for size in peaks),
                " / ".join(f"{ratio:.2f}" for ratio in ratios),
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
