"""What of `petractl simulate`'s options goes together: none is ever ignored."""

from collections.abc import Iterator, Mapping
from typing import Any

from petractl.cli.places import check_place
from petractl.errors import UserError

_COMMAND = "petractl simulate"
_NUMBERS = (
    "stages",
    "forward_ms",
    "backward_ms",
    "plain_backward_ms",
    "update_ms",
    "message_kib",
    "accumulation",
)
_LEAST_GBPS, _MOST_GBPS = 1e-6, 1e6

Asked = Mapping[str, Any]
"""The command's parameters by name; what is false was not given."""
Clash = tuple[bool, str, str, str]
"""Whether it is so, where, what is wrong, and what to do."""


def check_request(asked: Asked) -> None:
    """Refuse options that contradict each other, and places that cannot be written to.

    Raises:
        UserError: the first of them.
    """
    for name, suffix in (("gantt", ".png"), ("trace", ".json"), ("plot", ".png")):
        check_place(asked[name], suffix)
    bandwidth = asked["bandwidth_gbps"]
    if bandwidth and not _LEAST_GBPS <= bandwidth <= _MOST_GBPS:
        raise UserError(
            f"{bandwidth:g} is no link's bandwidth",
            where="--bandwidth-gbps",
            hint=f"give {_LEAST_GBPS:g} to {_MOST_GBPS:,.0f}, or 0 for one without a limit",
        )
    for is_wrong, where, what, hint in (*_about_the_pipeline(asked), *_about_the_rest(asked)):
        if is_wrong:
            raise UserError(what, where=where, hint=hint)


def _about_the_pipeline(asked: Asked) -> Iterator[Clash]:
    recipe, compare, sweep = bool(asked["recipe"]), bool(asked["compare"]), bool(asked["sweep"])
    numbers = any(asked[name] for name in _NUMBERS)
    own = "a recipe" if recipe else "--compare"
    yield (
        numbers and (recipe or compare),
        _COMMAND,
        f"{own} has stages, times and accumulation of its own",
        "leave out the options that give them; a recipe is changed with --set",
    )
    yield (
        not (numbers or recipe or compare or sweep),
        _COMMAND,
        "names no pipeline",
        "give a recipe, or --stages 8 --forward-ms 20 --backward-ms 60",
    )
    yield (
        bool(asked["overrides"]) and not recipe,
        "--set",
        "changes a recipe, and there is none",
        "name one",
    )
    for name in ("flops", "device_spec", "fresh"):
        yield (
            bool(asked[name]) and not recipe,
            "--" + name.replace("_", "-"),
            "says where a recipe's times are from, and there is no recipe",
            "name one",
        )
    yield (
        asked["flops"] and asked["fresh"],
        "--fresh",
        "measures again, and --flops measures nothing",
        "give one of them",
    )
    yield (
        bool(asked["speeds"]) and compare and not recipe,
        "--speeds",
        "the run's own times are those of its devices",
        "leave it out",
    )
    yield (
        sweep and recipe,
        "--sweep",
        "is of equal stages, and a recipe has its own",
        "leave out the recipe, and give --forward-ms and --backward-ms",
    )


def _about_the_rest(asked: Asked) -> Iterator[Clash]:
    charts, sweep = bool(asked["gantt"] or asked["trace"]), bool(asked["sweep"])
    yield (
        bool(asked["plot"]) and not sweep,
        "--plot",
        "draws a sweep, and there is none",
        "give --sweep 2,4,...,64, or --gantt F.png",
    )
    yield (
        sweep and asked["stages"] is not None,
        "--stages",
        "--sweep has numbers of stages of its own",
        "leave one of them out",
    )
    yield (
        sweep and (charts or asked["microbatches"] is not None),
        "--sweep",
        "is of the steady state and has no timeline",
        "leave out --gantt, --trace and --microbatches",
    )
    yield (
        bool(asked["seed"]) and not asked["jitter"],
        "--seed",
        "is the jitter's, and there is none",
        "give --jitter 0.1 too, or leave it out",
    )
    own = charts or any(asked[name] for name in ("microbatches", "schedules", "sweep", "jitter"))
    yield (
        bool(asked["compare"]) and own,
        "--compare",
        "takes schedule and length from the run",
        "leave out --schedules, --microbatches, --sweep, --jitter, --gantt and --trace",
    )
