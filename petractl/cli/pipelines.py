"""The pipelines that `petractl simulate` is asked about: a recipe's, or one given in numbers."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from petractl.errors import UserError

if TYPE_CHECKING:
    from petractl.build import CheckedPlan
    from petractl.methods.family import MethodSpec
    from petractl.planning.entries import Entry
    from petractl.planning.times import StageTimes


class Pipeline(Protocol):
    """Stages whose times depend on the method."""

    @property
    def num_stages(self) -> int:
        """J."""
        ...

    @property
    def accumulation(self) -> int:
        """Microbatches per update, k."""
        ...

    @property
    def batch_size(self) -> int | None:
        """Images per microbatch, of all replicas together; None where there are no images."""
        ...

    @property
    def title(self) -> str:
        """What it is."""
        ...

    @property
    def note(self) -> str:
        """Where its times come from."""
        ...

    def times(self, entry: "Entry") -> "tuple[StageTimes, ...]":
        """Return the stages' times under a method."""
        ...


@dataclass(frozen=True, slots=True)
class NumbersPipeline:
    """A pipeline given in milliseconds: of PETRA, and the backward of a method that keeps the graph."""

    forward_ms: tuple[float, ...]
    backward_ms: tuple[float, ...]
    plain_backward_ms: tuple[float, ...]
    update_ms: float
    message_kib: float
    accumulation: int
    batch_size: int | None = None

    @property
    def num_stages(self) -> int:
        """J."""
        return len(self.forward_ms)

    @property
    def title(self) -> str:
        """What it is."""
        forward, backward, plain = (
            _values(row) for row in (self.forward_ms, self.backward_ms, self.plain_backward_ms)
        )
        times = f"forward {forward} ms, backward {backward} ms ({plain} with the graph kept)"
        return f"{self.num_stages} stages, {times}"

    @property
    def note(self) -> str:
        """Nothing: the times are the user's."""
        return ""

    def times(self, entry: "Entry") -> "tuple[StageTimes, ...]":
        """Return the stages' times under a method."""
        from petractl.planning.times import StageTimes

        backward = self.plain_backward_ms if entry.keeps_graph else self.backward_ms
        size = round(self.message_kib * 1024)
        return tuple(
            StageTimes(f / 1e3, b / 1e3, self.update_ms / 1e3, message_up_bytes=size, message_down_bytes=size)
            for f, b in zip(self.forward_ms, backward, strict=True)
        )

    def with_stages(self, num_stages: int) -> "NumbersPipeline":
        """Return as many stages like the first."""
        rows = {
            name: (getattr(self, name)[0],) * num_stages
            for name in ("forward_ms", "backward_ms", "plain_backward_ms")
        }
        return replace(self, **rows)  # type: ignore[arg-type]


class RecipePipeline:
    """The pipeline of a recipe, cut as it would be run."""

    def __init__(self, plan: "CheckedPlan", *, name: str) -> None:
        self._plan = plan
        self._name = name
        self.num_stages = plan.num_stages
        self.accumulation = plan.recipe.method.accumulation
        self.batch_size: int | None = plan.recipe.data.batch_size * plan.recipe.engine.replicas
        self.note = "times by FLOPs, for a nominal device of 1 TFLOP/s"
        self._times = functools.cache(lambda method: times_of(plan, method=method))

    @property
    def title(self) -> str:
        """What it is."""
        return f"{self._name}: {self._plan.recipe.model.name} in {self.num_stages} stages"

    def own(self) -> "Entry":
        """Return the recipe's own method and schedule."""
        from petractl.planning.entries import make_entry

        engine, method = self._plan.recipe.engine, self._plan.method
        schedule = engine.schedule
        keep = f":{method.keep}" if method.keep else ""
        entry = make_entry("", method=method, schedule=schedule, slack=engine.slack)
        what = entry.schedule if isinstance(entry.schedule, str) else list(entry.schedule)
        slack = f" slack={entry.slack}" if entry.slack else ""
        return replace(entry, label=f"{method.name}{keep}/{what}{slack}".replace(", ", ","))

    def times(self, entry: "Entry") -> "tuple[StageTimes, ...]":
        """Return the stages' times under a method."""
        return self._times(entry.method)


def times_of(plan: "CheckedPlan", *, method: "MethodSpec") -> "tuple[StageTimes, ...]":
    """Return the times of a recipe's stages under a method, on its cuts."""
    import torch

    from petractl.build.parts import build_units
    from petractl.methods.family import keepings
    from petractl.models.units import is_reversible
    from petractl.planning.nominal import nominal_times

    with torch.device("meta"):
        model = build_units(plan.recipe, classes=plan.classes, stem=plan.stem, channels=plan.info.channels)
    return nominal_times(
        plan.costs,
        kept=keepings(method, [is_reversible(unit) for unit in model.units]),
        cuts=plan.cuts,
        batch_size=plan.recipe.data.batch_size,
    )


def recipe_pipeline(source: str, *, overrides: Sequence[str]) -> RecipePipeline:
    """Return a recipe's pipeline.

    Raises:
        UserError: what `validate` would say.
    """
    from petractl.recipe import load_recipe

    loaded = load_recipe(source, overrides=list(overrides))
    from petractl import build

    return RecipePipeline(build.check(loaded), name=loaded.name)


def numbers_pipeline(
    *,
    stages: int | None,
    forward_ms: str | None,
    backward_ms: str | None,
    plain_backward_ms: str | None,
    update_ms: float,
    message_kib: float,
    accumulation: int,
    speeds: str | None,
) -> NumbersPipeline:
    """Read a pipeline from the command line's numbers; a single number is for all stages.

    Raises:
        UserError: numbers that are missing, wrong, or not one per stage.
    """
    if forward_ms is None or backward_ms is None:
        missing = "--forward-ms" if forward_ms is None else "--backward-ms"
        raise UserError(
            "is missing", where=missing, hint="give the milliseconds of one microbatch on a stage"
        )
    rows = {"--forward-ms": parse_numbers(forward_ms, where="--forward-ms")}
    rows["--backward-ms"] = parse_numbers(backward_ms, where="--backward-ms")
    if plain_backward_ms is not None:
        rows["--plain-backward-ms"] = parse_numbers(plain_backward_ms, where="--plain-backward-ms")
    rows["--speeds"] = parse_numbers(speeds or "1", where="--speeds")
    count = stages or max(map(len, rows.values()))
    for where, values in rows.items():
        if len(values) not in (1, count):
            raise UserError(
                f"has {len(values)} numbers for {count} stages", where=where, hint="give one, or one each"
            )
    full = {where: values * count if len(values) == 1 else values for where, values in rows.items()}
    if min(full["--speeds"]) <= 0:
        raise UserError("must be above 0", where="--speeds", hint="1 is as fast as the times given")
    for where, values in full.items():
        full[where] = values if where == "--speeds" else _scaled(values, full["--speeds"])
    forward, backward = full["--forward-ms"], full["--backward-ms"]
    pairs = list(zip(forward, backward, strict=True))
    plain = full.get("--plain-backward-ms", tuple(b - f if b > f else b for f, b in pairs))
    if any(f + min(b, p) <= 0 for (f, b), p in zip(pairs, plain, strict=True)):
        raise UserError("0 ms for forward and backward", where="--forward-ms", hint="give every stage a time")
    return NumbersPipeline(forward, backward, plain, update_ms, message_kib, accumulation)


def parse_numbers(text: str, *, where: str) -> tuple[float, ...]:
    """Read numbers of at least 0, parted by commas.

    Raises:
        UserError: anything else.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 <= value < float("inf") for value in values):
        raise UserError(
            f'"{text}" is not a list of numbers of at least 0', where=where, hint="write, e.g., 20 or 20,25"
        )
    return values


def parse_sweep(text: str) -> tuple[int, ...]:
    """Read numbers of stages; "2,4,...,64" goes on as the two before it.

    Raises:
        UserError: anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    wrong = UserError(
        f'"{text}" is not a list of numbers of stages',
        where="--sweep",
        hint="write, for example, 2,4,8 or 2,4,...,4096",
    )
    found: list[int] = []
    for n, part in enumerate(parts):
        if part == "...":
            if n < 2 or n != len(parts) - 2 or not parts[-1].isdigit() or not found[0] < found[1]:
                raise wrong
            found += _continued(found[-2], found[-1], int(parts[-1]))
        elif part.isdigit() and int(part) > 0:
            found.append(int(part))
        else:
            raise wrong
    found = sorted(dict.fromkeys(found))
    if found[-1] > MAX_STAGES:
        raise UserError(
            f"{found[-1]} stages are too many", where="--sweep", hint=f"give at most {MAX_STAGES:,}"
        )
    return tuple(found)


MAX_STAGES = 16384


def _continued(before: int, last: int, end: int) -> list[int]:
    """Return what lies between `last` and `end`: by the same factor if it is whole, else by the same step."""
    found = []
    grows = last % before == 0
    following = last * (last // before) if grows else 2 * last - before
    while following < min(end, MAX_STAGES + 1):
        found.append(following)
        before, last = last, following
        following = last * (last // before) if grows else 2 * last - before
    return found


def _scaled(values: tuple[float, ...], speeds: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(value / speed for value, speed in zip(values, speeds, strict=True))


def _values(row: tuple[float, ...]) -> str:
    low, high = min(row), max(row)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
