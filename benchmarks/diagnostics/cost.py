"""What a diagnosed microbatch costs in time and memory: runs on fake images, with and without diagnoses.

python benchmarks/diagnostics/cost.py
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "accuracy" / "cifar10_short.toml"
MICROBATCHES, SIZE, EPOCHS = 12, 64, 6
COMMON = (
    "data.name=fake",
    f"data.steps_per_epoch={MICROBATCHES}",
    f"data.batch_size={SIZE}",
    "engine.precision=float32",
    "engine.mode=in-process",
    f"training.epochs={EPOCHS}",
    f"training.evaluate_every={EPOCHS}",
    "run.checkpoint_every=100 epochs",
)
EVERY = (0, MICROBATCHES, 1)


def main() -> None:
    """Print ms per microbatch (median and spread of the epochs after the first) and the peak memory."""
    print(
        "| diagnostics.every | ms per microbatch | least | most | peak memory, MiB |\n|---|---|---|---|---|"
    )
    for every in EVERY:
        times, memory = measure(every)
        middle, least, most = statistics.median(times), min(times), max(times)
        print(f"| {every} | {middle:.1f} | {least:.1f} | {most:.1f} | {memory / 2**20:.0f} |")


def measure(every: int) -> tuple[list[float], int]:
    """Return ms per microbatch of each epoch after the first, and the peak memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "petractl", "run", str(RECIPE), "--dir", f"{folder}/run"]
        for override in (*COMMON, f"diagnostics.every={every}"):
            command += ["--set", override]
        subprocess.run(command, check=True, capture_output=True)
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    trained = [r for r in records if r["event"] == "epoch_trained"][1:]
    (end,) = [r for r in records if r["event"] == "run_finished"]
    return [1000 * r["seconds"] / MICROBATCHES for r in trained], end["peak_memory_bytes"]


if __name__ == "__main__":
    main()
