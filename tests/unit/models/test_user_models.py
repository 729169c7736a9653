"""Models of the user's own: what they are called with, and every way in which they can be wrong."""

import sys
import textwrap
from pathlib import Path

import pytest
import torch

from petractl.errors import UserError
from petractl.models.registry import BuiltModel, build_model

NETS = """
import torch
from torch import nn
from petractl.models.units import Coupling

CONSTANT = 3

def takes_some(classes, width, extra=1):
    return [nn.Conv2d(3, width, 3), Coupling(nn.Linear(extra, extra)), nn.Linear(width, classes)]

def takes_any(**keywords):
    unit = nn.Identity()
    unit.keywords = keywords
    return [unit]

def takes_nothing():
    return (nn.Identity(),)

def needs_more(classes, growth):
    return [nn.Linear(growth, classes)]

def raises():
    raise ValueError("no such\\nthing")

def returns_module():
    return nn.Linear(1, 1)

def returns_number():
    return 7

def returns_mixture():
    return [nn.Linear(1, 1), nn.functional.relu]

def returns_nothing():
    return []

def shares():
    unit = nn.Linear(2, 2)
    return [nn.Identity(), unit, unit]
"""


@pytest.fixture(autouse=True)
def current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules, path = set(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", path)
    (tmp_path / "own_nets.py").write_text(NETS)
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "nets.py").write_text(NETS)
    (tmp_path / "broken_syntax.py").write_text("def net(:\n")
    (tmp_path / "broken_import.py").write_text("import not_installed_anywhere\n")
    (tmp_path / "broken_code.py").write_text(textwrap.dedent("x = 1\ny = x / 0\n"))
    yield
    for name in set(sys.modules) - modules:
        if name.partition(".")[0] in ("own_nets", "own_package", "broken_code", "broken_import"):
            del sys.modules[name]


def build(name: str, **arguments: object) -> BuiltModel:
    return build_model(name, width=8, classes=5, in_channels=3, stem="cifar", depth=2, arguments=arguments)


def test_function_gets_what_its_signature_names() -> None:
    built = build("own_nets:takes_some")
    assert [type(unit).__name__ for unit in built.units] == ["Conv2d", "Coupling", "Linear"]
    assert built.names == ("unit0 (Conv2d)", "unit1 (Coupling)", "unit2 (Linear)")
    assert built.units[2].weight.shape == (5, 8)
    assert build("own_nets:takes_some", extra=4).units[1].f.weight.shape == (4, 4)


def test_function_with_any_keywords_gets_all() -> None:
    (unit,) = build("own_package.nets:takes_any", growth=2, width=16).units
    assert unit.keywords == {
        "width": 16,
        "classes": 5,
        "in_channels": 3,
        "stem": "cifar",
        "depth": 2,
        "growth": 2,
    }


def test_function_without_arguments_and_a_tuple() -> None:
    assert isinstance(build("own_nets:takes_nothing").units[0], torch.nn.Identity)


@pytest.mark.parametrize(
    ("name", "where", "text"),
    [
        ("no_such_module:net", "model.name", 'there is no module "no_such_module"'),
        ("own_package.other:net", "model.name", 'there is no module "own_package.other"'),
        ("own_nets:take_some", "model.name", 'did you mean "takes_some"'),
        ("own_nets:zzz", "model.name", 'own_nets has no "zzz"'),
        ("own_nets:", "model.name", "not of the form"),
        ("own nets:net", "model.name", "not of the form"),
        ("own_nets:CONSTANT", "model.name", "is a int, not a function"),
        ("own_nets:needs_more", "model.arguments", "needs growth"),
        ("own_nets:raises", "model.name", "raised ValueError: no such thing"),
        ("own_nets:returns_module", "model.name", "returned a Linear"),
        ("own_nets:returns_number", "model.name", "returned a int"),
        ("own_nets:returns_mixture", "model.name", "item 1"),
        ("own_nets:returns_nothing", "model.name", "returned no unit"),
        ("own_nets:shares", "model.name", 'units 1 and 2 of own_nets:shares share the tensor "weight"'),
        ("broken_syntax:net", "model.name", "SyntaxError"),
        ("broken_import:net", "model.name", "imports not_installed_anywhere, which is not installed"),
        ("broken_code:net", "model.name", "ZeroDivisionError: division by zero"),
    ],
)
def test_mistakes_are_told(name: str, where: str, text: str) -> None:
    with pytest.raises(UserError) as caught:
        build(name)
    assert caught.value.where == where
    assert text in str(caught.value)


def test_argument_that_the_function_does_not_take() -> None:
    with pytest.raises(UserError, match="takes no deep") as caught:
        build("own_nets:takes_some", deep=3)
    assert caught.value.where == "model.arguments"
    assert "classes, width, extra" in caught.value.hint


def test_place_of_the_exception_is_told() -> None:
    with pytest.raises(UserError, match=r"own_nets\.py:\d+"):
        build("own_nets:raises")
