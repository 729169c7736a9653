"""Runs the settings of the short CIFAR-10 race and writes their table and plot.

Every cell is one `petractl run` of `cifar10_short.toml` with a few `--set`; a cell whose journal says that it
finished is not run again, so the script can be stopped and started.

    python benchmarks/accuracy/compare.py --shards data/cifar10 --out runs/accuracy --jobs 2
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
BACKPROP = ("method.name=backprop", "partition.stages=1")
SETTINGS: dict[str, tuple[str, ...]] = {
    "bp64": BACKPROP,
    "bp128": (*BACKPROP, "data.batch_size=128"),
    "tight_k1": (),
    "tight_k2": ("method.accumulation=2",),
    "paper_k1": ("engine.schedule=paper",),
    "paper_k2": ("engine.schedule=paper", "method.accumulation=2"),
    # What closes the gap: exact gradients as late, the rate, the warm-up, momentum, fewer stages.
    "graph_k1": ("method.name=delayed",),
    "tight_k1_lr05": ("optimizer.lr=0.05",),
    "tight_k2_warm2": ("method.accumulation=2", "training.warmup_epochs=2"),
    "tight_k2_m05": ("method.accumulation=2", "optimizer.momentum=0.5", "optimizer.lr=0.5"),
    "tight_k1_stages5": ("partition.stages=5",),
    "tight_k2_stages5": ("method.accumulation=2", "partition.stages=5"),
}
MAIN = ("bp64", "bp128", "tight_k1", "tight_k2", "paper_k1", "paper_k2")
SEEDS = dict.fromkeys(SETTINGS, (0,)) | dict.fromkeys(("bp64", "bp128", "tight_k2"), (0, 1, 2))


def main() -> None:
    """Run what is missing, then print the table and draw the plot."""
    options = parse()
    cells = list(wanted(options))
    if not options.collect:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda cell: run_cell(options, *cell), cells))
    curves = {f"{name}_s{seed}": accuracies(options.out / f"{name}_s{seed}") for name, seed, _ in cells}
    print(table(curves))
    draw(curves, MAIN, HERE / "accuracy.png")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--shards", type=Path, required=True, help="folder of cifar10-{train,test}-NN.tar[.gz]"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--collect", action="store_true", help="run nothing, only collect")
    return parser.parse_args()


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """Yield (setting, seed, overrides)."""
    for name, overrides in SETTINGS.items():
        for seed in SEEDS[name]:
            yield name, seed, overrides


def run_cell(options: argparse.Namespace, name: str, seed: int, overrides: tuple[str, ...]) -> None:
    """Run one cell unless it is done."""
    folder = options.out / f"{name}_s{seed}"
    if len(accuracies(folder)) == epochs(folder):
        return
    train = [str(path) for n in (0, 1) for path in sorted(options.shards.glob(f"cifar10-train-0{n}.tar*"))]
    val = next(iter(sorted(options.shards.glob("cifar10-test-00.tar*"))))
    sets = [f"data.train={json.dumps(train)}", f"data.val={val}", f"run.seed={seed}", *overrides]
    command = [sys.executable, "-m", "petractl"]
    if (folder / "resolved.toml").exists():
        command += ["resume", str(folder)]
    else:
        command += ["run", str(HERE / "cifar10_short.toml"), "--dir", str(folder)]
        command += [part for text in sets for part in ("--set", text)]
    subprocess.run(command, check=True)


def records(folder: Path) -> list[dict[str, object]]:
    """Return the journal's records."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def epochs(folder: Path) -> int:
    """Return how many epochs the run was planned for, -1 if it never began."""
    plans = [r["epochs"] for r in records(folder) if r["event"] == "plan_made"]
    return int(str(plans[-1])) if plans else -1


def accuracies(folder: Path) -> list[float]:
    """Return the test accuracy after each epoch, percent."""
    found = {r["epoch"]: r["top1"] for r in records(folder) if r["event"] == "evaluated"}
    return [float(str(found[epoch])) for epoch in sorted(found, key=lambda epoch: int(str(epoch)))]


def table(curves: dict[str, list[float]]) -> str:
    """Return a Markdown table: a row per setting, mean over its seeds."""
    most = max(map(len, curves.values()), default=0)
    lines = ["| setting | seeds | " + " | ".join(f"epoch {n + 1}" for n in range(most)) + " | ± |"]
    lines.append("|---" * (most + 3) + "|")
    for name in SETTINGS:
        rows = [c for key, c in curves.items() if key.rpartition("_s")[0] == name and len(c) == most]
        if rows:
            means = " | ".join(f"{statistics.mean(column):.1f}" for column in zip(*rows, strict=True))
            spread = f"{statistics.stdev(row[-1] for row in rows):.1f}" if len(rows) > 1 else ""
            lines.append(f"| {name} | {len(rows)} | {means} | {spread} |")
    return "\n".join(lines)


def draw(curves: dict[str, list[float]], settings: Sequence[str], path: Path) -> None:
    """Draw the mean accuracy per epoch of these settings."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), dpi=120)
    colours = plt.get_cmap("tab10").colors
    ends: list[tuple[float, str, object]] = []
    means: list[float] = []
    for index, name in enumerate(settings):
        rows = [c for key, c in curves.items() if key.rpartition("_s")[0] == name and c]
        if not rows:
            continue
        means = [statistics.mean(column) for column in zip(*rows, strict=False)]
        style = "-" if name.startswith("bp") else "--" if "paper" in name else "-."
        axes.plot(range(1, len(means) + 1), means, style, marker="o", color=colours[index % 10], label=name)
        ends.append((means[-1], f"{name} {means[-1]:.1f}", colours[index % 10]))
    height = -1e9
    for value, text, colour in sorted(ends):
        height = max(value, height + 2.2)
        axes.annotate(text, (len(means), value), (len(means) + 0.15, height), color=colour, va="center")
    axes.set(xlabel="epoch", ylabel="test top-1, %", title="RevNet-18, width 16, 20,000 CIFAR-10 images")
    axes.set_xlim(0.8, len(means) + 0.9)
    axes.set_xticks(range(1, len(means) + 1))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
