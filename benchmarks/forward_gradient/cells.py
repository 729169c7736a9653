"""One epoch of every cell of digits_fg: each target, guess, space and projection that the recipe allows.

OMP_NUM_THREADS=1 python benchmarks/forward_gradient/cells.py
"""

import argparse
import statistics
import sys
import time
from itertools import product

import torch

from petractl import build
from petractl.errors import RecipeError
from petractl.estimator import GUESSES, PROJECTIONS, SPACES, TARGETS
from petractl.recipe.find import find_recipe
from petractl.recipe.load import load_recipe


def main() -> None:
    """Train each cell for an epoch, and print how long the slowest ones took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spaces", nargs="+", default=list(SPACES), choices=SPACES)
    parser.add_argument("--slowest", type=int, default=5, help="how many to name")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="further overrides")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds: dict[str, float] = {}
    refused = 0
    for space, coefficients in ((s, c) for s in options.spaces for c in ("batch", "sample")):
        if coefficients == "sample" and space != "activation":
            continue
        for target, guess, projection in product(TARGETS, GUESSES, PROJECTIONS):
            keys = {"target": target, "guess": guess, "space": space, "projection": projection}
            keys |= {"coefficients": coefficients} if space == "activation" else {}
            overrides = [f"method.{key}={value}" for key, value in keys.items()] + options.overrides
            try:
                found = epoch_s(overrides)
            except RecipeError:
                refused += 1
                continue
            seconds[", ".join(keys.values())] = found
            print(f"{found:6.2f} s  {', '.join(keys.values())}", file=sys.stderr, flush=True)
    print(f"{len(seconds)} cells ran, {refused} are not allowed; CPU seconds of an epoch: ", end="")
    print(f"median {statistics.median(seconds.values()):.1f}, most {max(seconds.values()):.1f}")
    for name, found in sorted(seconds.items(), key=lambda item: -item[1])[: options.slowest]:
        print(f"{found:6.1f} s  {name}")


def epoch_s(overrides: list[str]) -> float:
    """Return the CPU seconds of the first epoch: on one thread, those of a quiet machine."""
    plan = build.check(load_recipe(find_recipe("digits_fg"), overrides=overrides))
    built = build.build(plan)
    assert built.training_data is not None
    batches = built.training_data.epoch(0)
    began = time.process_time()
    built.pipeline.train(
        ((built.placement.images(batch), built.placement.labels(batch)) for batch in batches),
        num_microbatches=built.length.microbatches,
    )
    return time.process_time() - began


if __name__ == "__main__":
    main()
