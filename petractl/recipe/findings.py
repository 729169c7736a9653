"""What a check of a recipe can find, and how it shows values."""

from dataclasses import dataclass

from petractl.errors import Problem


@dataclass(frozen=True, slots=True)
class Conflict:
    """A contradiction between keys."""

    keys: tuple[str, ...]
    problem: Problem


@dataclass(frozen=True, slots=True)
class IdleKey:
    """A key with no effect: the setting that makes it so, and the one under which it would matter."""

    key: str
    because: str
    used_with: str


def conflict(what: str, hint: str, key: str, *others: str) -> Conflict:
    """Return the contradiction that `key`, whose problem it is, has with the other keys."""
    return Conflict((key, *others), Problem(key, what, hint))


def shown(value: str | int | tuple[int, ...] | tuple[str, ...]) -> str:
    """Return a value as a recipe has it."""
    if isinstance(value, tuple):
        return f"[{', '.join(shown(item) for item in value)}]"
    return f'"{value}"' if isinstance(value, str) else str(value)
