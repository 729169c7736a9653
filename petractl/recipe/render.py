"""A recipe as TOML, every key written out, with its docstring as the comment above it.

The text loads back to an equal recipe. A key that has no effect in this recipe is written as a comment that
says why, so the text can be loaded again without a warning; only where its value is not the default is it
written as a key.
"""

from collections.abc import Iterator, Mapping

import tomli_w
from pydantic import BaseModel

from petractl.recipe.checks import idle_keys
from petractl.recipe.schema import SECTIONS, Recipe


def render(recipe: Recipe, *, comments: bool = True) -> str:
    """Return the recipe as TOML; without `comments`, the keys alone."""
    idle = {key.key: f"no effect with {key.because}" for key in idle_keys(recipe)}
    blocks = []
    for name in SECTIONS:
        section = getattr(recipe, name)
        head = [f"# {type(section).__doc__}"] if comments else []
        body = _keys(name, section, idle=idle, comments=comments)
        blocks.append("\n".join([*head, f"[{name}]", *body]))
    return "\n\n".join(blocks) + "\n"


def toml_value(value: object) -> str:
    """Return a value as TOML on one line."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{_toml_key(str(key))} = {toml_value(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").removesuffix("\n")


def _keys(section_name: str, section: BaseModel, *, idle: Mapping[str, str], comments: bool) -> Iterator[str]:
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        reason = idle.get(f"{section_name}.{key}") if value == field.default else None
        line = f"{key} = {toml_value(value)}"
        if comments:
            yield f"# {field.description}"
            yield f"# {line}   ({reason})" if reason else line
        elif not reason:
            yield line


def _toml_key(key: str) -> str:
    return tomli_w.dumps({key: 0}).removesuffix(" = 0\n")
