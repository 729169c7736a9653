"""The Dockerfile, read without Docker: what it copies is there, what it calls exists, and who it runs as."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import tomli

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: its keyword in capitals, and the rest with continued lines joined."""

    keyword: str
    value: str

    @property
    def words(self) -> list[str]:
        """The value's words: those of its JSON list where it is one."""
        if self.value.startswith("["):
            return [str(word) for word in json.loads(self.value)]
        return self.value.split()


def parse(text: str) -> list[Instruction]:
    """Return a Dockerfile's instructions."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    instructions = []
    for line in joined.splitlines():
        keyword, _, value = line.strip().partition(" ")
        instructions.append(Instruction(keyword.upper(), value.strip()))
    return instructions


def is_docker_ignored(path: str, patterns: list[str]) -> bool:
    """Tell whether a .dockerignore leaves the path out: its last pattern that fits it or a folder of it."""
    parts = path.strip("/").split("/")
    names = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
    ignored = False
    for pattern in patterns:
        wanted = pattern.removeprefix("!").strip("/")
        anywhere = wanted.removeprefix("**/")
        fits = any(_fits(name, wanted) for name in names) or (
            anywhere != wanted and any(fnmatchcase(part, anywhere) for part in parts)
        )
        if fits:
            ignored = not pattern.startswith("!")
    return ignored


def _fits(name: str, pattern: str) -> bool:
    own, wanted = name.split("/"), pattern.split("/")
    return len(own) == len(wanted) and all(map(fnmatchcase, own, wanted))


@pytest.fixture(scope="module")
def dockerfile() -> list[Instruction]:
    return parse((ROOT / "Dockerfile").read_text())


@pytest.fixture(scope="module")
def patterns() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def values(dockerfile: list[Instruction], keyword: str) -> list[str]:
    return [instruction.value for instruction in dockerfile if instruction.keyword == keyword]


def words(dockerfile: list[Instruction], keyword: str) -> list[list[str]]:
    return [instruction.words for instruction in dockerfile if instruction.keyword == keyword]


def copied(dockerfile: list[Instruction]) -> list[str]:
    """Return what is copied from the checkout."""
    return [
        source
        for copy in words(dockerfile, "COPY")
        if not any(word.startswith("--from") for word in copy)
        for source in [word for word in copy if not word.startswith("--")][:-1]
    ]


def test_it_starts_from_one_cuda_image(dockerfile: list[Instruction]) -> None:
    assert dockerfile[0].keyword == "FROM"
    (image,) = values(dockerfile, "FROM")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-(base|runtime)-ubuntu24\.04", image)


def test_only_known_instructions(dockerfile: list[Instruction]) -> None:
    known = {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "USER", "VOLUME", "ENTRYPOINT", "CMD"}
    assert {instruction.keyword for instruction in dockerfile} <= known


def test_what_it_copies_exists(dockerfile: list[Instruction]) -> None:
    sources = copied(dockerfile)
    assert {"pyproject.toml", "petractl/", "recipes/"} <= set(sources)
    for source in sources:
        path = ROOT / source
        assert path.is_dir() if source.endswith("/") else path.is_file(), source


def test_what_it_copies_is_not_ignored(dockerfile: list[Instruction], patterns: list[str]) -> None:
    for source in copied(dockerfile):
        assert not is_docker_ignored(source, patterns), source
        if (ROOT / ".git").exists():
            command = ["git", "-C", str(ROOT), "check-ignore", "--quiet", source.rstrip("/")]
            assert subprocess.run(command, check=False).returncode == 1, f"git ignores {source}"


def test_every_file_of_the_package_goes_in(patterns: list[str]) -> None:
    files = [*(ROOT / "petractl").rglob("*.py"), *(ROOT / "recipes").glob("*.toml")]
    assert len(files) > 50
    for file in files:
        assert not is_docker_ignored(file.relative_to(ROOT).as_posix(), patterns), file


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        "data/cifar10/train-00.tar",
        "runs/mlflow.db",
        ".env",
        "tests/unit/test_dockerfile.py",
        "petractl/engine/__pycache__/stage.cpython-312.pyc",
    ],
)
def test_nothing_else_goes_in(path: str, patterns: list[str]) -> None:
    assert is_docker_ignored(path, patterns)


def test_what_the_package_needs_is_there_when_it_is_installed(dockerfile: list[Instruction]) -> None:
    """Without the files that pyproject.toml names the build in the image fails."""
    project = tomli.loads((ROOT / "pyproject.toml").read_text())
    needed = {project["project"]["readme"], *project["project"]["license-files"]}
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed |= {f"{name}/" for name in [*wheel["packages"], *wheel["force-include"]]}
    install = next(n for n, i in enumerate(dockerfile) if i.value.startswith("pip install --no-deps"))
    assert needed <= set(copied(dockerfile[:install]))


def test_a_change_of_the_sources_keeps_the_layer_of_the_dependencies(dockerfile: list[Instruction]) -> None:
    install = next(n for n, i in enumerate(dockerfile) if "pip install --requirement" in i.value)
    assert copied(dockerfile[:install]) == ["pyproject.toml"]


def test_the_requirements_of_the_image_are_those_of_the_package(
    dockerfile: list[Instruction], tmp_path: Path
) -> None:
    """Run the command up to pip, by the same kind of shell."""
    (run,) = [value for value in values(dockerfile, "RUN") if "tomllib" in value]
    command = run.partition("&&")[0].replace("python", shlex.quote(sys.executable), 1)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    subprocess.run(["/bin/sh", "-c", command], cwd=tmp_path, check=True)
    dependencies = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert (tmp_path / "requirements.txt").read_text().splitlines() == dependencies


def test_the_entry_point_is_the_packages(dockerfile: list[Instruction]) -> None:
    scripts = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert words(dockerfile, "ENTRYPOINT") == [["petractl"]]
    assert "petractl" in scripts
    path = re.search(r"\bPATH=(\S+?):", " ".join(values(dockerfile, "ENV")))
    assert path is not None
    assert any(f"venv {path[1].removesuffix('/bin')}" in run for run in values(dockerfile, "RUN"))


def test_it_runs_as_a_user_without_privileges(dockerfile: list[Instruction]) -> None:
    user = values(dockerfile, "USER")[-1]
    assert user not in ("root", "0")
    made = next(run for run in values(dockerfile, "RUN") if "useradd" in run)
    assert made.partition("useradd")[2].partition("&&")[0].split()[-1] == user
    last = max(n for n, i in enumerate(dockerfile) if i.keyword == "USER")
    assert all(i.keyword not in ("RUN", "COPY") for i in dockerfile[last + 1 :])


def test_data_and_runs_are_volumes_of_the_user_where_petractl_looks(dockerfile: list[Instruction]) -> None:
    here = values(dockerfile, "WORKDIR")[-1]
    volumes = [path for volume in words(dockerfile, "VOLUME") for path in volume]
    assert volumes == [f"{here}/data", f"{here}/runs"]
    made = next(run for run in values(dockerfile, "RUN") if "useradd" in run)
    assert set(volumes) <= set(made.split())


def test_python_is_new_enough() -> None:
    """Ubuntu 24.04 has Python 3.12."""
    project = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
    least = re.fullmatch(r">=3\.(\d+)", project["requires-python"])
    assert least is not None
    assert int(least[1]) <= 12


def test_the_parser() -> None:
    text = '# a\nFROM x:1\nRUN a \\\n    # why\n    && b\nCOPY ["a b", "/c"]\n'
    assert parse(text) == [
        Instruction("FROM", "x:1"),
        Instruction("RUN", "a  && b"),
        Instruction("COPY", '["a b", "/c"]'),
    ]
    assert parse(text)[-1].words == ["a b", "/c"]


@pytest.mark.parametrize(
    ("path", "ignored"),
    [("a", True), ("keep", False), ("keep/x/y", False), ("keep/x/z.pyc", True), ("other/keep", True)],
)
def test_the_ignore_rules(path: str, ignored: bool) -> None:
    assert is_docker_ignored(path, ["*", "!keep", "**/*.pyc"]) is ignored
