"""Is PETRA's gradient closer to the end-to-end one than a plain delayed gradient? Runs, table and plot.

Every cell is one `petractl run` of the short CIFAR-10 race beside `../accuracy`, with diagnoses; a cell whose
journal says that it finished is not run again, so that the script can be stopped and started.

    python benchmarks/diagnostics/closeness.py --shards data/cifar10 --out runs/closeness --jobs 2
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
RECIPE = HERE.parent / "accuracy" / "cifar10_short.toml"
SETTINGS: dict[str, tuple[str, ...]] = {
    "petra": (),
    "delayed": ("method.name=delayed",),
    "inputs": ("method.name=delayed", "method.keep=inputs"),
}
COMMON = (
    "model.width=8",
    "engine.precision=float32",
    "engine.mode=in-process",
    "data.steps_per_epoch=100",
    "training.epochs=3",
    "training.evaluate_every=3",
    "diagnostics.every=10",
)
# What is drawn and tabled: name, the run, the key of the cosine, the key of the norm ratio.
LINES = (
    ("PETRA", "petra", "cosine", "norm_ratio"),
    ("plain delayed, at the same microbatches", "petra", "delayed_cosine", "delayed_norm_ratio"),
    ("delayed (graph), a run of its own", "delayed", "cosine", "norm_ratio"),
    ("delayed (inputs), a run of its own", "inputs", "cosine", "norm_ratio"),
)
STYLES = (
    {"color": "#D55E00", "marker": "o", "linestyle": "-"},
    {"color": "#0072B2", "marker": "s", "linestyle": "--"},
    {"color": "#56B4E9", "marker": "^", "linestyle": ":"},
    {"color": "#009E73", "marker": "D", "linestyle": "-."},
)

Diagnosis = dict[str, float | None]


def main() -> None:
    """Run what is missing, then print the tables and draw the plot."""
    options = parse()
    cells = [(name, seed) for seed in options.seeds for name in SETTINGS]
    if not options.collect:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda cell: run_cell(options, *cell), cells))
    runs = {name: [diagnoses(options.out / f"{name}_s{seed}") for seed in options.seeds] for name in SETTINGS}
    print(closeness_table(runs["petra"]))
    print(lines_table(runs))
    draw(runs, HERE / "closeness.png")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--shards", type=Path, required=True, help="folder of cifar10-{train,test}-NN.tar[.gz]"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/closeness"))
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--collect", action="store_true", help="run nothing, only collect")
    return parser.parse_args()


def run_cell(options: argparse.Namespace, name: str, seed: int) -> None:
    """Run one cell unless it is done."""
    folder = options.out / f"{name}_s{seed}"
    if any(record["event"] == "run_finished" for record in journal(folder)):
        return
    command = [sys.executable, "-m", "petractl"]
    if (folder / "resolved.toml").exists():
        subprocess.run([*command, "resume", str(folder)], check=True, stdout=subprocess.DEVNULL)
        return
    (train,) = sorted(options.shards.glob("cifar10-train-00.tar*"))
    (val,) = sorted(options.shards.glob("cifar10-test-00.tar*"))
    overrides = (*COMMON, *SETTINGS[name], f"data.train={train}", f"data.val={val}", f"run.seed={seed}")
    command += ["run", str(RECIPE), "--dir", str(folder)]
    for override in overrides:
        command += ["--set", override]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def journal(folder: Path) -> list[dict[str, object]]:
    """Return the records of a run, none if it has not begun."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def diagnoses(folder: Path) -> list[list[Diagnosis]]:
    """Return the diagnoses of each stage in a full pipeline: as many updates late as the schedule says."""
    stages: dict[int, list[Diagnosis]] = {}
    found = [r for r in journal(folder) if r["event"] == "gradients_diagnosed"]
    rows = {(r["microbatch"], r["stage"]): r for r in found}.values()  # a resumed run has some twice
    last = max(r["stage"] for r in rows)
    for row in rows:
        if row["delay_updates"] == last - row["stage"]:
            stages.setdefault(row["stage"], []).append(row)
    return [stages[j] for j in sorted(stages)]


def mean(stage: Sequence[Diagnosis], key: str) -> float:
    """Return the mean of a key over a run."""
    return statistics.fmean(row[key] for row in stage if row[key] is not None)


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {deviation:.3f}"


def closeness_table(runs: Sequence[Sequence[Sequence[Diagnosis]]]) -> str:
    """Return, for each stage, PETRA and a plain delayed gradient at the same microbatches of PETRA's runs."""
    lines = [
        "| stage | late by | PETRA | plain delayed | PETRA - delayed | PETRA is closer | rebuilt inputs |",
        "|---|---|---|---|---|---|---|",
    ]
    for j in range(len(runs[0])):
        stage = [run[j] for run in runs]
        gains = [mean(rows, "cosine") - mean(rows, "delayed_cosine") for rows in stage]
        pairs = [(row["cosine"], row["delayed_cosine"]) for rows in stage for row in rows]
        share = 100 * sum(petra > delayed for petra, delayed in pairs) / len(pairs)
        is_rebuilt = stage[0][0]["reconstruction_error"] is not None
        error = spread([mean(rows, "reconstruction_error") for rows in stage]) if is_rebuilt else ""
        late = len(runs[0]) - 1 - j
        lines.append(
            f"| {j} | {late} | {spread([mean(rows, 'cosine') for rows in stage])}"
            f" | {spread([mean(rows, 'delayed_cosine') for rows in stage])}"
            f" | {spread(gains)} | {f'{share:.0f} % of {len(pairs)}' if late else ''} | {error} |"
        )
    return "\n".join(lines) + "\n"


def lines_table(runs: dict[str, list[list[list[Diagnosis]]]]) -> str:
    """Return the cosines and norm ratios of every line of the plot, for each stage."""
    count = len(runs["petra"][0])
    head = "".join(f" {j} |" for j in range(count))
    lines = [f"| stage |{head}", "|---" * (count + 1) + "|"]
    for name, run, *keys in LINES:
        for key, label in zip(keys, ("cosine", "norm ratio"), strict=True):
            values = [[mean(one[j], key) for one in runs[run]] for j in range(count)]
            cells = " | ".join(f"{statistics.fmean(v):.3f}" for v in values)
            lines.append(f"| {name}: {label} | {cells} |")
    return "\n".join(lines) + "\n"


def draw(runs: dict[str, list[list[list[Diagnosis]]]], path: Path) -> None:
    """Draw cosine and norm ratio by stage; bars are the standard deviation over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    titles = ("Cosine with the end-to-end gradient", "Norm ratio to the end-to-end gradient")
    for axes, title, place in zip(panels, titles, (0, 1), strict=True):
        for n, ((name, run, *keys), style) in enumerate(zip(LINES, STYLES, strict=True)):
            count = len(runs[run][0])
            values = [[mean(one[j], keys[place]) for one in runs[run]] for j in range(count)]
            axes.errorbar(
                [j + 0.06 * (n - 1.5) for j in range(count)],
                [statistics.fmean(v) for v in values],
                [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values],
                label=name,
                capsize=3,
                linewidth=1.8,
                **style,
            )
        axes.set_title(title, loc="left", fontsize=13)
        axes.set_xlabel("stage (0 is the oldest: 9 updates late; 9 is the newest)", fontsize=11)
        axes.set_xticks(range(10))
        axes.grid(color="#DDDDDD", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].axhline(1.0, color="#555555", linewidth=1)
    panels[0].legend(frameon=False, fontsize=11, loc="lower right")
    figure.suptitle("RevNet-18 on CIFAR-10, 10 stages, at the current parameters", fontweight="bold")
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
