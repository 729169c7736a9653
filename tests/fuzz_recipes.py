"""Recipes and overrides made by hypothesis: mostly plausible, so that they come past the schema, some wild.

Made from the schema itself: a new key is fuzzed from its first day. Left out is what would reach for the
network.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from fuzz_mutations import WILD_TEXT, WILD_VALUES
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from petractl.recipe import schema
from petractl.recipe.schema import SECTIONS

LEFT_OUT = ("data.download", "data.allow_pipe")
_NAMES = (
    "nowhere:function",
    "petractl.models.revnet:revnet18",
    "json:loads",
    "collections:OrderedDict",
    "a:b:c",
)
_CHOICES: dict[str, tuple[object, ...]] = {
    "model.name": (*schema.MODEL_NAMES, *_NAMES),
    "data.name": schema.DATASET_NAMES,
    "method.name": schema.METHOD_NAMES,
    "auxiliary.name": (*schema.AUXILIARY_NAMES, *_NAMES),
    "optimizer.name": (*schema.OPTIMIZER_NAMES, *_NAMES),
    "partition.stages": (1, 2, 3, 4, 100, "units", "auto"),
    "partition.cuts": ([], [1], [1, 2], [3, 5, 9], [99], [2, 1]),
    "engine.schedule": (*schema.SCHEDULE_NAMES, [0], [2, 1, 0], [1, 1, 0], [9, 9, 9, 0], [0, 1]),
    "engine.lookahead": ([], [0], [1, 0], [3, 2, 1, 0]),
    "engine.device": ("auto", "cpu", "cuda", "cuda:0", "cuda:99"),
    "engine.devices": ([], ["cpu"], ["cpu", "cpu"], ["cuda:7"], ["cpu"] * 4),
    "data.workers": ("auto", 0, 1, 256, 257),
    "optimizer.betas": ([0.9, 0.999], [0.0, 0.0], [1.0, 1.0], [0.9]),
    "training.milestones": ([], [1], [1, 2, 3], [100, 200], [3, 1]),
    "run.checkpoint_every": (
        "1 epoch",
        "5 epochs",
        "50 updates",
        "10 min",
        "0 epochs",
        "1 year",
        "99999999999 epochs",
    ),
    "data.image_entries": (["jpg"], ["png", "seg.png"], [], ["exe"]),
    "data.label_entry": ("cls", "txt", "a.b", "a b"),
    "tracking.uri": (
        "",
        "http://127.0.0.1:9",
        "sqlite:///x.db",
        "./mlruns",
        "http://[",
        "ftp://x",
        "https://u:p@x/",
    ),
}
# What keys depend on each other for: from each of these more is reached.
_BASES: tuple[dict[str, object], ...] = (
    {"model.name": "revnet-iso", "data.name": "digits", "method.name": "petra"},
    {"model.name": "revnet18", "data.name": "fake", "method.name": "delayed", "method.keep": "inputs"},
    {"model.name": "resnet18-8b", "data.name": "digits", "method.name": "forward-gradient"},
    {"model.name": "resnet18-2b", "data.name": "fake", "method.name": "local", "auxiliary.name": "mlp"},
    {"model.name": "revnet50", "data.name": "fake", "method.name": "petra", "engine.mode": "processes"},
    {"model.name": "resnet18", "data.name": "fake", "method.name": "backprop", "engine.schedule": "1f1b"},
    {"model.name": "revnet-iso", "data.name": "digits", "method.name": "petra", "engine.schedule": "least"},
    {"model.name": "revnet34", "data.name": "imagenet", "method.name": "reversible"},
)
_LIKELY_NUMBERS = (0, 1, 2, 3, 4, 7, 8, 10, 32, 64, 96, 1000)
_LARGE_NUMBERS = (65_537, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1)
_LIKELY_FLOATS = (0.0, 0.1, 0.5, 0.9, 1.0, 1.5, 3.0, 1e-30, 1e30, 1e300, math.pi)


def all_keys() -> dict[str, FieldInfo]:
    """Return every key that is fuzzed, as `section.key`."""
    fields = {
        f"{name}.{key}": field
        for name, section in SECTIONS.items()
        for key, field in section.model_fields.items()
    }
    return {key: field for key, field in fields.items() if key not in LEFT_OUT}


def likely_values(key: str, field: FieldInfo) -> st.SearchStrategy[Any]:
    """Return values that the schema takes for the most part."""
    if key in _CHOICES:
        return st.sampled_from(_CHOICES[key])
    kind = field.annotation
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.sampled_from(_LIKELY_NUMBERS * 3 + _LARGE_NUMBERS) | st.integers(_least(field), 200)
    if kind is float:
        return st.sampled_from(_LIKELY_FLOATS) | st.integers(0, 5)
    if kind is str:
        return (
            st.sampled_from(("", "x", "auto", "no/such/place", "/etc/passwd", "..", "{0..3}", "a b"))
            | WILD_TEXT
        )
    return WILD_VALUES


def _least(field: FieldInfo) -> int:
    return max(
        (int(limit.ge) for limit in field.metadata if getattr(limit, "ge", None) is not None), default=0
    )


@st.composite
def assignments(draw: st.DrawFn, *, most: int = 6) -> dict[str, Any]:
    """Draw keys with values; one in twenty is a wild one."""
    fields = all_keys()
    keys = draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=most, unique=True))
    wild = draw(st.lists(st.integers(0, 19), min_size=len(keys), max_size=len(keys)))
    return {
        key: draw(WILD_VALUES if dice == 0 else likely_values(key, fields[key]))
        for key, dice in zip(keys, wild, strict=True)
    }


@st.composite
def recipes(draw: st.DrawFn) -> str:
    """Draw the text of a recipe."""
    keys = draw(st.sampled_from(_BASES)) | draw(assignments(most=4))
    for key in draw(st.lists(st.sampled_from(sorted(keys)), max_size=1)):
        if draw(st.integers(0, 9)) == 0:
            del keys[key]
    sections: dict[str, list[str]] = {}
    for key, value in keys.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"{name} = {toml(value)}")
    return "\n".join(f"[{section}]\n" + "\n".join(lines) + "\n" for section, lines in sections.items())


@st.composite
def overrides(draw: st.DrawFn) -> str:
    """Draw the text of one `--set`."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(WILD_TEXT)
    key, value = next(iter(draw(assignments(most=1)).items()))
    if kind == 1:
        key = draw(
            st.sampled_from(
                (f"{key}.deeper", key.upper(), f" {key} ", key[:-1], key.partition(".")[0], "x.y")
            )
        )
    if kind == 2:
        return f"{key}={draw(WILD_TEXT)}"
    return f"{key}={value if isinstance(value, str) and kind < 6 else toml(value)}"


def toml(value: object) -> str:
    """Write a value as TOML has it; what TOML has not, such as null, as it is."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_string(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    return _string(value) if isinstance(value, str) else json.dumps(value).replace("Infinity", "inf").lower()


def _string(text: str) -> str:
    return json.dumps(text.encode(errors="replace").decode(), ensure_ascii=False).replace("\x7f", "\\u007F")
