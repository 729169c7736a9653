"""What is installed and shipped: wheel, source archive, dependencies, entry points, the check script."""

import ast
import os
import subprocess
import sys
import tarfile
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tomli

import petractl

ROOT = Path(__file__).parents[2]
RUN_LINE = "pip install . && petractl run recipes/digits_revnet18.toml"
TEST_LINE = "pip install '.[dev]' && pytest"

# Where an imported package is not called as its distribution is.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "tomli_w": "tomli-w",
    "pydantic_core": "pydantic",
}


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomli.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def project(pyproject: dict[str, Any]) -> dict[str, Any]:
    table: dict[str, Any] = pyproject["project"]
    return table


def build(target: str, source: Path, folder: Path) -> Path:
    """Build a wheel or an sdist with the backend that pip uses, and return the file."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Return the names in the wheel."""
    with zipfile.ZipFile(build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the source archive, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", ROOT, folder)) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"petractl-{petractl.__version__}"


def files(folder: Path, pattern: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in folder.rglob(pattern)}


def test_the_wheel_has_every_module_and_recipe(wheel: set[str]) -> None:
    modules = files(ROOT / "petractl", "*.py")
    recipes = {f"petractl/shipped_{name}" for name in files(ROOT / "recipes", "*.toml")}
    assert "petractl/data/registry.py" in modules, "data sets' own modules are not data"
    assert "petractl/shipped_recipes/digits_revnet18.toml" in recipes
    assert modules | recipes <= wheel


def test_the_wheel_has_nothing_else(wheel: set[str]) -> None:
    metadata = f"petractl-{petractl.__version__}.dist-info/"
    others = {name for name in wheel if not name.startswith(("petractl/", metadata))}
    assert others == set()
    assert not [name for name in wheel if "__pycache__" in name or name.endswith((".pyc", ".db"))]
    assert f"{metadata}licenses/LICENSE" in wheel


def test_the_source_archive_gives_the_same_wheel(wheel: set[str], sdist: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build("wheel", sdist, tmp_path)) as archive:
        assert set(archive.namelist()) == wheel


def test_the_source_archive_has_what_the_tests_read(sdist: Path) -> None:
    for name in (
        "README.md",
        "LICENSE",
        "Dockerfile",
        ".dockerignore",
        ".ci/run",
        "docs",
        "recipes",
        "tests",
    ):
        assert (sdist / name).exists(), name
    assert not [path for path in sdist.rglob("*") if path.name in ("runs", "__pycache__", ".venv", ".git")]


def test_a_typed_package_says_so(project: dict[str, Any], wheel: set[str]) -> None:
    assert ("Typing :: Typed" in project["classifiers"]) == ("petractl/py.typed" in wheel)


def test_one_version(project: dict[str, Any]) -> None:
    assert petractl.__version__ == project["version"]


def test_the_entry_point_can_be_called(project: dict[str, Any]) -> None:
    assert set(project["scripts"]) == {"petractl"}
    module, _, name = project["scripts"]["petractl"].partition(":")
    assert callable(getattr(import_module(module), name))


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "petractl", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"petractl {petractl.__version__}\n"


def imported_packages(source: str) -> set[str]:
    """Return the top-level names of all that a source imports by an absolute path."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in names}


def distribution(requirement: str) -> str:
    return requirement.partition(">")[0].partition("=")[0].partition("[")[0].strip()


def test_every_import_is_a_dependency(project: dict[str, Any]) -> None:
    used = {
        name for path in (ROOT / "petractl").rglob("*.py") for name in imported_packages(path.read_text())
    }
    third_party = used - set(sys.stdlib_module_names) - {"petractl"}
    assert "torch" in third_party
    declared = {distribution(text) for text in project["dependencies"]}
    assert {DISTRIBUTIONS.get(name, name) for name in third_party} <= declared


def test_every_import_of_the_tests_is_a_dependency(project: dict[str, Any]) -> None:
    paths = list((ROOT / "tests").rglob("*.py"))
    used = {name for path in paths for name in imported_packages(path.read_text())}
    own = {"petractl", *(path.stem for path in paths), *(path.parent.name for path in paths)}
    third_party = used - set(sys.stdlib_module_names) - own
    declared = {
        distribution(text) for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    }
    assert {DISTRIBUTIONS.get(name, name) for name in third_party} <= declared


def test_what_an_import_is() -> None:
    source = "import a.b\ndef f():\n    from c.d import e\n    from . import g"
    assert imported_packages(source) == {"a", "c"}


def test_the_check_script_runs_the_readmes_test_line() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert f'TEST_COMMAND="{TEST_LINE}"' in script.read_text()
    for command in ("ruff format --check .", "ruff check .", "mypy --strict"):
        assert command in script.read_text()


def test_the_readme_has_both_lines_as_they_are() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert RUN_LINE in lines
    assert TEST_LINE in lines


def test_mypy_checks_the_package(pyproject: dict[str, Any]) -> None:
    assert pyproject["tool"]["mypy"]["files"] == ["petractl"]
    assert pyproject["tool"]["mypy"]["strict"] is True
