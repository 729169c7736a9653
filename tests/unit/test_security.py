"""Files from strangers run no code, names lead nowhere else, and a terminal obeys none of them.

What recipes may do (a model "package.module:function" is code) stands in SECURITY.md; here is the rest.
"""

import ast
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import petractl
from petractl import checkpoint
from petractl.cli.app import app
from petractl.data.places import find_shards
from petractl.data.shard_cache import ShardCache
from petractl.data.shard_store import open_shards
from petractl.errors import DataError, RunError
from petractl.processes.safe_path import safe_path
from petractl.run_folder import RunFolder, create_run_folder
from petractl.sweep.grid import Assignment, Setting
from petractl.sweep.names import setting_names
from petractl.tracking.terminal import harmless

PACKAGE = Path(petractl.__file__).parent
RECIPE = """
[model]
name = "revnet18"
width = 2
[data]
name = "fake"
batch_size = 4
fake_samples = 16
image_size = 8
steps_per_epoch = 2
[method]
name = "petra"
[partition]
stages = 2
[engine]
device = "cpu"
threads = 1
[training]
epochs = 1
[tracking]
mlflow = false
"""


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


class Evil:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.marker),)


def pickles(marker: Path) -> dict[str, bytes]:
    """Return the same attack as a plain pickle, and as the archive that torch.save writes."""
    plain = pickle.dumps(Evil(marker))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", plain)
        file.writestr("archive/version", "3\n")
    return {"pickle": plain, "archive": archive.getvalue()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secure")
    (folder / "recipe.toml").write_text(RECIPE)
    done = call("run", folder / "recipe.toml", "--dir", folder / "run")
    assert done.exit_code == 0, done.output
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def commands(run: Path) -> Iterator[Result]:
    """Give the results of everything that reads a run folder."""
    yield call("resume", run, "--set", "training.epochs=2")
    yield call("eval", run, "--json")
    yield call("export", run, "--out", run.parent / "out.safetensors")
    yield call("compare", run, run, "--json")
    yield call("ls", "runs", "--directory", run.parent)


# What is read by different code is attacked one by one; what only stands there, all at once.
ATTACKED = (
    ("resolved.toml",),
    ("metrics.jsonl",),
    ("manifest.json",),
    ("model.safetensors",),
    ("optimizer.safetensors",),
    ("recipe.toml", "environment.json", "mlflow_run_id", "curves.png", ".lock", "stage-00.log"),
)


def test_the_attack_works(tmp_path: Path) -> None:
    import torch

    for name, content in pickles(tmp_path / "marker").items():
        (tmp_path / name).write_bytes(content)
    pickle.loads((tmp_path / "pickle").read_bytes())
    assert (tmp_path / "marker").is_dir()
    (tmp_path / "marker").rmdir()
    torch.load(tmp_path / "archive", weights_only=False)
    assert (tmp_path / "marker").is_dir()


@pytest.mark.parametrize("names", ATTACKED)
def test_no_file_of_a_run_folder_is_unpickled(run: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    marker = tmp_path / "marker"
    paths = [path for path in run.rglob("*") if path.name in names]
    assert paths
    forms = pickles(marker)
    for path in paths:
        path.write_bytes(forms["archive" if path.suffix == ".safetensors" else "pickle"])
    for done in commands(run):
        assert done.exit_code in (0, 1, 2), done.output
        assert isinstance(done.exception, SystemExit | None), done.exception
        assert not marker.exists()


def test_every_file_of_a_run_folder_is_attacked(run: Path) -> None:
    known = {name for names in ATTACKED for name in names}
    assert {path.name for path in run.rglob("*") if path.is_file()} <= known


def test_weights_are_not_unpickled_under_a_right_checksum(run: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = checkpoint.checkpoint_paths(run / "checkpoints")[-1]
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    for attack in pickles(marker).values():
        for name in manifest["files"]:
            (path / name).write_bytes(attack)
            manifest["files"][name] = hashlib.sha256(attack).hexdigest()
        (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
        for done in commands(run):
            assert isinstance(done.exception, SystemExit | None), done.exception
        assert not marker.exists()
        with pytest.raises(RunError):
            checkpoint.load_checkpoint(path)


# What runs code, and the only files that have it: an unpickler that knows no function, and allow_pipe.
RUNS_CODE = {
    "pickle.load",
    "pickle.loads",
    "torch.load",
    "joblib.load",
    "marshal.loads",
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "yaml.load",
}
ALLOWED = {"data/shard_cache.py: shell"}


def test_nothing_else_in_petractl_runs_what_it_reads() -> None:
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            if (name := ast.unparse(node.func)) in RUNS_CODE:
                found.add(f"{path.relative_to(PACKAGE)}: {name}")
            found |= {
                f"{path.relative_to(PACKAGE)}: {word.arg}"
                for word in node.keywords
                if word.arg in ("shell", "allow_pickle", "weights_only")
            }
    assert found == ALLOWED


@pytest.mark.parametrize(
    ("command", "runs"), [("show", False), ("validate", True), ("compare", False), ("ls", False)]
)
def test_code_that_a_recipe_names_is_run_where_the_docs_say(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, runs: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    module = f"named_by_{command}"
    (tmp_path / f"{module}.py").write_text("import os\nos.mkdir('marker')\ndef net(**_): raise ValueError\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    text = (run / "resolved.toml").read_text()
    named = re.sub('^name = "revnet18"', f'name = "{module}:net"', text, flags=re.MULTILINE)
    assert named != text
    for path in (run / "resolved.toml", run / "recipe.toml"):
        path.write_text(named)
    arguments = {
        "show": (run / "resolved.toml",),
        "validate": (run / "resolved.toml",),
        "compare": (tmp_path,),
        "ls": ("runs", "--directory", tmp_path),
    }[command]
    if command == "compare":
        shutil.copytree(run, tmp_path / "other")
    done = call(command, *arguments)
    assert done.exit_code == (2 if runs else 0), done.output
    assert (tmp_path / "marker").exists() == runs


def test_a_process_that_petractl_starts_imports_nothing_from_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "petractl").mkdir()
    for name in ("torch.py", "json.py", "petractl/__init__.py"):
        (tmp_path / name).write_text("import os\nos.mkdir('marker')\n")
    code = "import json, petractl; print(petractl.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **safe_path()}, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(PACKAGE / "__init__.py"), done.stderr
    assert not (tmp_path / "marker").exists()


def test_starting_weights_are_not_unpickled(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    for form, content in pickles(tmp_path / "marker").items():
        (tmp_path / form).write_bytes(content)
        weights = f"model.weights={tmp_path / form}"
        done = call("run", tmp_path / "recipe.toml", "--dir", tmp_path / "run", "--set", weights)
        assert done.exit_code == 2
        assert "safetensors" in done.stderr
        assert not (tmp_path / "marker").exists()


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("label", [b"0", b""], ids=["image", "label"])
def test_no_member_of_a_shard_is_unpickled(tmp_path: Path, label: bytes) -> None:
    attack = pickles(tmp_path / "marker")["pickle"]
    endings = ("jpg", "pyd", "pickle", "pkl", "pth", "pt", "npy", "npz", "json", "yaml")
    members = {f"{n}.{ending}": attack for n in range(8) for ending in endings}
    members |= {f"{n}.cls": label or attack for n in range(8)}
    shard(tmp_path / "train-0.tar", members)
    shard(tmp_path / "val-0.tar", members)
    (tmp_path / "recipe.toml").write_text(
        RECIPE.replace("fake_samples = 16\n", "").replace('"fake"', '"shards"')
    )
    places = ("--set", f"data.train={tmp_path}/train-0.tar", "--set", f"data.val={tmp_path}/val-0.tar")
    others = ("--set", "data.classes=2", "--set", "data.workers=0")
    done = call("run", tmp_path / "recipe.toml", "--dir", tmp_path / "run", *places, *others)
    assert done.exit_code in (1, 2)
    assert "train-0.tar" in done.stderr
    assert not (tmp_path / "marker").exists()


def test_neither_an_index_nor_a_copy_in_the_cache_is_unpickled(tmp_path: Path) -> None:
    attack = pickles(tmp_path / "marker")["pickle"]
    shard(tmp_path / "train-0.tar", {"0.png": b"", "0.cls": b"0"})
    (tmp_path / "index.json").write_bytes(attack)
    with pytest.raises(DataError, match="not a readable index"):
        open_shards([str(tmp_path)], where="data.train", classes=2)
    (tmp_path / "index.json").unlink()
    import gzip

    (tmp_path / "a.tar.gz").write_bytes(gzip.compress((tmp_path / "train-0.tar").read_bytes()))
    (place,) = find_shards([str(tmp_path / "a.tar.gz")], where="data.train")
    copy = ShardCache(str(tmp_path / "cache")).local(place)
    copy.write_bytes(attack)
    with pytest.raises(DataError):
        open_shards([place.text], where="data.train", classes=2, cache=str(tmp_path / "cache")).read(0)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "place",
    [
        "reference://train-0.tar::http://evil.example/templates.json",
        "http://host/a.tar::reference://x",
        "ssh://host/train-0.tar",
        "memory://train-0.tar",
        "dask://host/train-0.tar",
    ],
)
def test_an_index_names_no_place_that_is_more_than_fetched(tmp_path: Path, place: str) -> None:
    (tmp_path / "set.json").write_text(json.dumps({"shardlist": [{"url": place, "nsamples": 1}]}))
    with pytest.raises(DataError, match="which an index may not"):
        find_shards([str(tmp_path / "set.json")], where="data.train")


def test_an_index_may_name_a_url(tmp_path: Path) -> None:
    place = "https://host/train-0.tar"
    (tmp_path / "set.json").write_text(json.dumps({"shardlist": [{"url": place, "nsamples": 1}]}))
    (found,) = find_shards([str(tmp_path / "set.json")], where="data.train")
    assert (found.text, found.kind) == (place, "url")


@pytest.mark.parametrize(
    "place", ["pipe:touch marker", "../../secret.tar", "/etc/passwd", "file:///etc/passwd"]
)
def test_an_index_leads_nowhere_else(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shard(tmp_path / "secret.tar", {})
    folder = tmp_path / "deep" / "set"
    folder.mkdir(parents=True)
    (folder / "set.json").write_text(json.dumps({"shardlist": [{"url": place, "nsamples": 1}]}))
    with pytest.raises(DataError, match="no such file"):
        find_shards([str(folder / "set.json")], where="data.train")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "x\0y"])
def test_the_names_of_shards_and_of_checkpoints_lead_nowhere_else(
    tmp_path: Path, name: str, run: Path
) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"version": 1, "shards": [{"name": name, "samples": 1}]}))
    with pytest.raises(DataError):
        find_shards([str(tmp_path / "index.json")], where="data.train")
    path = checkpoint.checkpoint_paths(run / "checkpoints")[-1]
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest["files"] = {name: next(iter(manifest["files"].values()))}
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(RunError):
        checkpoint.load_checkpoint(path)


@pytest.mark.parametrize("name", ["../../x", "/x", "..", "a\nb", "\x1b[2J", "", "x" * 300])
def test_the_names_of_recipes_and_cells_lead_nowhere_else(tmp_path: Path, name: str) -> None:
    made = create_run_folder(None, parent=str(tmp_path), recipe_name=name[:200])
    assert made.path.resolve().parent == tmp_path.resolve()
    assert made.path.name.isprintable()
    setting = Setting((Assignment("model.name", name, repr(name)),))
    (cell,) = setting_names([setting], ["model.name"])
    assert (tmp_path / cell).resolve().parent == tmp_path.resolve()
    assert cell.isprintable()
    assert len(cell) < 150


@pytest.mark.parametrize("name", ["metrics.jsonl", "logs/stage-00.log", "plots", "checkpoints/epoch-0009"])
def test_a_run_is_not_written_through_a_link(run: Path, tmp_path: Path, name: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("untouched")
    link = run / name
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.symlink_to(other if not link.suffix else other / "precious")
    done = call("resume", run, "--set", "training.epochs=2")
    assert done.exit_code == 2
    assert "this link leads out of the run folder" in done.stderr
    assert [path.name for path in other.iterdir()] == ["precious"]
    assert (other / "precious").read_text() == "untouched"


def test_a_link_within_the_folder_is_allowed(run: Path) -> None:
    (run / "newest").symlink_to("checkpoints")
    with RunFolder(run).locked():
        pass


def test_a_terminal_obeys_no_name(run: Path) -> None:
    journal = run / "metrics.jsonl"
    text = journal.read_text().replace('"recipe_name":"recipe"', '"recipe_name":"\\u001b]0;owned\\u0007x"')
    assert "owned" in text
    journal.write_text(text)
    for done in commands(run):
        for written in (done.stdout, done.stderr):
            assert "\x1b" not in written
            assert "\x07" not in written
    assert "\\x1b]0;owned" in call("ls", "runs", "--directory", run.parent).stdout


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\nof two lines", "plain\ttext\nof two lines"),
        ("\x1b[31mred\r", "\\x1b[31mred\\r"),
        ("\udcff \u202e \x9b", "\\udcff \\u202e \\x9b"),
        ("Grüße, 字", "Grüße, 字"),
    ],
)
def test_what_is_shown_is_harmless(text: str, shown: str) -> None:
    assert harmless(text) == shown


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_recipe_with_a_password_is_for_its_user_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    secret, open_ = 'uri = "https://me:hunter2@host"', 'uri = ""'
    folder.write_start(recipe=open_, resolved=open_, environment={})
    usual = mode(tmp_path / "recipe.toml")
    assert mode(folder.resolved) == usual != 0o600
    folder.write_start(recipe=secret, resolved=secret, environment={})
    assert mode(tmp_path / "recipe.toml") == mode(folder.resolved) == 0o600
    assert (tmp_path / "recipe.toml").read_text() == secret


def test_no_cell_of_a_sweep_is_named_by_a_password() -> None:
    uris = [f"http://me:{word}@host" for word in ("hunter2", "hunter3")]
    settings = [Setting((Assignment("tracking.uri", uri, repr(uri)),)) for uri in uris]
    names = setting_names(settings, ["tracking.uri"])
    assert "hunter" not in "".join(names)
    assert len(set(names)) == 2
