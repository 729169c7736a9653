"""`petractl partition --write`: a recipe that the plan is for, and the plan put into it."""

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petractl.cli.report import show_warning
from petractl.errors import Problem, UserError

if TYPE_CHECKING:
    from petractl.planning.plan import PipelinePlan
    from petractl.recipe.schema import Recipe


def check_recipe(path: Path, model: str) -> None:
    """Refuse a recipe of another model, or one that cannot be written."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "there is no such recipe to write to"
        raise UserError(what, where=str(path), hint="give a recipe's file")
    named = _recipe(path).model.name
    if named != model:
        raise UserError(
            f'its model is "{named}", and the cuts are for "{model}"',
            where=str(path),
            hint=f"plan with --model {named}",
        )
    if not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
        raise UserError("cannot be written: no permission", where=str(path), hint="give a recipe of yours")


def check_units(path: Path, asked: Mapping[str, Any], *, num_units: int) -> None:
    """Refuse a recipe whose net has not as many units as the one that is cut."""
    import torch

    from petractl.models.registry import build_model

    model = _recipe(path).model
    with torch.device("meta"):
        built = build_model(
            model.name,
            width=model.width,
            classes=model.classes or asked["classes"],
            depth=model.depth,
            arguments=model.arguments,
        )
    if len(built.units) != num_units:
        raise UserError(
            f"its net has {len(built.units)} units, and the cuts are for {num_units}",
            where=str(path),
            hint="plan with --depth as in the recipe" if not model.arguments else "model.arguments differ",
        )


def warn_of_differences(path: Path, asked: Mapping[str, Any]) -> None:
    """Say which keys of a recipe are not what is planned for."""
    found = [
        f"{key} = {theirs} (planned: {planned})"
        for key, theirs, planned in _compared(_recipe(path), asked)
        if str(theirs) != str(planned)
    ]
    if found:
        what = f"is not quite what is planned for: {', '.join(found)}"
        show_warning(Problem(str(path), what, "give --batch, --accumulation, ... as in the recipe"))


def write_plan(path: Path, plan: "PipelinePlan", *, replicas: str) -> None:
    """Put a plan's cuts, and the replicas if they were asked for, into a recipe."""
    from petractl.recipe.edit import write_cuts

    copies = plan.setting.replicas
    write_cuts(path, plan.cuts, replicas=None if replicas == "1" else copies)
    said = "" if replicas == "1" else f", replicas = {copies}"
    sys.stderr.write(f"{path}: cuts = {list(plan.cuts)}{said}\n")


def _recipe(path: Path) -> "Recipe":
    from petractl.recipe import load_recipe

    return load_recipe(path).recipe


def _compared(recipe: "Recipe", asked: Mapping[str, Any]) -> Iterator[tuple[str, object, object]]:
    """Yield keys with the recipe's value and the plan's; what a recipe leaves to its data is passed over."""
    from petractl.methods.family import method_spec

    model, method = recipe.model, recipe.method
    yield "model.width", model.width, asked["width"]
    if model.name == "revnet-iso":
        yield "model.depth", model.depth, asked["depth"]
    if model.classes:
        yield "model.classes", model.classes, asked["classes"]
    if "auto" not in (model.stem, asked["stem"]):
        yield "model.stem", model.stem, asked["stem"]
    if recipe.data.image_size:
        yield "data.image_size", recipe.data.image_size, asked["image_size"]
    yield "data.batch_size", recipe.data.batch_size, asked["batch"]
    yield "method.name", method.name, asked["method"]
    if method.name == asked["method"] == "delayed":
        yield "method.keep", method.keep, method_spec("delayed", keep=asked["keep"]).keep
    yield "method.accumulation", method.accumulation, asked["accumulation"]
    schedule = recipe.engine.schedule
    theirs = schedule if isinstance(schedule, str) else ",".join(map(str, schedule))
    yield "engine.schedule", theirs, asked["schedule"].strip("[] ").replace(" ", "")
    yield "optimizer.name", recipe.optimizer.name, asked["optimizer"]
    if asked["replicas"] == "1":
        yield "engine.replicas", recipe.engine.replicas, 1
