"""README and docs say what is so: their commands run, their files work, their lists are complete.

Every line of a `shell` block that calls petractl is run, top to bottom, in one folder; a fenced block that
opens with `# name.toml` or `# name.py` is a file in it. `run` gets overrides that make it small, and the data
it names are made up. Lines of other programs are not run.
"""

import dataclasses
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tarfile import TarFile, TarInfo
from tarfile import open as open_tar

import numpy as np
import pytest
import torch
from braceexpand import braceexpand
from PIL import Image
from typer.testing import CliRunner

from petractl import events
from petractl.cli.app import COMMANDS, GROUPS, app
from petractl.cli.ls import What
from petractl.data import list_datasets
from petractl.events import Event, StagePlan
from petractl.methods.family import METHODS
from petractl.models.registry import build_model, list_models
from petractl.models.units import is_reversible
from petractl.preparing import RESUMABLE_KEYS
from petractl.recipe.find import list_recipes
from petractl.recipe.load import load_recipe
from petractl.recipe.render import toml_value
from petractl.recipe.schema import SECTIONS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}

SMALL = (
    "training.epochs=1",
    "training.warmup_epochs=0",
    "data.steps_per_epoch=2",
    "data.batch_size=8",
    "model.width=4",
    "engine.device=cpu",
    "engine.threads=1",
    "tracking.mlflow=false",
)
CIFAR_PLACES = ("data/cifar10/train-00.tar", "data/cifar10/test-00.tar")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language and its lines."""

    language: str
    lines: tuple[str, ...]

    @property
    def file_name(self) -> str:
        """The file that the block is, or "" if it is none."""
        name = re.fullmatch(r"# ([\w.-]+\.(toml|py))", self.lines[0])
        return name[1] if name else ""


@dataclass(frozen=True, slots=True)
class Command:
    """A petractl command line: its arguments, and the file that its output goes to, if any."""

    arguments: tuple[str, ...]
    output: str = ""


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a Markdown text."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [Block(language, tuple(body.splitlines())) for language, body in found]


def commands(text: str) -> list[Command]:
    """Return the petractl commands of the `shell` blocks, also those after `&&`."""
    lines = [line for block in blocks(text) if block.language == "shell" for line in block.lines]
    parsed = [_command(part) for line in lines for part in _parts(line)]
    return [command for command in parsed if command is not None]


def _parts(line: str) -> Iterator[list[str]]:
    part: list[str] = []
    for word in [*shlex.split(line, comments=True), "&&"]:
        if word == "&&":
            yield part
            part = []
        else:
            part.append(word)


def _command(words: list[str]) -> Command | None:
    if words[:1] != ["petractl"]:
        return None
    if ">" in words:
        at = words.index(">")
        return Command(tuple(words[1:at]), words[at + 1])
    return Command(tuple(words[1:]))


def shrunk(command: Command) -> Command:
    """Return a `run`, `bench` or `sweep` with overrides that make it small; any other command as it is."""
    if command.arguments[0] not in ("run", "bench", "sweep"):
        return command
    extra = [word for override in SMALL for word in ("--set", override)]
    if command.arguments[0] == "bench":
        extra += ["--repeats", "1", "--microbatches", "2", "--warmup", "1"]
    return dataclasses.replace(command, arguments=(*command.arguments, *extra))


def named_shards(command: Command) -> list[str]:
    """Return the shards that a command names with `--set data.train=` and `data.val=`."""
    values = [
        word.partition("=")[2] for word in command.arguments if word.startswith(("data.train=", "data.val="))
    ]
    return [name for value in values for name in braceexpand(value) if name.endswith(".tar")]


def write_shard(path: Path, *, samples: int = 16) -> None:
    """Write a shard of random CIFAR-10 samples, other ones in every shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(list(path.name.encode()))
    images = generator.integers(0, 256, (samples, 32, 32, 3), dtype=np.uint8)
    with open_tar(path, "w") as archive:
        for index, image in enumerate(images):
            png = BytesIO()
            Image.fromarray(image).save(png, format="PNG")
            _add(archive, f"{index:05}.png", png.getvalue())
            _add(archive, f"{index:05}.cls", str(index % 10).encode())


def _add(archive: TarFile, name: str, content: bytes) -> None:
    member = TarInfo(name)
    member.size = len(content)
    archive.addfile(member, BytesIO(content))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield the working folder, with the README's files and CIFAR shards in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = {block.file_name: block.lines for block in blocks(README) if block.file_name}
    for name, lines in names.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    shards = {shard for command in commands(README) for shard in named_shards(command)}
    for shard in {*CIFAR_PLACES, *shards}:
        write_shard(tmp_path / shard)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)
    for name in names:
        sys.modules.pop(Path(name).stem, None)


def test_the_commands_of_the_readme_run(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command in map(shrunk, commands(README)):
        line = shlex.join(["petractl", *command.arguments])
        result = CliRunner().invoke(app, list(command.arguments))
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
        said = result.stdout + capfd.readouterr().out  # of a run in processes, the first one's
        goes_on = command.arguments[0] == "resume" or "--resume" in command.arguments
        assert said or goes_on, f"{line} says nothing"
        if command.output:
            (folder / command.output).write_text(result.stdout)
    assert (folder / "mine.safetensors").stat().st_size > 0


def test_every_command_is_shown() -> None:
    shown = {command.arguments[0] for command in commands(README)}
    assert shown == {each.name for each in (*COMMANDS, *GROUPS)}


def test_the_files_of_the_readme_load_without_a_warning(folder: Path) -> None:
    recipes = [block.file_name for block in blocks(README) if block.file_name.endswith(".toml")]
    assert len(recipes) == 2
    result = CliRunner().invoke(app, ["validate", *recipes])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""


def test_the_recipe_explained_has_every_section() -> None:
    (recipe,) = [block for block in blocks(README) if block.file_name == "my_recipe.toml"]
    headings = [line.split("]")[0].removeprefix("[") for line in recipe.lines if line.startswith("[")]
    assert headings == list(SECTIONS)


def first_cells(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the rows of the first table under a heading, without its head."""
    section = re.split(r"^#+ ", text.partition(f"\n## {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in row.strip("|").split(" |")] for row in rows[2:]]


def test_the_table_of_methods_is_complete() -> None:
    told = [tuple(cells[:2]) for cells in first_cells(README, "Methods")]
    assert told == [(spec.name, spec.keep) for spec in METHODS]


def test_the_table_of_methods_says_what_is_kept() -> None:
    words = {"nothing": "nothing", "input": "input", "graph": "graph"}
    for spec, cells in zip(METHODS, first_cells(README, "Methods"), strict=True):
        for keeping, told in ((spec.reversible, cells[2]), (spec.plain, cells[3])):
            kept = [words[keeping.keep.value]]
            if keeping.parameters and kept != ["graph"]:
                kept = [*(word for word in kept if word != "nothing"), "parameters"]
            assert told == ", ".join(kept), spec


def test_the_table_of_recipes_is_complete() -> None:
    rows = first_cells(README, "Recipes")
    assert {cells[0] for cells in rows} == {r.name for r in list_recipes()}
    for name, what, _ in rows:
        assert what.endswith(f", {load_recipe(name).recipe.training.epochs} epochs"), name


def test_what_can_be_listed_is_told() -> None:
    line = next(line for line in README.splitlines() if line.startswith("petractl ls models"))
    assert all(what.value in line for what in What)
    assert all(f"`{name}`" in README for name in list_datasets() if name.startswith("cifar"))


def test_the_docs_are_found() -> None:
    assert set(re.findall(r"\(docs/([\w-]+\.md)\)", README)) == set(DOCS)
    for text in DOCS.values():
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link in DOCS, link


def test_the_docs_have_every_key_of_a_recipe() -> None:
    text = DOCS["recipes.md"]
    for name, section in SECTIONS.items():
        body = text.partition(f"\n## [{name}]\n")[2].partition("\n## ")[0]
        rows = []
        for key, field in section.model_fields.items():
            default = "required" if field.is_required() else f"`{toml_value(field.default)}`"
            meaning = (field.description or "").replace("<", "\\<")
            rows.append(f"| `{key}` | {default} | {meaning} |")
        assert [line for line in body.splitlines() if line.startswith("| `")] == rows, name


def test_the_docs_have_every_event_and_its_keys() -> None:
    text = DOCS["run-folder.md"]
    told = {cells[0]: cells[1] for cells in first_cells(text, "The journal")}
    common = {"epoch", "update", "stage"}
    kinds = [kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event)]
    assert set(told) == {kind.name for kind in kinds if kind is not Event}
    for kind in kinds:
        if kind is not Event:
            own = {field.name for field in dataclasses.fields(kind)} - common
            assert set(re.findall(r"\w+", told[kind.name])) == own, kind.name
    for field in dataclasses.fields(StagePlan):
        assert f"`{field.name}`" in text


def test_the_docs_have_every_key_that_may_change_on_resuming() -> None:
    text = DOCS["run-folder.md"].partition("## Checkpoints")[2].partition("\n## ")[0]
    sections = "data|partition|engine|training|run|diagnostics|tracking"
    told = set(re.findall(rf"`((?:{sections})\.[\w*]+)`", text)) - {"run.checkpoint_every"}
    known = {f"{key}*" if key.endswith(".") else key for key in RESUMABLE_KEYS} - {"run.checkpoint_every"}
    assert told == {key for key in known if not key.startswith("partition.")} | {"partition.*"}


def test_the_docs_have_every_model_with_its_sizes() -> None:
    rows = {cells[0]: cells[1:] for cells in first_cells(DOCS["models.md"], "The zoo")}
    assert set(rows) == set(list_models())
    for name, (units, reversible, imagenet, cifar) in rows.items():
        for stem, classes, parameters in (("imagenet", 1000, imagenet), ("cifar", 10, cifar)):
            with torch.device("meta"):
                model = build_model(name, classes=classes, stem=stem)
            assert f"{sum(p.numel() for unit in model.units for p in unit.parameters()):,}" == parameters
        if name != "revnet-iso":
            assert int(units) == len(model.units)
            assert int(reversible) == sum(map(is_reversible, model.units))


def test_reading_blocks_and_commands() -> None:
    text = "a\n```shell\npip install . && petractl run x  # why\npetractl show 'a b' > y\nls\n```\n"
    text += "```toml\n# n.toml\n[a]\n```\n```shell\n# petractl no\n```\n"
    assert commands(text) == [Command(("run", "x")), Command(("show", "a b"), "y")]
    assert [block.file_name for block in blocks(text)] == ["", "n.toml", ""]
    assert shrunk(Command(("run", "x"))).arguments[:4] == ("run", "x", "--set", SMALL[0])
    assert shrunk(Command(("ls",))) == Command(("ls",))
    assert named_shards(Command(("run", "--set", "data.train=a-{0..1}.tar"))) == ["a-0.tar", "a-1.tar"]
