"""What concerns more than one key: contradictions, and settings that do nothing.

A contradiction is an error. A key that has no effect beside the others (`betas` with sgd) is never ignored
silently: written in a recipe it gives a warning, and `petractl show` writes it as a comment. One table says
which these are.
"""

from collections.abc import Iterator

from petractl.errors import Problem
from petractl.recipe.data_checks import data_conflicts, idle_data_keys
from petractl.recipe.findings import Conflict, IdleKey, conflict, shown
from petractl.recipe.method_checks import block_conflicts, idle_block_keys, idle_engine_keys
from petractl.recipe.schema import (
    BLOCK_METHODS,
    EXACT_SCHEDULE_NAMES,
    LOCKED_METHODS,
    STAGES_PER_PROCESS,
    Recipe,
    is_import_path,
)

RESTARTS_ALONE = (
    "several processes; one alone is started again from outside (docker --restart, systemd):"
    " `petractl run RECIPE --dir DIR --resume auto`"
)


def explicit_keys(recipe: Recipe) -> frozenset[str]:
    """Return the keys (`section.key`) that were set and not left at their default."""
    return frozenset(
        f"{section}.{key}"
        for section in type(recipe).model_fields
        if section in recipe.model_fields_set
        for key in getattr(recipe, section).model_fields_set
    )


def find_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """Yield the contradictions between keys that need no model to be seen."""
    given = explicit_keys(recipe)
    yield from _model_conflicts(recipe)
    yield from data_conflicts(recipe)
    yield from _method_conflicts(recipe, given)
    yield from block_conflicts(recipe, given)
    yield from _stage_conflicts(recipe, given)
    yield from _process_conflicts(recipe)
    yield from _diagnostics_conflicts(recipe)
    yield from _device_conflicts(recipe)


def find_warnings(recipe: Recipe) -> Iterator[Problem]:
    """Yield what is allowed but likely not meant."""
    given = explicit_keys(recipe)
    for idle in idle_keys(recipe):
        if idle.key in given:
            yield Problem(idle.key, f"has no effect with {idle.because}", f"it is for {idle.used_with}")
    yield from _rate_warnings(recipe, given)
    yield from _pipeline_warnings(recipe)


def idle_keys(recipe: Recipe) -> Iterator[IdleKey]:
    """Yield every key that has no effect in this recipe, set or not."""
    yield from _idle_model(recipe)
    yield from idle_data_keys(recipe)
    yield from _idle_method_and_partition(recipe)
    yield from idle_block_keys(recipe)
    yield from _idle_engine(recipe)
    yield from _idle_optimizer(recipe)
    yield from _idle_training_and_tracking(recipe)


def _model_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    model = recipe.model
    if model.arguments and not is_import_path(model.name):
        yield conflict(
            f'are for a model of your own ("package.module:function"), but the model is "{model.name}"',
            "take them out",
            "model.arguments",
            "model.name",
        )


def _method_conflicts(recipe: Recipe, given: frozenset[str]) -> Iterator[Conflict]:
    method, engine = recipe.method, recipe.engine
    if "method.keep" in given and method.name != "delayed":
        yield conflict(
            f'is for method.name = "delayed" only, but the method is "{method.name}"',
            'take it out, or set method.name = "delayed"',
            "method.keep",
            "method.name",
        )
    if _is_exact(recipe):
        if method.name != "backprop":
            yield conflict(
                f'is for method.name = "backprop" only with {shown(engine.schedule)}, an exact pipeline,'
                f' but the method is "{method.name}"',
                'set engine.schedule = "auto", or, for a new run, method.name = "backprop"',
                "engine.schedule",
                "method.name",
            )
    elif method.name in LOCKED_METHODS and engine.schedule not in ("auto", "sequential"):
        exact = ", or an exact pipeline" if method.name == "backprop" else ""
        yield conflict(
            f'must be "auto" or "sequential"{exact} with "{method.name}", which runs no forwards ahead,'
            f" not {shown(engine.schedule)}",
            'set engine.schedule = "auto", or choose method.name = "petra" or "delayed"',
            "engine.schedule",
            "method.name",
        )
    if engine.slack and engine.schedule not in ("auto", "tight") and method.name not in BLOCK_METHODS:
        yield conflict(
            f'is for engine.schedule = "tight" only, but the schedule is {shown(engine.schedule)}',
            "set engine.slack = 0, or take engine.schedule out",
            "engine.slack",
            "engine.schedule",
        )


def _stage_conflicts(recipe: Recipe, given: frozenset[str]) -> Iterator[Conflict]:
    stages, cuts, lookaheads = recipe.partition.stages, recipe.partition.cuts, recipe.engine.schedule
    if cuts and "partition.stages" in given:
        yield conflict(
            f"cannot be given together with partition.stages = {shown(stages)}",
            "keep one of the two",
            "partition.cuts",
            "partition.stages",
        )
        return
    num_stages = len(cuts) + 1 if cuts else stages
    if isinstance(lookaheads, tuple) and isinstance(num_stages, int) and len(lookaheads) != num_stages:
        source = "partition.cuts" if cuts else "partition.stages"
        yield conflict(
            f"must have one lookahead per stage: it has {len(lookaheads)}, "
            f"but {source} makes {num_stages} stages",
            'give as many as there are stages, or use "tight" or "paper"',
            "engine.schedule",
            source,
        )


def _process_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """Yield what cannot be done in one process, where the recipe asks for one."""
    engine = recipe.engine
    if engine.mode != "in-process":
        return
    asked = {
        "schedule": f"{shown(engine.schedule)} is an exact pipeline, which runs" * _is_exact(recipe),
        "replicas": f"{engine.replicas} replicas run" * (engine.replicas > 1),
        "devices": "stages with devices of their own run" * bool(engine.devices),
    }
    for key, what in asked.items():
        if what:
            yield conflict(
                f'{what} in several processes, but engine.mode is "in-process"',
                f'set engine.mode = "auto", or take engine.{key} out',
                f"engine.{key}",
                "engine.mode",
            )


def _diagnostics_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """Yield what takes several processes, where gradients are compared with those of the whole net."""
    engine = recipe.engine
    if not recipe.diagnostics.every or engine.mode == "in-process":
        return
    asked = {
        "mode": engine.mode == "processes",
        "schedule": _is_exact(recipe),
        "replicas": engine.replicas > 1,
        "devices": bool(engine.devices),
        "backend": engine.backend != "auto",
    }
    key = next((key for key, several in asked.items() if several), "")
    if key:
        yield conflict(
            "compares with the gradient of the whole net, which has to be in one process, but"
            f" engine.{key} = {shown(getattr(engine, key))} takes several",
            f"set diagnostics.every = 0, or take engine.{key} out",
            "diagnostics.every",
            f"engine.{key}",
        )


def _device_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    engine = recipe.engine
    # With a list of devices the single one has no effect.
    key, named = ("devices", engine.devices) if engine.devices else ("device", (engine.device,))
    if engine.backend == "nccl" and "cpu" in named:
        yield conflict(
            f'"nccl" needs a GPU for every process, but engine.{key} has "cpu"',
            'set engine.backend = "gloo" or "auto"',
            "engine.backend",
            f"engine.{key}",
        )
    places, replicas, given = _known_places(recipe), engine.replicas, len(engine.devices)
    if given and places is not None and given not in (places, places * replicas):
        per_process = _stages_per_process(recipe)
        product = f"stages({places * per_process})"
        product += f" / {per_process} per process" if per_process > 1 else ""
        product += f" x replicas({replicas})" if replicas > 1 else ""
        wanted = f"{places} (the same for every replica) or {places * replicas}" if replicas > 1 else places
        yield conflict(
            f"{product} = {places * replicas} processes, but {given} devices are given",
            f"give {wanted}, in the order of the stages; several may be the same",
            "engine.devices",
            "partition.cuts" if recipe.partition.cuts else "partition.stages",
            "engine.replicas",
            "engine.schedule",
        )


def _pipeline_warnings(recipe: Recipe) -> Iterator[Problem]:
    if _is_exact(recipe) and recipe.method.accumulation == 1:
        yield Problem(
            "method.accumulation",
            f"1 makes {shown(recipe.engine.schedule)} plain model parallelism: "
            "a pipeline of one microbatch, in which one stage works at a time",
            "set method.accumulation to a few times the number of stages",
        )


def _is_exact(recipe: Recipe) -> bool:
    return recipe.engine.schedule in EXACT_SCHEDULE_NAMES


def _stages_per_process(recipe: Recipe) -> int:
    schedule = recipe.engine.schedule
    return STAGES_PER_PROCESS.get(schedule, 1) if isinstance(schedule, str) else 1


def _known_places(recipe: Recipe) -> int | None:
    """Return the number of processes of one replica, None where it takes the net or a division fails."""
    partition = recipe.partition
    stages = len(partition.cuts) + 1 if partition.cuts else partition.stages
    if not isinstance(stages, int) or stages % _stages_per_process(recipe):
        return None
    return stages // _stages_per_process(recipe)


def _rate_warnings(recipe: Recipe, given: frozenset[str]) -> Iterator[Problem]:
    training = recipe.training
    if training.warmup_epochs > training.epochs:
        what = (
            f"{training.warmup_epochs:g} is more than training.epochs = {training.epochs}: warm-up never ends"
        )
        yield Problem("training.warmup_epochs", what, "the learning rate stays below optimizer.lr")
    if training.lr_decay != "multi-step":
        return
    late = [epoch for epoch in training.milestones if epoch >= training.epochs]
    if late:
        what = (
            f"{late} is not before the end, training.epochs = {training.epochs}: the rate does not fall there"
        )
        yield Problem("training.milestones", what)
    if not training.milestones and "training.lr_decay" in given:
        what = '"multi-step" without training.milestones never lowers the rate'
        yield Problem("training.lr_decay", what, 'set training.milestones, or choose "cosine"')


def _idle_model(recipe: Recipe) -> Iterator[IdleKey]:
    model = recipe.model
    name = f"model.name = {shown(model.name)}"
    user_made = is_import_path(model.name)
    if model.name != "revnet-iso" and not user_made:
        yield IdleKey("model.depth", name, "revnet-iso")
    if not user_made:
        yield IdleKey("model.arguments", name, '"package.module:function"')


def _idle_method_and_partition(recipe: Recipe) -> Iterator[IdleKey]:
    method, partition, engine = recipe.method, recipe.partition, recipe.engine
    name = f"method.name = {shown(method.name)}"
    if method.name != "delayed":
        yield IdleKey("method.keep", name, '"delayed"')
    if method.name in ("backprop", *BLOCK_METHODS):
        yield IdleKey("method.bn_statistics", name, "methods that evaluate twice")
    elif method.name == "delayed" and method.keep == "graph":
        yield IdleKey("method.bn_statistics", 'method.keep = "graph"', "methods that evaluate twice")
    if partition.cuts:
        yield IdleKey("partition.stages", "partition.cuts", "recipes without cuts")
        yield IdleKey("partition.balance", "partition.cuts", "recipes without cuts")
    elif partition.stages == "units" or (partition.stages == "auto" and method.name in BLOCK_METHODS):
        stages = f"partition.stages = {shown(partition.stages)}"
        yield IdleKey("partition.balance", stages, "a number of stages")
    if method.estimator is not None:
        yield from idle_engine_keys(recipe, method.estimator)
    elif method.name in LOCKED_METHODS:
        yield IdleKey("engine.slack", name, '"petra" and "delayed"')
    elif engine.schedule not in ("auto", "tight"):
        yield IdleKey("engine.slack", f"engine.schedule = {shown(engine.schedule)}", '"tight"')


def _idle_engine(recipe: Recipe) -> Iterator[IdleKey]:
    engine = recipe.engine
    if engine.mode == "in-process":
        for key in ("backend", "stall_timeout"):
            yield IdleKey(f"engine.{key}", 'engine.mode = "in-process"', "several processes")
        yield IdleKey("engine.max_restarts", 'engine.mode = "in-process"', RESTARTS_ALONE)
    if engine.schedule != "least":
        schedule = f"engine.schedule = {shown(engine.schedule)}"
        yield IdleKey("engine.lookahead", schedule, '"least" (give lookaheads of your own as the schedule)')
    if engine.devices:
        yield IdleKey("engine.device", "engine.devices", "recipes without engine.devices")
    if _is_exact(recipe):
        for key in ("wire_dtype", "wire_dtype_backward"):
            yield IdleKey(
                f"engine.{key}",
                f"engine.schedule = {shown(engine.schedule)}",
                "the other schedules (an exact pipeline sends what it computes)",
            )


def _idle_optimizer(recipe: Recipe) -> Iterator[IdleKey]:
    optimizer = recipe.optimizer
    name = f"optimizer.name = {shown(optimizer.name)}"
    used_by = {"momentum": ("sgd", "lars"), "nesterov": ("sgd", "lars"), "betas": ("adamw",)}
    for key, users in used_by.items():
        # A class of the user's takes what its constructor names, which only building it can tell.
        if optimizer.name not in users and not is_import_path(optimizer.name):
            yield IdleKey(f"optimizer.{key}", name, " and ".join(f'"{user}"' for user in users))
    if optimizer.name in used_by["nesterov"] and optimizer.momentum == 0:
        yield IdleKey("optimizer.nesterov", "optimizer.momentum = 0", "a momentum above 0")
    if optimizer.weight_decay == 0:
        yield IdleKey("optimizer.decay_norm_and_bias", "optimizer.weight_decay = 0", "a weight decay above 0")


def _idle_drift(recipe: Recipe) -> Iterator[IdleKey]:
    """Yield the watch over rebuilt inputs, where none are rebuilt."""
    method = recipe.method
    rebuilding = '"petra", "reversible", and "delayed" with keep = "parameters"'
    because = ""
    if method.name in ("backprop", *BLOCK_METHODS):
        because = f"method.name = {shown(method.name)}"
    elif method.name == "delayed" and method.keep != "parameters":
        because = f"method.keep = {shown(method.keep)}"
    elif not recipe.diagnostics.drift_every:
        yield IdleKey("diagnostics.drift", "diagnostics.drift_every = 0", "a number of microbatches")
    if because:
        yield IdleKey("diagnostics.drift", because, rebuilding)
        yield IdleKey("diagnostics.drift_every", because, rebuilding)


def _idle_training_and_tracking(recipe: Recipe) -> Iterator[IdleKey]:
    training = recipe.training
    yield from _idle_drift(recipe)
    decay = f"training.lr_decay = {shown(training.lr_decay)}"
    if training.lr_decay != "multi-step":
        yield IdleKey("training.milestones", decay, '"multi-step"')
        yield IdleKey("training.decay_factor", decay, '"multi-step"')
    elif not training.milestones:
        yield IdleKey("training.decay_factor", "no training.milestones", '"multi-step" with milestones')
    if training.lr_decay != "polynomial":
        yield IdleKey("training.polynomial_power", decay, '"polynomial"')
    if not recipe.tracking.mlflow:
        for key in ("uri", "experiment", "run_name"):
            yield IdleKey(f"tracking.{key}", "tracking.mlflow = false", "tracking.mlflow = true")
