"""The names of the models, and how a name becomes a list of units.

A model of the zoo is a builder function under `@register_model`; its name is the function's (`_` written as
`-`). A builder takes keyword arguments and returns the units with a short human name for each. A name with a
colon ("package.module:function") is a function of the user's.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from petractl.errors import UserError

STEMS = ("cifar", "imagenet")


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """The units of a model, first to last, and a name for each that a person reads ("block2.1 (down)")."""

    units: list[nn.Module]
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the models of the zoo can be told.

    `width` is the stem's channels per stream (bottleneck groups have 4 times as many), `depth` the number of
    couplings of `revnet-iso`; the other models have theirs in the name.
    """

    width: int
    classes: int
    in_channels: int
    stem: str
    depth: int


Builder = Callable[[ModelShape], BuiltModel]

_BUILDERS: dict[str, Builder] = {}


def register_model(builder: Builder) -> Builder:
    """Register a builder function under its own name."""
    name = builder.__name__.replace("_", "-")
    assert name not in _BUILDERS, f"two models are called {name}"
    _BUILDERS[name] = builder
    return builder


def list_models() -> tuple[str, ...]:
    """Return the names of the zoo, in the order of their definition."""
    return tuple(_BUILDERS)


def describe_model(name: str) -> str:
    """Return the one line that says what a model of the zoo is."""
    return (_BUILDERS[name].__doc__ or "").strip().partition("\n")[0]


def build_model(
    name: str,
    *,
    width: int = 64,
    classes: int,
    in_channels: int = 3,
    stem: str = "cifar",
    depth: int = 8,
    arguments: Mapping[str, Any] | None = None,
) -> BuiltModel:
    """Build a model with newly initialised weights, on the current default device.

    The weights come from torch's global random generator; build under `torch.device("meta")` to allocate
    nothing.

    Args:
        name: a name of `list_models()`, or "package.module:function".
        width: channels per stream of the stem, at least 1.
        classes: number of classes, at least 1.
        in_channels: channels of the images.
        stem: "cifar" (3x3, stride 1) or "imagenet" (7x7, stride 2, max-pool 3x3/2).
        depth: number of couplings of `revnet-iso`.
        arguments: keywords for the user's function.

    Raises:
        UserError: unknown name or stem, a number below 1, arguments for a model of the zoo, or a user's
            function that cannot be used.
    """
    shape = ModelShape(width=width, classes=classes, in_channels=in_channels, stem=stem, depth=depth)
    _check(shape)
    if ":" in name:
        # A cycle otherwise: the user's models are returned as `BuiltModel` too.
        from petractl.models.user import build_user_model

        return build_user_model(name, shape=shape, arguments=arguments or {})
    if name not in _BUILDERS:
        raise _unknown(name)
    if arguments:
        keys = ", ".join(sorted(arguments))
        raise UserError(
            f"{name} takes no arguments, but got {keys}",
            where="model.arguments",
            hint='arguments are for a model of your own ("package.module:function")',
        )
    return _BUILDERS[name](shape)


def _unknown(name: str) -> UserError:
    close = difflib.get_close_matches(name.lower().replace("_", "-"), _BUILDERS, n=1)
    guess = f'did you mean "{close[0]}"? ' if close else ""
    return UserError(
        f'there is no model "{name}"',
        where="model.name",
        hint=f'{guess}there are {", ".join(_BUILDERS)}, and "package.module:function" for one of your own',
    )


def _check(shape: ModelShape) -> None:
    for key in ("width", "classes", "in_channels", "depth"):
        value = getattr(shape, key)
        if value < 1:
            raise UserError(f"{value} is below 1", where=f"model.{key}", hint="give a positive number")
    if shape.stem not in STEMS:
        raise UserError(
            f'there is no stem "{shape.stem}"', where="model.stem", hint=f"there are {', '.join(STEMS)}"
        )
