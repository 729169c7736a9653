"""Imports flow one way: a module imports only what stands above it; heavy ones where they are used."""

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "petractl"

# Top to bottom: each may import those before it, never one after it.
LAYERS = (
    "__init__",
    "errors",
    "events",
    "estimator",
    "one_thread",
    "recipe",
    "models",
    "data",
    "optim",
    "methods",
    "engine",
    "planning",
    "checkpoint",
    "tracking",
    "run_folder",
    "build",
    "results",
    "interrupts",
    "processes",
    "doctor",
    "saving",
    "session",
    "worker",
    "draining",
    "bench",
    "restarts",
    "continuing",
    "preparing",
    "launch",
    "sweep",
    "cli",
    "__main__",
)
# Below the recipe's only readers there are plain keyword arguments.
WITHOUT_RECIPE = ("models", "data", "optim", "methods", "engine", "planning", "checkpoint", "tracking")
WITHOUT_TORCH = (
    "petractl.errors",
    "petractl.events",
    "petractl.estimator",
    "petractl.recipe",
    "petractl.engine.schedule",
    "petractl.engine.exact_rules",
    "petractl.engine.measures",
)
HEAVY = frozenset({"torch", "torchvision", "mlflow", "webdataset", "matplotlib"})
HEAVY_FOR_CLI = HEAVY | {"pydantic"}
PRINTING = ("petractl.cli", "petractl.tracking.console")


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module, and whether importing its importer imports it (it is in no function)."""

    target: str
    line: int
    at_module_level: bool


class _Collector(ast.NodeVisitor):
    """Collects imports; `at_module_level` is false in functions and under TYPE_CHECKING."""

    def __init__(self, package: str) -> None:
        self.found: list[Import] = []
        self._package = package
        self._at_module_level = True

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [Import(alias.name, node.lineno, self._at_module_level) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = _absolute(node, self._package)
        # `from petractl import build` imports a module.
        targets = {f"{base}.{alias.name}" if base == "petractl" else base for alias in node.names}
        self.found += [Import(target, node.lineno, self._at_module_level) for target in sorted(targets)]

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._visit_later(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._visit_later(node)

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in ast.dump(node.test):
            self._visit_later(node)
        else:
            self.generic_visit(node)

    def _visit_later(self, node: ast.AST) -> None:
        before, self._at_module_level = self._at_module_level, False
        self.generic_visit(node)
        self._at_module_level = before


def imports_of(source: str, *, module: str, is_package: bool = False) -> list[Import]:
    """Return every import in a module, also those in functions and under TYPE_CHECKING."""
    collector = _Collector(module if is_package else module.rpartition(".")[0])
    collector.visit(ast.parse(source))
    return collector.found


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])


def layer_of(module: str) -> str:
    """Return the first part of a module's name below `petractl`."""
    name = module.removeprefix("petractl").removeprefix(".").partition(".")[0]
    return "__init__" if not name or name == "__version__" else name


def direction_errors(source: str, *, module: str, is_package: bool = False) -> list[str]:
    """Return what a module imports of petractl that stands below it, or is not to be seen by it."""
    own = layer_of(module)
    errors = []
    for imported in imports_of(source, module=module, is_package=is_package):
        if imported.target.partition(".")[0] != "petractl":
            continue
        other = layer_of(imported.target)
        place = f"{module}:{imported.line}"
        if not {own, other} <= set(LAYERS):
            errors.append(f"{place}: {own} or {other} is not in the list of layers: add it, in its place")
        elif LAYERS.index(other) > LAYERS.index(own):
            errors.append(f"{place}: {own} imports {other}, which stands below it")
        elif other == "recipe" and own in WITHOUT_RECIPE:
            errors.append(f"{place}: {own} imports recipe: take plain keyword arguments")
    return errors


def third_party_errors(source: str, *, module: str, is_package: bool = False) -> list[str]:
    """Return imports of packages that a module must not import, or not when it is itself imported."""
    errors = []
    for imported in imports_of(source, module=module, is_package=is_package):
        package = imported.target.partition(".")[0]
        heavy = {"cli": HEAVY_FOR_CLI, "recipe": HEAVY}.get(layer_of(module), frozenset())
        place = f"{module}:{imported.line}"
        if package == "click":
            errors.append(f"{place}: click is vendored by typer")
        elif package == "torch" and _is_in(module, WITHOUT_TORCH):
            errors.append(f"{place}: this module works without torch")
        elif package in heavy and imported.at_module_level:
            errors.append(f"{place}: {package} at module level: import it where it is used")
    return errors


def printing_errors(source: str, *, module: str) -> list[str]:
    """Return the calls of print outside of the command line and the console listener."""
    if _is_in(module, PRINTING):
        return []
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    lines = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    return [f"{module}:{line}: print" for line in lines]


def _is_in(module: str, places: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"{place}.") for place in places)


def sources() -> list[tuple[str, bool, str]]:
    """Return (module, whether it is a package, source) of every file of petractl."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        found.append((".".join(parts[:-1] if is_package else parts), is_package, path.read_text()))
    return found


def test_every_module_has_its_place() -> None:
    layers = {layer_of(module) for module, _, _ in sources()}
    assert layers <= set(LAYERS), "add what is new to LAYERS, in its place"
    assert len(layers) > 10


def test_imports_flow_one_way() -> None:
    errors = [error for m, p, text in sources() for error in direction_errors(text, module=m, is_package=p)]
    assert not errors, "\n".join(errors)


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    errors = [error for m, p, text in sources() for error in third_party_errors(text, module=m, is_package=p)]
    assert not errors, "\n".join(errors)


def test_only_the_command_line_prints() -> None:
    errors = [error for m, _, text in sources() for error in printing_errors(text, module=m)]
    assert not errors, "\n".join(errors)


@pytest.mark.parametrize(
    ("module", "heavy"), [("petractl.cli.app", HEAVY_FOR_CLI), ("petractl.recipe", HEAVY)]
)
def test_importing_it_loads_nothing_heavy(module: str, heavy: frozenset[str]) -> None:
    code = f"import sys, {module}; print(*sorted({set(heavy)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("petractl.errors", "import petractl.events"),
        ("petractl.engine.stage", "from petractl.tracking.journal import Journal"),
        ("petractl.engine.stage", "from petractl import build"),
        ("petractl.models.units", "def f():\n    from petractl.methods import family"),
        ("petractl.data.order", "if TYPE_CHECKING:\n    from petractl.engine.stage import Stage"),
        ("petractl.data.order", "try:\n    pass\nexcept ImportError:\n    from ..engine.stage import Stage"),
        ("petractl.optim", "match 1:\n    case 1:\n        import petractl.cli.app"),
        ("petractl.engine.stage", "from petractl.recipe.schema import Recipe"),
        ("petractl.checkpoint", "async def f():\n    with x:\n        from petractl.recipe import Recipe"),
        ("petractl.launch", "from petractl.trainer import Trainer"),
    ],
)
def test_a_wrong_direction_is_found(module: str, source: str) -> None:
    assert len(direction_errors(source, module=module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("petractl.engine.stage", "from petractl.engine.update import Updater\nfrom . import messages"),
        ("petractl.optim", "from petractl.models.user import import_named"),
        ("petractl.tracking.environment", "from petractl import __version__\nimport petractl"),
        ("petractl.build", "from petractl.recipe import Recipe"),
        ("petractl.__main__", "from petractl.cli.app import main"),
    ],
)
def test_a_right_direction_is_no_error(module: str, source: str) -> None:
    assert direction_errors(source, module=module) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("petractl.events", "def f():\n    import torch"),
        ("petractl.recipe.checks", "if TYPE_CHECKING:\n    from torch import nn"),
        ("petractl.cli.run", "from mlflow.entities import Metric"),
        ("petractl.cli.run", "class A:\n    import torch.nn"),
        ("petractl.cli.run", "import pydantic"),
        ("petractl.launch", "def f():\n    import click"),
    ],
)
def test_a_wrong_package_is_found(module: str, source: str) -> None:
    assert len(third_party_errors(source, module=module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("petractl.cli.run", "def command():\n    import torch, pydantic"),
        ("petractl.cli.run", "if TYPE_CHECKING:\n    import torch"),
        ("petractl.recipe.schema", "import pydantic"),
        ("petractl.engine.stage", "import torch"),
    ],
)
def test_a_package_in_its_place_is_no_error(module: str, source: str) -> None:
    assert third_party_errors(source, module=module) == []


def test_a_print_is_found() -> None:
    source = "def f():\n    print('here')"
    assert printing_errors(source, module="petractl.engine.stage") == ["petractl.engine.stage:2: print"]
    assert printing_errors(source, module="petractl.cli.show") == []
