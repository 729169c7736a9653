"""The checks of methods that train block by block: their keys in [method] and [auxiliary], their engine.

Which choices of a forward gradient contradict each other is in `petractl.estimator`. Here are the keys that
have no effect beside the others, and what the engine cannot do for an estimate: run forwards ahead where
nothing comes down, use several processes where each block looks through those above it.
"""

from collections.abc import Iterator

from petractl.estimator import FROM_ABOVE, Estimator, contradictions
from petractl.recipe.findings import Conflict, IdleKey, conflict, shown
from petractl.recipe.schema import (
    AUXILIARY_NAMES_WITH_WIDTH,
    ESTIMATOR_KEYS,
    EXACT_SCHEDULE_NAMES,
    Recipe,
    is_import_path,
)

_RELATED = {
    "directions": ("guess",),
    "normalise_random": ("guess",),
    "granularity": ESTIMATOR_KEYS,
    "projection": ("space", "coefficients", "directions", "granularity"),
    "statistics": ("derivative", "space", "coefficients", "target", "guess"),
    "tangents": ("derivative", "target", "guess", "space", "projection"),
}
"""What a contradiction of a key may be with."""


def block_conflicts(recipe: Recipe, given: frozenset[str]) -> Iterator[Conflict]:
    """Yield the contradictions of methods that train block by block, and keys of theirs in other methods."""
    yield from _foreign_keys(recipe, given)
    yield from _auxiliary_conflicts(recipe)
    choice = recipe.method.estimator
    if choice is None:
        return
    for problem in contradictions(choice):
        related = _RELATED.get(problem.key.removeprefix("method."), ESTIMATOR_KEYS)
        yield Conflict((problem.key, "method.name", *(f"method.{key}" for key in related)), problem)
    yield from _process_conflicts(recipe, choice)
    yield from _schedule_conflicts(recipe, choice)
    yield from _slack_conflicts(recipe, choice)
    yield from _balance_conflicts(recipe)


def idle_block_keys(recipe: Recipe) -> Iterator[IdleKey]:
    """Yield the keys of forward gradients and auxiliary nets that have no effect in this recipe."""
    method = recipe.method
    if method.name != "forward-gradient":
        for key in ESTIMATOR_KEYS:
            yield IdleKey(f"method.{key}", f"method.name = {shown(method.name)}", '"forward-gradient"')
    elif method.estimator is not None:
        yield from _idle_guess(method.estimator)
        yield from _idle_projection(method.estimator)
        yield from _idle_derivative(method.estimator)
    yield from _idle_auxiliary(recipe)


def idle_engine_keys(recipe: Recipe, choice: Estimator) -> Iterator[IdleKey]:
    """Yield the keys of [engine] that have no effect with an estimator."""
    if not choice.sends_down:
        alone = f"method.name = {shown(recipe.method.name)}"
        if recipe.method.name != "local":
            alone = "blocks that each look above" if choice.probes else "blocks that learn by themselves"
        for key in ("slack", "wire_dtype_backward"):
            yield IdleKey(f"engine.{key}", alone, "estimates that are sent down")
        return
    if choice.carries_tangents:
        what = "derivatives along tangents, which go down as they are"
        yield IdleKey("engine.wire_dtype_backward", what, "gradients that are sent down")
    if recipe.engine.schedule != "tight":
        yield IdleKey("engine.slack", f"engine.schedule = {shown(recipe.engine.schedule)}", '"tight"')


def _foreign_keys(recipe: Recipe, given: frozenset[str]) -> Iterator[Conflict]:
    name = recipe.method.name
    for key in ESTIMATOR_KEYS:
        if name != "forward-gradient" and f"method.{key}" in given:
            yield conflict(
                f'is for method.name = "forward-gradient" only, but the method is "{name}"',
                'take it out, or set method.name = "forward-gradient"',
                f"method.{key}",
                "method.name",
            )


def _auxiliary_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    auxiliary = recipe.auxiliary
    if auxiliary.width and auxiliary.name not in AUXILIARY_NAMES_WITH_WIDTH:
        own = is_import_path(auxiliary.name)
        yield conflict(
            f'{auxiliary.width} is for "cnn" and "mlp", but the net is "{auxiliary.name}"',
            "give it in auxiliary.arguments" if own else "take it out",
            "auxiliary.width",
            "auxiliary.name",
        )
    if auxiliary.arguments and not is_import_path(auxiliary.name):
        yield conflict(
            f'are for a net of your own ("package.module:function"), but the net is "{auxiliary.name}"',
            "take them out",
            "auxiliary.arguments",
            "auxiliary.name",
        )


def _process_conflicts(recipe: Recipe, choice: Estimator) -> Iterator[Conflict]:
    engine = recipe.engine
    if not choice.probes or engine.mode == "in-process":
        return
    asked = {
        "mode": '"processes"' if engine.mode == "processes" else "",
        "replicas": f"{engine.replicas} replicas" if engine.replicas > 1 else "",
        "devices": "stages with devices of their own" if engine.devices else "",
        "backend": shown(engine.backend) if engine.backend != "auto" else "",
    }
    remedy = 'method.derivative = "reverse"' if choice.guess in FROM_ABOVE else 'method.tangents = "all"'
    for key, what in asked.items():
        if what:
            yield conflict(
                f'{what}: several processes, but with method.tangents = "one" each block looks through all'
                " blocks above it, which takes one process",
                f"set {remedy}, or take engine.{key} out",
                f"engine.{key}",
                "engine.mode",
                "method.tangents",
                "method.derivative",
                "method.target",
                "method.guess",
            )


def _schedule_conflicts(recipe: Recipe, choice: Estimator) -> Iterator[Conflict]:
    schedule, name = recipe.engine.schedule, recipe.method.name
    if schedule in EXACT_SCHEDULE_NAMES:
        return  # told as for every method that is not backprop
    keys = ("engine.schedule", "method.name", "method.target", "method.guess", "method.tangents")
    if not choice.sends_down and schedule != "auto":
        what = (
            f'must be "auto" with this "{name}", not {shown(schedule)}: nothing comes down to a block,'
            " so that there is nothing to run ahead of"
        )
        yield conflict(what, 'set engine.schedule = "auto"', *keys)
    elif schedule == "least":
        what = '"least" goes by measured times, and what tangents and auxiliary nets take is not measured'
        yield conflict(what, 'choose "auto" (sequential), "tight", "paper" or a list', *keys)


def _slack_conflicts(recipe: Recipe, choice: Estimator) -> Iterator[Conflict]:
    engine, name = recipe.engine, recipe.method.name
    if not engine.slack:
        return
    keys = ("engine.slack", "engine.schedule", "method.name", "method.target", "method.guess")
    if not choice.sends_down:
        what = f'must be 0 with this "{name}": nothing comes down to a block, whose latency could be hidden'
        yield conflict(what, "take it out", *keys)
    elif engine.schedule != "tight":
        is_auto = ', which is "sequential" for this method' if engine.schedule == "auto" else ""
        what = f'is for engine.schedule = "tight" only, but the schedule is {shown(engine.schedule)}{is_auto}'
        yield conflict(what, 'set engine.slack = 0, or engine.schedule = "tight"', *keys)


def _balance_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    partition, name = recipe.partition, recipe.method.name
    if partition.balance in ("time", "memory") and not partition.cuts and partition.stages != "units":
        yield conflict(
            f'{shown(partition.balance)} is planned for a backward pass, and "{name}" has none: what its'
            " auxiliary nets and tangents cost is not known",
            'set it to "flops", "parameters" or "uniform", or partition.stages = "units"',
            "partition.balance",
            "partition.stages",
            "partition.cuts",
            "method.name",
        )


def _idle_guess(choice: Estimator) -> Iterator[IdleKey]:
    if not choice.uses_target:
        yield IdleKey("method.target", 'method.projection = "random-sign"', "the other projections")
    if not choice.has_random_guess:
        for key in ("directions", "normalise_random"):
            yield IdleKey(f"method.{key}", f"method.guess = {shown(choice.guess)}", "random guesses")
    elif choice.projection == "span":
        yield IdleKey("method.normalise_random", 'method.projection = "span"', "the other projections")


def _idle_projection(choice: Estimator) -> Iterator[IdleKey]:
    """Yield what says how to compare, where nothing is compared, or not in this space."""
    if choice.is_identity:
        for key in ("space", "granularity", "coefficients"):
            yield IdleKey(f"method.{key}", _same(choice), "a target and a guess that differ")
        return
    space = f"method.space = {shown(choice.space)}"
    if choice.space == "activation":
        yield IdleKey("method.granularity", space, '"batch-weight" and "weight"')
    else:
        yield IdleKey("method.coefficients", space, '"activation"')


def _idle_derivative(choice: Estimator) -> Iterator[IdleKey]:
    if not choice.measures:
        because = _same(choice) if choice.is_identity else 'method.projection = "random-sign"'
        for key in ("statistics", "derivative"):
            yield IdleKey(f"method.{key}", because, "a target that is measured along a guess")
    else:
        because = 'the derivative "reverse"'
        if choice.target not in FROM_ABOVE:
            because = f"method.target = {shown(choice.target)}"
    if not choice.carries_tangents:
        yield IdleKey("method.tangents", because, "a target from above, measured in forward mode")


def _same(choice: Estimator) -> str:
    return f"one target and guess, {shown(choice.guess)}"


def _uses_auxiliaries(choice: Estimator) -> bool:
    return choice.guessing_auxiliary or any(loss in ("local", "above", "sum") for loss in choice.losses)


def _idle_auxiliary(recipe: Recipe) -> Iterator[IdleKey]:
    method, auxiliary, choice = recipe.method, recipe.auxiliary, recipe.method.estimator
    name = f"auxiliary.name = {shown(auxiliary.name)}"
    if choice is None or not _uses_auxiliaries(choice):
        used_with = '"local" and "forward-gradient"'
        because = f"method.name = {shown(method.name)}"
        if choice is not None:
            used_with = "targets and guesses of auxiliary nets"
            because = f"method.guess = {shown(choice.guess)}"
            if choice.uses_target:
                because = f"method.target = {shown(choice.target)} and {because}"
        for key in ("name", "width", "arguments"):
            yield IdleKey(f"auxiliary.{key}", because, used_with)
        return
    if auxiliary.name not in AUXILIARY_NAMES_WITH_WIDTH:
        yield IdleKey("auxiliary.width", name, '"cnn" and "mlp"')
    if not is_import_path(auxiliary.name):
        yield IdleKey("auxiliary.arguments", name, '"package.module:function"')
