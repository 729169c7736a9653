"""How the engine scales: stages that sleep in place of computing, real processes and real messages.

Every stage is a process of its own; its forward and backward are sleeps of a given time, so that tens of
"devices" fit on a machine of two cores, and messages of 64 KiB go through gloo. What keeps the throughput
under one microbatch per forward + backward is then the engine, and nothing else.

One launch per number of stages runs all latencies and schedules, in turn, as often as `--repeats` says.

    python benchmarks/scaling/bench_scaling.py --out /tmp/scaling
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from emulated import RESULTS, Settings
from scaling_report import plot, summarise, table

from petractl.processes import run_workers
from petractl.tracking.environment import environment

WORKER = Path(__file__).with_name("emulated.py")


def main() -> None:
    """Measure; write `scaling.json`, `scaling.md` and `scaling.png`; print the table."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        forward_s=options.forward_ms / 1e3,
        backward_s=options.backward_ms / 1e3,
        message_bytes=options.message_kib * 1024,
        latencies_s=tuple(ms / 1e3 for ms in options.latency_ms),
        schedules=tuple(options.schedules),
        repeats=options.repeats,
        microbatches=options.microbatches,
    )
    records: list[dict[str, Any]] = []
    load = os.getloadavg()[0]
    started = datetime.now(UTC)
    for num_stages in options.stages:
        records += launch(num_stages, settings)
        result = {
            "started": started.isoformat(timespec="seconds"),
            "load_before": load,
            "environment": environment(),
            "settings": asdict(settings),
            "runs": records,
        }
        (options.out / "scaling.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    rows = summarise(records, settings)
    text = table(rows)
    (options.out / "scaling.md").write_text(text, encoding="utf-8")
    plot(rows, options.out / "scaling.png", settings=settings)
    print(text, end="")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--schedules", nargs="+", default=["tight", "paper", "sequential"])
    parser.add_argument("--latency-ms", type=float, nargs="+", default=[0.0, 10.0], help="added to a message")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--microbatches", type=int, default=50, help="measured, when the pipe is full")
    parser.add_argument("--forward-ms", type=float, default=20.0)
    parser.add_argument("--backward-ms", type=float, default=60.0)
    parser.add_argument("--message-kib", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    return parser.parse_args()


def launch(num_stages: int, settings: Settings) -> list[dict[str, Any]]:
    """Run all that is to be measured with this number of stages; return a record for each run."""
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        command: Sequence[str] = [sys.executable, str(WORKER), json.dumps(asdict(settings)), folder]
        run_workers(
            command,
            titles=[f"stage {place}" for place in range(num_stages)],
            log_dir=Path(folder) / "logs",
            environment={"OMP_NUM_THREADS": "1"},
        )
        lines = (Path(folder) / RESULTS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


if __name__ == "__main__":
    main()
