"""Going on with another number of stages: from the middle of an epoch of 3 stages with 1, 2 and 5.

For each seed a run of 3 stages is saved in the middle of its third epoch. It goes on with each number of
stages: the parameters with which the new pipeline begins are compared with those of the drained checkpoint,
and the loss of the epoch with that of the run that was left alone. The spread of that loss over the seeds is
what differences are held against.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path

import torch

from petractl import checkpoint, launch
from petractl.session import Session

RECIPE = """
[model]
name = "revnet18"
width = 8
[data]
name = "digits"
batch_size = 32
[method]
name = "petra"
accumulation = 2
[partition]
stages = 3
[engine]
mode = "in-process"
threads = 2
[optimizer]
lr = 0.05
[training]
epochs = 4
warmup_epochs = 1.0
[run]
checkpoint_every = "10 updates"
keep_last = 100
[tracking]
mlflow = false
"""
SAVED_AT, EPOCH = "epoch-0003-microbatch-000028", 3


def loss_of(run: Path) -> float:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [r["loss"] for r in records if r["event"] == "epoch_trained" and r["epoch"] == EPOCH]
    return float(found[-1])


def resumed(run: Path, target: Path, stages: int) -> tuple[float, bool]:
    """Go on with so many stages; return the epoch's loss, and whether it began with what was drained."""
    shutil.copytree(run, target)
    for path in checkpoint.checkpoint_paths(target / "checkpoints"):
        if path.name != SAVED_AT:
            shutil.rmtree(path)
    began_with = {}
    train = Session.train

    def observed(self, state):
        began_with.update({name: x.clone() for name, x in self._built.network.state_dict().items()})
        began_with["at"] = state.microbatches_done
        return train(self, state)

    Session.train = observed
    try:
        assert launch.resume(target, overrides=[f"partition.stages={stages}"]) == 0
    finally:
        Session.train = train
    name = f"epoch-{EPOCH:04d}-microbatch-{began_with.pop('at'):06d}"
    drained = checkpoint.load_checkpoint(target / "checkpoints" / name).tensors["model"]
    same = all(torch.equal(began_with[key], value) for key, value in drained.items())
    return loss_of(target), same and drained.keys() == began_with.keys()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 5])
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="partition-", dir="."))
    (folder / "recipe.toml").write_text(RECIPE)
    alone, changed = [], {count: [] for count in options.stages}
    for seed in range(options.seeds):
        run = folder / f"seed-{seed}"
        launch.run(str(folder / "recipe.toml"), directory=run, overrides=[f"run.seed={seed}"])
        alone.append(loss_of(run))
        for count in options.stages:
            loss, same = resumed(run, folder / f"seed-{seed}-{count}", count)
            changed[count].append((loss - alone[-1], same))
    spread = statistics.stdev(alone)
    print(f"3 stages: loss of epoch {EPOCH} {statistics.mean(alone):.4f}, standard deviation {spread:.4f}")
    for count, found in changed.items():
        differences = [difference for difference, _ in found]
        print(
            f"3 to {count}: difference {statistics.mean(differences):+.4f} "
            f"({min(differences):+.4f} to {max(differences):+.4f}); "
            f"parameters equal at the resume: {sum(same for _, same in found)} of {len(found)}"
        )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
