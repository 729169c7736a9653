"""What checkpoints in the middle of an epoch cost: training with one every 50 updates against none.

Stretches of 100 updates, in turn without and with two checkpoints (after 25 and 75), in one process; each
ends when everything is on disk. With `--updates N` stretches of N updates, with one checkpoint in the middle:
for nets whose updates take seconds; what that costs is then scaled to one in 50. Prints the median and the
range of the ratios of neighbours, and what one checkpoint takes of the training thread and of the writer's.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from petractl import build
from petractl.engine.cut import SAVE
from petractl.events import EventBus
from petractl.interrupts import Interrupts
from petractl.recipe.load import load_recipe
from petractl.run_folder import RunFolder
from petractl.session import Session, prepare_process

EVERY = 50


class Cuts:
    """A cutter that saves after some of the updates."""

    def __init__(self, saver, k, after):
        self._saver, self._at = saver, {count * k - 1 for count in after}
        self.taken_s = 0.0

    def decide(self, microbatch):
        return SAVE if microbatch in self._at else 0

    def before_update(self, microbatch):
        pass

    def after_update(self, microbatch):
        pass

    def take(self, stage, cut):
        began = time.perf_counter()
        self._saver.take(stage, cut)
        self.taken_s += time.perf_counter() - began


def microbatches(built, count):
    """Return as many microbatches as are wanted, in memory."""
    found, epoch = [], 0
    while len(found) < count:
        for batch in built.training_data.epoch(epoch):
            found.append((built.placement.images(batch), built.placement.labels(batch)))
        epoch += 1
    return found[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--updates", type=int, default=2 * EVERY)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoints-", dir="."))
    overrides = [*options.overrides, 'engine.mode="in-process"', f"engine.threads={options.threads}"]
    plan = build.check(load_recipe(options.recipe, overrides=overrides))
    prepare_process(plan)
    built = build.build(plan)
    k = plan.recipe.method.accumulation
    updates = options.updates
    after = (EVERY // 2, EVERY + EVERY // 2) if updates == 2 * EVERY else (updates // 2,)
    data = microbatches(built, updates * k)
    session = Session(RunFolder(folder), plan, built, interrupts=Interrupts(), recipe_name="cost")
    bus, saved = EventBus(), []
    saver = session._open_saver(bus)
    saver._saved = saved.append

    def stretch(cutter) -> float:
        began = time.perf_counter()
        built.pipeline.train(iter(data), num_microbatches=len(data), cutter=cutter)
        saver.finish()
        return time.perf_counter() - began

    stretch(None)
    ratios, taken, seconds = [], [], []
    for _ in range(options.rounds):
        cutter = Cuts(saver, k, after)
        without, with_cuts = stretch(None), stretch(cutter)
        ratios.append(with_cuts / without)
        seconds.append(without)
        taken.append(cutter.taken_s / len(after))
        print(f"{without:.2f} s without, {with_cuts:.2f} s with: {100 * (ratios[-1] - 1):+.2f} %", flush=True)
    size = sum(f.stat().st_size for f in Path(saved[-1].path).iterdir())
    scale = updates / EVERY / len(after)
    costs = [100 * (ratio - 1) * scale for ratio in ratios]
    print(f"{options.recipe}: {size / 2**20:.1f} MiB; torch {torch.__version__}")
    print(f"  {1000 * statistics.median(seconds) / len(data):.1f} ms per microbatch")
    print(
        f"  cost {statistics.median(costs):+.2f} % ({min(costs):+.2f} to {max(costs):+.2f}), n = {len(costs)}"
    )
    print(f"  per checkpoint {1000 * statistics.median(taken):.1f} ms of the training thread,")
    print(f"  {1000 * statistics.median(event.seconds for event in saved):.0f} ms until it is on disk")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
