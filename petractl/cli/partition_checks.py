"""What is wrong with the options of `petractl partition`, said before anything is built or measured."""

import math
from collections.abc import Mapping
from typing import Any

from petractl.cli.partition_options import MAX_GPUS
from petractl.cli.partition_recipe import check_recipe
from petractl.engine.exact_rules import EXACT_SCHEDULES, exact_schedule_problem
from petractl.errors import UserError

_BALANCES = ("time", "flops", "memory", "parameters", "uniform")
_DEPTH = 8
_TWO_STAGES = "interleaved-1f1b"
_IMAGENET_STEM_FROM_SIDE = 96
_OPTIMIZERS = ("sgd", "adamw", "lars")


def check_request(asked: Mapping[str, Any]) -> None:
    """Refuse what no plan can have; `asked` are the command's parameters by name.

    Raises:
        UserError: the first of what is wrong.
    """
    gpus = asked["gpus"]
    if not 1 <= gpus <= MAX_GPUS:
        limit = "there is at least 1" if gpus < 1 else f"at most {MAX_GPUS:,} can be planned for"
        raise UserError(f"{gpus} GPUs; {limit}", where="--gpus", hint=f"give 1 to {MAX_GPUS:,}")
    words = {"balance": (_BALANCES, "cannot be balanced"), "optimizer": (_OPTIMIZERS, "is not known")}
    for name, (known, what) in words.items():
        if asked[name] not in known:
            raise UserError(f'"{asked[name]}" {what}', where=f"--{name}", hint=f"one of {', '.join(known)}")
    if not math.isfinite(asked["memory_gib"]):
        raise UserError(
            f"{asked['memory_gib']} is no memory", where="--memory-gib", hint="give GiB, or leave it out"
        )
    measuring = {"fresh": False, "threads": 0, "device": "auto"}
    for name, unset in measuring.items():
        if asked["flops"] and asked[name] != unset:
            what = "is for measuring, and --flops measures nothing"
            raise UserError(what, where=f"--{name}", hint="leave it out")
    _check_model(asked)
    _check_method(asked)
    if asked["cuts"]:
        parse_cuts(asked["cuts"])
    if asked["replicas"] != "1":
        parse_replicas(asked["replicas"])
    check_microbatches(asked)
    if asked["write"] is not None:
        check_recipe(asked["write"], asked["model"])


def _check_model(asked: Mapping[str, Any]) -> None:
    if asked["depth"] != _DEPTH and asked["model"] != "revnet-iso" and ":" not in asked["model"]:
        raise UserError(
            f"{asked['model']} has a depth of its own",
            where="--depth",
            hint="leave it out, or use revnet-iso",
        )


def _check_method(asked: Mapping[str, Any]) -> None:
    """Refuse methods that are not known, and schedules that they do not run."""
    from petractl.methods.family import method_spec
    from petractl.planning.planned import refuse_unplanned

    try:
        spec = method_spec(asked["method"], keep=asked["keep"])
    except ValueError as error:
        raise UserError(str(error), where="--method", hint="see `petractl ls methods`") from None
    hint = 'partition.stages = "units" in a recipe makes a block of each unit'
    refuse_unplanned(spec.name, where="--method", hint=hint)
    if asked["keep"] and spec.keep != asked["keep"]:
        raise UserError(
            f"{spec.name} has nothing to choose", where="--keep", hint="leave it out, or use delayed"
        )
    _check_schedule(asked["schedule"], spec.name, locked=spec.locked)


def _check_schedule(schedule: str, method: str, *, locked: bool) -> None:
    """Refuse a schedule that is not known or that the method does not run; lists are read later."""
    from petractl.recipe.schema import SCHEDULE_NAMES

    planned = [name for name in SCHEDULE_NAMES if name != _TWO_STAGES]
    is_list = schedule.strip("[] ")[:1].isdigit()
    if schedule not in SCHEDULE_NAMES and not is_list:
        what = f'unknown schedule "{schedule}"'
        hint = f"one of {', '.join(planned)}, or lookaheads such as 3,2,1,0"
        raise UserError(what, where="--schedule", hint=hint)
    if schedule in EXACT_SCHEDULES and method != "backprop":
        hint = "use --method backprop, or tight, paper, least, or lookaheads such as 3,2,1,0"
        raise UserError(f'{method} does not run "{schedule}"', where="--schedule", hint=hint)
    if schedule == _TWO_STAGES:
        what = f'"{schedule}" has two stages per device, and this plans one'
        hint = '`petractl simulate` says how fast it is; a recipe with balance = "time" cuts for it'
        raise UserError(what, where="--schedule", hint=hint)
    if locked and schedule not in ("auto", "sequential", *EXACT_SCHEDULES):
        what = f'{method} is locked and runs no forward ahead: "{schedule}" is not for it'
        raise UserError(what, where="--schedule", hint="leave it out")


def check_microbatches(asked: Mapping[str, Any]) -> None:
    """Refuse numbers of microbatches that an exact pipeline of so many stages does not run."""
    schedule, replicas = asked["schedule"], asked["replicas"]
    if schedule not in EXACT_SCHEDULES or replicas == "auto":
        return
    stages, rest = divmod(asked["gpus"], max(1, int(replicas)))
    if rest or stages < 1:
        return
    problem = exact_schedule_problem(
        schedule, num_stages=stages, num_places=stages, accumulation=asked["accumulation"]
    )
    if problem:
        what, _, hint = problem.partition(": set ")
        raise UserError(what, where="--accumulation", hint=f"as in a recipe, set {hint}")


def stem_of(asked: Mapping[str, Any]) -> str:
    """Return the first layer: as in a run, it goes by the side of the images unless it is given."""
    if asked["stem"] != "auto":
        return str(asked["stem"])
    return "imagenet" if asked["image_size"] >= _IMAGENET_STEM_FROM_SIDE else "cifar"


def check_stages(gpus: int, replicas: str, units: int) -> None:
    """Refuse more stages than units; the nearest replicas that would work are named."""
    count = int(replicas) if replicas != "auto" else gpus
    if replicas == "auto" or count < 1 or gpus <= units * count:
        return
    fitting = [r for r in range(count + 1, gpus + 1) if gpus % r == 0 and gpus // r <= units]
    raise UserError(
        f"{gpus} GPUs make {gpus // count} stages, but the model has {units} units to share among them",
        where="--gpus",
        hint=f"give at most {units * count} GPUs, or --replicas {fitting[0]}",
    )


def parse_replicas(text: str) -> int | None:
    """Read the number of replicas; None for "auto"."""
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit()):
        raise UserError(f'"{text}" is no number of replicas', where="--replicas", hint='a number, or "auto"')
    return int(text)


def parse_cuts(text: str) -> tuple[int, ...]:
    """Read the first units of stages 1, 2, ..."""
    parts = text.replace(" ", "").strip("[]").split(",")
    numbers = tuple(int(part) for part in parts if part.isascii() and part.isdigit())
    rising = all(a < b for a, b in zip((0, *numbers), numbers, strict=False))
    if len(numbers) != len(parts) or not rising:
        raise UserError(
            f'"{text}" are no cuts', where="--cuts", hint="give unit numbers from 1 up, such as 4,8,14"
        )
    return numbers
