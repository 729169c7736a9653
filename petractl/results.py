"""What a run has given: its weights evaluated, or exported as plain tensors."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

from petractl import build
from petractl.checkpoint import Checkpoint, checkpoint_paths, load_checkpoint, newest_checkpoint
from petractl.engine.evaluation import evaluate as evaluate_network
from petractl.errors import Problem, RunError, UserError
from petractl.models.weights import save_tensors
from petractl.recipe.load import LoadedRecipe, load_recipe
from petractl.run_folder import RunFolder, open_run_folder

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


Warn = Callable[[Problem], None]


def evaluate(run: Path, *, best: bool, warn: Warn) -> dict[str, float | int]:
    """Return loss, top1, top5 (percent) and samples of the last (or best) checkpoint on the test data.

    `warn` is told of newer checkpoints that are damaged.

    Raises:
        UserError: no such run, or no checkpoint yet.
        RunError: the checkpoint is damaged.
    """
    folder = open_run_folder(run)
    saved = _checkpoint(folder, best=best, warn=warn)
    plan = build.check(_recipe(folder), starting_weights=False, test_only=True)
    torch.set_num_threads(build.num_threads(plan.recipe))
    network = build.build_network(plan)
    _load(network, saved, where=str(run))
    network.to(plan.device)
    scores = evaluate_network(
        network, build.evaluation_data(plan), placement=build.evaluation_placement(plan)
    )
    return dataclasses.asdict(scores)


def export(run: Path, *, out: Path, best: bool, warn: Warn) -> dict[str, str | int]:
    """Write the weights as safetensors named by unit; equal weights give equal bytes.

    `warn` is told of newer checkpoints that are damaged.

    Raises:
        UserError: no such run, no checkpoint yet, or `out` cannot be written.
        RunError: the checkpoint is damaged.
    """
    if out.is_dir():
        raise UserError(
            "this is a folder", where=str(out), hint=f"name a file, for example {out / 'weights.safetensors'}"
        )
    saved = _checkpoint(open_run_folder(run), best=best, warn=warn)
    tensors = saved.tensors["model"]
    save_tensors(tensors, out)
    content = out.read_bytes()
    return {
        "path": str(out),
        "tensors": len(tensors),
        "parameters": sum(t.numel() for name, t in tensors.items() if not name.endswith(STATISTICS)),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _load(network: torch.nn.Module, saved: Checkpoint, *, where: str) -> None:
    try:
        network.load_state_dict(saved.tensors["model"])
    except (RuntimeError, KeyError) as error:
        first = "".join(str(error).splitlines()[1:2]).strip()[:200]
        raise RunError(
            f"its resolved.toml describes another net than {saved.path.name} has: {first}",
            where=where,
            hint="put back the resolved.toml that the run was trained with",
        ) from None


def _recipe(folder: RunFolder) -> LoadedRecipe:
    """Return the run's recipe, for this machine: a run trained on a GPU can be evaluated without one."""
    loaded = load_recipe(folder.resolved)
    if torch.cuda.is_available() or not loaded.recipe.engine.device.startswith("cuda"):
        return loaded
    return load_recipe(folder.resolved, overrides=["engine.device=cpu"])


def _checkpoint(folder: RunFolder, *, best: bool, warn: Warn) -> Checkpoint:
    newest, errors = newest_checkpoint(folder.checkpoints)
    if newest is None:
        if errors:
            raise errors[0]
        raise UserError(
            "the run has no checkpoint yet",
            where=str(folder.path),
            hint=f"train it first: petractl resume {folder.path}",
        )
    if not best:
        for error in errors:
            warn(Problem(error.where, error.what, f"{newest.path.name} is taken instead"))
        return newest
    epoch = newest.state["training"]["best_epoch"]
    for path in checkpoint_paths(folder.checkpoints):
        if path.name == f"epoch-{epoch or 0:04d}":
            return load_checkpoint(path)
    raise RunError(f"its best checkpoint (epoch {epoch}) is missing", where=str(folder.path))
