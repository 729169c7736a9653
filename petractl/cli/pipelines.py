"""The pipelines that `petractl simulate` is asked about, and those given in numbers."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from petractl.errors import UserError

if TYPE_CHECKING:
    from petractl.planning.entries import Entry
    from petractl.planning.simulated import Simulated
    from petractl.planning.times import Link, StageTimes


_LEAST_MS, _MOST = 1e-6, 1e9


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

    @property
    def is_nominal(self) -> bool:
        """Whether only proportions are meant."""
        ...

    def problem(self, entry: "Entry") -> str:
        """Return why an entry cannot be run on it; "" where it can."""
        ...

    def times(self, entry: "Entry") -> "tuple[StageTimes, ...]":
        """Return the stages' times under a method."""
        ...

    def chunks(self, entry: "Entry") -> "tuple[StageTimes, ...] | None":
        """Return the times of an interleaved pipeline's stages, two per process; None: equal halves."""
        ...

    def links(self, given: "Link | None") -> "Link | tuple[Link, ...]":
        """Return the links between the stages; `given` ones win."""
        ...

    def memory_bytes(self, entry: "Entry", result: "Simulated") -> tuple[int, ...] | None:
        """Return the most that each process holds; None where that is not known."""
        ...

    def limits_bytes(self) -> tuple[int | None, ...]:
        """Return the memory of each device, None where it is not known."""
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

    @property
    def is_nominal(self) -> bool:
        """No: the times are the user's."""
        return False

    def problem(self, entry: "Entry") -> str:
        """Return nothing: without a net, every method is possible."""
        del entry
        return ""

    def chunks(self, entry: "Entry") -> "tuple[StageTimes, ...] | None":
        """Return None: where a process holds two stages, they are halves."""
        del entry
        return None

    def links(self, given: "Link | None") -> "Link | tuple[Link, ...]":
        """Return the links between the stages."""
        from petractl.planning.times import Link

        return given or Link()

    def memory_bytes(self, entry: "Entry", result: "Simulated") -> tuple[int, ...] | None:
        """Return None: there is no net to hold."""
        del entry, result
        return None

    def limits_bytes(self) -> tuple[int | None, ...]:
        """Return None for each stage."""
        return (None,) * self.num_stages

    def with_stages(self, num_stages: int) -> "NumbersPipeline":
        """Return as many stages like the first."""
        rows = {
            name: (getattr(self, name)[0],) * num_stages
            for name in ("forward_ms", "backward_ms", "plain_backward_ms")
        }
        return replace(self, **rows)  # type: ignore[arg-type]


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
    rows["--speeds"] = parse_speeds(speeds or "1")
    count = stages or max(map(len, rows.values()))
    for where, values in rows.items():
        if len(values) not in (1, count):
            raise UserError(
                f"has {len(values)} numbers for {count} stages", where=where, hint="give one, or one each"
            )
    full = {where: values * count if len(values) == 1 else values for where, values in rows.items()}
    for where, values in full.items():
        full[where] = values if where == "--speeds" else _scaled(values, full["--speeds"])
    forward, backward = full["--forward-ms"], full["--backward-ms"]
    pairs = list(zip(forward, backward, strict=True))
    plain = full.get("--plain-backward-ms", tuple(b - f if b > f else b for f, b in pairs))
    if any(f + min(b, p) < _LEAST_MS for (f, b), p in zip(pairs, plain, strict=True)):
        raise UserError(
            f"forward and backward of a stage take less than {_LEAST_MS:g} ms",
            where="--forward-ms",
            hint="give every stage a time",
        )
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
    if not values or not all(0 <= value <= _MOST for value in values):
        raise UserError(
            f'"{text}" is not a list of numbers from 0 to {_MOST:,.0f}',
            where=where,
            hint="write, for example, 20 or 20,25",
        )
    return values


def parse_speeds(text: str) -> tuple[float, ...]:
    """Read the speeds of devices.

    Raises:
        UserError: anything but numbers above 0.
    """
    speeds = parse_numbers(text, where="--speeds")
    if min(speeds) <= 0:
        raise UserError("must be above 0", where="--speeds", hint="1 is as fast as the times given")
    return speeds


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
