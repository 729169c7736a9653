"""What it costs to look after the numbers: epochs of one net in turn without, with "stop" and with "skip".

python benchmarks/numbers/cost.py RECIPE [MICROBATCHES [ROUNDS]]
"""

import statistics
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from petractl import build
from petractl.engine.numbers import Numbers
from petractl.recipe.load import load_recipe
from petractl.session import prepare_process

MODES = ("none", "stop", "skip")
WARM_UP = 2


def main() -> None:
    """Print the ratio of images/s to those without, of neighbouring epochs: median and spread."""
    recipe, count, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0, 7
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else rounds
    overrides = ["engine.mode=in-process"]
    if not recipe.startswith("digits"):
        overrides += ["data.name=fake", "data.augment=false", f"data.steps_per_epoch={count}"]
    plan = build.check(load_recipe(recipe, overrides=overrides))
    prepare_process(plan)
    built = build.build(plan)
    assert built.training_data is not None
    place = built.placement
    data = [(place.images(b).clone(), place.labels(b).clone()) for b in built.training_data.epoch(0)]
    data = data[: count or None]
    for _ in range(WARM_UP):
        timed(built, data, "none")
    speeds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for turn in range(rounds):
        for mode in (*MODES[turn % 3 :], *MODES[: turn % 3]):
            speeds[mode].append(timed(built, data, mode))
    print(f"{recipe}: {len(data)} microbatches, {rounds} rounds, {torch.get_num_threads()} threads")
    print("| | images/s | ratio to none: median | least | most |\n|---|---|---|---|---|")
    for mode in MODES:
        ratios = [a / b for a, b in zip(speeds[mode], speeds["none"], strict=True)]
        row = " | ".join(f"{x:.4f}" for x in (statistics.median(ratios), min(ratios), max(ratios)))
        print(f"| {mode} | {statistics.median(speeds[mode]):.1f} | {row} |")


def timed(built: build.Built, data: Sequence[tuple[Tensor, Tensor]], mode: str) -> float:
    """Train an epoch and return its images/s."""
    stages = built.pipeline.stages
    for stage in stages:
        stage.sentinel = stage.observer = None  # type: ignore[attr-defined]
        for evaluator in stage.evaluators:  # type: ignore[attr-defined]
            evaluator._protected = []
    if mode != "none":
        device = built.placement.device
        Numbers(stages, device=device, skips=mode == "skip", drift_every=100, drift_limit=1.0)
    began = time.perf_counter()
    built.pipeline.train(iter(data), num_microbatches=len(data))
    return sum(len(labels) for _, labels in data) / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
