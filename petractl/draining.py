"""Before a run goes on with another pipeline: what was in flight in the old one gets its backward.

What a stage holds in the middle of an epoch means nothing to other stages. So the old pipeline is built once
more, from the recipe that the folder still has, takes the checkpoint back, lets nothing enter, and is saved
when it is empty. From there any partition, schedule or number of processes goes on, by the names of units. In
one process that needs no more than one device; replicas differ in what they have in flight, and so need their
processes again, on this machine.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path

from petractl import build, checkpoint
from petractl.errors import Problem, RunError
from petractl.interrupts import Interrupts
from petractl.processes import run_workers
from petractl.recipe.load import load_recipe
from petractl.recipe.schema import Recipe
from petractl.run_folder import RunFolder
from petractl.saving.identity import why_drained_first
from petractl.session import Session, prepare_process, state_of
from petractl.worker import LOGS, START_VARIABLE, Start


def drained_first(
    folder: RunFolder, saved: checkpoint.Checkpoint | None, plan: build.CheckedPlan
) -> tuple[checkpoint.Checkpoint | None, list[Problem]]:
    """Return a checkpoint that `plan` can go on from, and what there is to say if it is a new one.

    Raises:
        RunError: it cannot be drained; the checkpoint is as it was.
    """
    try:
        why = why_drained_first(saved, plan)
    except (KeyError, TypeError, AttributeError) as error:
        assert saved is not None
        raise RunError(
            "its manifest does not say which pipeline it belongs to",
            where=str(saved.path),
            hint="delete it: the run goes on from an earlier one",
        ) from error
    if not why or saved is None:
        return saved, []
    new = _drain(folder, saved)
    done = new.microbatches - saved.microbatches
    count = f"{done} microbatch{'es' if done != 1 else ''}"
    what = (
        f"another pipeline ({why}): what was in flight is drained first, {count} of epoch {saved.epoch + 1}; "
        f"it goes on from {new.path.name}"
    )
    return new, [Problem("partition", what, "with the same cuts and schedule it would have the same bits")]


def _drain(folder: RunFolder, saved: checkpoint.Checkpoint) -> checkpoint.Checkpoint:
    loaded = load_recipe(folder.resolved)
    alone = loaded.recipe.engine.replicas == 1
    if alone:
        loaded = replace(loaded, recipe=_in_one_process(loaded.recipe))
    plan = build.check(loaded, starting_weights=False)
    if why_drained_first(saved, plan):
        raise RunError(
            "the folder's recipe is not the pipeline that the checkpoint belongs to",
            where=str(saved.path),
            hint="put the run's resolved.toml back, or delete this checkpoint to go on from an earlier one",
        )
    drain = _drain_alone if alone else _drain_in_processes
    path = drain(folder, saved, plan)
    return checkpoint.load_checkpoint(path)


def _in_one_process(recipe: Recipe) -> Recipe:
    """Return the recipe for one process on whatever device there is."""
    engine = {"mode": "in-process", "devices": (), "device": "auto", "backend": "auto"}
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update=engine)})


def _drain_alone(folder: RunFolder, saved: checkpoint.Checkpoint, plan: build.CheckedPlan) -> Path:
    prepare_process(plan)
    built = build.build(plan, starting_weights=False)
    session = Session(folder, plan, built, interrupts=Interrupts(), recipe_name=folder.path.name)
    session.restore(saved)
    return session.drain(state_of(saved))


def _drain_in_processes(folder: RunFolder, saved: checkpoint.Checkpoint, plan: build.CheckedPlan) -> Path:
    layout = plan.layout
    start = Start(
        run_dir=str(folder.path),
        recipe_name=folder.path.name,
        num_places=layout.num_places,
        num_replicas=layout.num_replicas,
        info=asdict(plan.info),
        warnings=[],
        checkpoint=str(saved.path),
        drain=True,
    )
    code = run_workers(
        [sys.executable, "-m", "petractl.worker", str(folder.path)],
        titles=start.titles,
        log_dir=folder.path / LOGS,
        environment={START_VARIABLE: start.to_json()},
    )
    if code:
        raise KeyboardInterrupt
    made, _ = checkpoint.newest_checkpoint(folder.checkpoints)
    assert made is not None, "the processes have just made one"
    return made.path
