"""Models of the user's own: a function, named "package.module:function", that returns a list of units.

The function may live in an installed package or in a file of the current directory. It is called with the
recipe's `model.arguments` and with those of `width, classes, in_channels, stem, depth` that its signature
names. Whatever is wrong with it is told before a run starts, with the place in the user's file where it
failed. A user's auxiliary net is called in the same way (`auxiliary`).
"""

import difflib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from petractl.errors import UserError
from petractl.models.registry import BuiltModel, ModelShape


def build_user_model(spec: str, *, shape: ModelShape, arguments: Mapping[str, Any]) -> BuiltModel:
    """Call the function that `spec` ("package.module:function") names and return its units.

    `arguments` win over the values of `shape` where both have a key.

    Raises:
        UserError: no such module or function, arguments that it does not take, an exception inside it, or a
            result that is not a list of modules, each with parameters of its own.
    """
    result = call_named(spec, section="model", offered=asdict(shape), arguments=arguments)
    units = _checked_units(spec, result)
    names = tuple(f"unit{index} ({type(unit).__name__})" for index, unit in enumerate(units))
    return BuiltModel(units, names)


def call_named(
    spec: str, *, section: str, offered: Mapping[str, Any], arguments: Mapping[str, Any]
) -> object:
    """Call the function that `spec` names; `section` is the recipe's that has its `name` and `arguments`.

    It gets `arguments`, and of `offered` what its signature names; `arguments` win.

    Raises:
        UserError: no such module or function, arguments that it does not take, or an exception inside it.
    """
    where = f"{section}.name"
    function = import_named(spec, where=where)
    if not callable(function):
        raise UserError(f"{spec} is a {type(function).__name__}, not a function", where=where)
    keywords = _keywords(spec, function, where=f"{section}.arguments", offered=offered, arguments=arguments)
    try:
        return function(**keywords)
    except Exception as error:
        raise UserError(
            f"{spec} raised {describe_exception(error)}",
            where=where,
            hint=f"it was called with {', '.join(f'{key}={value!r}' for key, value in keywords.items())}",
        ) from error


def import_named(spec: str, *, where: str) -> Any:
    """Return the object that "package.module:name" names; modules of the current directory are found too.

    The current directory stays at the head of `sys.path`, as with `python -m`, for what the module imports
    later.

    Raises:
        UserError: the text has another form, the module cannot be imported, or it has no such name.
    """
    module_name, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *name.split(".")]):
        raise UserError(
            f'"{spec}" is not of the form "package.module:name"',
            where=where,
            hint='for example "nets:my_net"',
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    value: Any = _import(module_name, where=where)
    for part in name.split("."):
        if not hasattr(value, part):
            public = [known for known in vars(value) if not known.startswith("_")]
            close = difflib.get_close_matches(part, public, n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"it is looked for in {module_name}"
            raise UserError(f'{module_name} has no "{part}"', where=where, hint=hint)
        value = getattr(value, part)
    return value


def _import(module_name: str, *, where: str) -> Any:
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(
                f"{module_name} imports {error.name}, which is not installed", where=where
            ) from error
        raise UserError(
            f'there is no module "{error.name}"',
            where=where,
            hint=f"modules are looked for in {Path.cwd()} and among the installed packages",
        ) from error
    except Exception as error:
        raise UserError(f"importing {module_name} raised {describe_exception(error)}", where=where) from error


def describe_exception(error: BaseException) -> str:
    """Return type, message and the file and line that raised it, on one line."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{place}" if text else f"{type(error).__name__}{place}"


def _keywords(
    spec: str,
    function: Callable[..., Any],
    *,
    where: str,
    offered: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {**offered, **arguments}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    by_keyword = [
        name
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    unknown = sorted(key for key in arguments if key not in by_keyword and not takes_any)
    if unknown:
        raise UserError(
            f"{spec} takes no {', '.join(unknown)}",
            where=where,
            hint=f"it takes {', '.join(by_keyword) or 'nothing'}",
        )
    keywords = {key: value for key, value in offered.items() if takes_any or key in by_keyword}
    keywords.update(arguments)
    missing = sorted(
        name
        for name in by_keyword
        if name not in keywords and parameters[name].default is inspect.Parameter.empty
    )
    if missing:
        raise UserError(
            f"{spec} needs {', '.join(missing)}",
            where=where,
            hint=f"give them as {where}; {', '.join(offered)} are passed by themselves",
        )
    return keywords


def _checked_units(spec: str, result: object) -> list[nn.Module]:
    hint = "return a list of nn.Module, first unit to last"
    if not isinstance(result, (list, tuple, nn.ModuleList, nn.Sequential)):
        raise UserError(f"{spec} returned a {type(result).__name__}", where="model.name", hint=hint)
    units = list(result)
    if not units:
        raise UserError(f"{spec} returned no unit", where="model.name", hint=hint)
    for index, unit in enumerate(units):
        if not isinstance(unit, nn.Module):
            raise UserError(
                f"item {index} of what {spec} returned is a {type(unit).__name__}",
                where="model.name",
                hint=hint,
            )
    check_nothing_shared(spec, units, where="model.name", kind="units")
    return units


def check_nothing_shared(spec: str, modules: Sequence[nn.Module], *, where: str, kind: str) -> None:
    """Check that no two of the modules have a tensor in common; `kind` is what they are called.

    Raises:
        UserError: two have.
    """
    owners: dict[int, int] = {}
    for index, module in enumerate(modules):
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            owner = owners.setdefault(id(tensor), index)
            if owner != index:
                raise UserError(
                    f'{kind} {owner} and {index} of {spec} share the tensor "{name}"',
                    where=where,
                    hint="each needs tensors of its own: a stage updates its parameters by itself",
                )
