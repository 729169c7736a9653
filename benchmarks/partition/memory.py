"""Peak memory predicted against measured: two processes on this machine's CPU.

Models x methods x k. Measured is what the profiler of `petractl bench` sees: the tensors of the training
thread. Buffers of received messages are made by other threads, and the images were there before: both are
left out of the prediction.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from petractl.engine.schedule import lookaheads
from petractl.methods.family import keepings, method_spec
from petractl.models.registry import build_model
from petractl.models.units import is_reversible
from petractl.planning.footprint import trace_footprints
from petractl.planning.memory import MemoryModel

PLAIN = (
    "petra",
    "delayed:graph",
    "delayed:inputs",
    "delayed:inputs+parameters",
    "backprop",
)
REVERSIBLE = (*PLAIN, "petra/paper", "delayed:parameters", "reversible")
RECIPE = """[model]
name = "{model}"
width = {width}
[data]
name = "fake"
batch_size = {batch}
[method]
accumulation = {accumulation}
[partition]
cuts = [{cut}]
[engine]
mode = "processes"
threads = 1
device = "cpu"
precision = "{precision}"
wire_dtype = "{wire_dtype}"
[tracking]
mlflow = false
"""


def predicted(model: str, method: str, cut: int, accumulation: int, given: argparse.Namespace) -> list[int]:
    """Return the bytes of both stages."""
    text, _, schedule = method.partition("/")
    name, _, keep = text.partition(":")
    spec = method_spec(name, keep=keep)
    with torch.device("meta"):
        units = build_model(model, width=given.width, classes=10, stem="cifar").units
    kept = keepings(spec, [is_reversible(unit) for unit in units])
    footprints = trace_footprints(
        units,
        kept,
        input_shape=(3, 32, 32),
        samples=given.batch,
        autocast_dtype=torch.bfloat16 if given.precision == "bfloat16" else None,
    )
    found = MemoryModel(
        footprints,
        samples=given.batch,
        accumulation=accumulation,
        number_formats=(given.wire_dtype, given.wire_dtype),
    )
    wanted = schedule or ("sequential" if spec.locked else "tight")
    stages = found.stages((cut,), lookahead=lookaheads(wanted, num_stages=2))
    return [int(stage.total - stage.received - stage.data) for stage in stages]


def measured(
    model: str, methods: tuple[str, ...], cut: int, accumulation: int, given: argparse.Namespace
) -> list[list[int]]:
    """Return what `petractl bench` finds, of every method and process."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.toml"
        keys = {name: getattr(given, name) for name in ("width", "batch", "precision", "wire_dtype")}
        recipe.write_text(RECIPE.format(model=model, cut=cut, accumulation=accumulation, **keys))
        command = [sys.executable, "-m", "petractl", "bench", str(recipe), "--methods", ",".join(methods)]
        command += ["--repeats", "1", "--microbatches", "1", "--warmup", "1", "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [[p["peak_memory_bytes"] for p in result["processes"]] for result in json.loads(done.stdout)]


def main() -> None:
    """Write rows of a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--wire-dtype", default="float32")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for model in given.models:
        with torch.device("meta"):
            units = build_model(model, width=given.width, classes=10, stem="cifar").units
        methods = REVERSIBLE if any(map(is_reversible, units)) else PLAIN
        cut = len(units) // 2
        for accumulation in given.accumulation:
            found = measured(model, methods, cut, accumulation, given)
            for method, peaks in zip(methods, found, strict=True):
                sizes = predicted(model, method, cut, accumulation, given)
                cells = [model, method, str(accumulation), given.precision, given.wire_dtype]
                cells += [" / ".join(f"{size / 2**20:.1f}" for size in each) for each in (sizes, peaks)]
                cells.append(" / ".join(f"{a / b:.2f}" for a, b in zip(sizes, peaks, strict=True)))
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
