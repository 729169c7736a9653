"""Whatever it is given, petractl ends by itself, with 0, 1 or 2, and with words: no traceback, no hang.

Hypothesis makes what is wrong: recipes, overrides, grids, journals, checkpoints and whole run folders. 500
cases run by default, the same ones each time; 10,000 as `-m long`. Besides ending well, what comes out must
be right: an exported file is one of the checkpoints' to the bit, and a run that goes on in spite of damage to
its checkpoints ends with the bits of the run that was never harmed.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz_calls import call, sets
from fuzz_mutations import WILD_TEXT, damaged
from fuzz_recipes import overrides, recipes
from fuzz_runs import (
    OF_TWO_PROCESSES,
    PINNED,
    TINY,
    Template,
    damaged_journals,
    exported,
    finished_run,
    injure_run,
    killed_run,
    train,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from petractl.errors import UserError
from petractl.recipe.load import load_recipe

GOOD_RECIPE = Path(__file__).parents[2] / "recipes" / "digits_revnet18.toml"
LONG_S = 3000


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have the cases work in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cases(by_default: int, in_the_long_test: int) -> pytest.MarkDecorator:
    marks = (pytest.mark.long, pytest.mark.timeout(LONG_S))
    return pytest.mark.parametrize("count", [by_default, pytest.param(in_the_long_test, marks=marks)])


def fuzz(check: Callable[[st.DataObject], None], *, count: int) -> None:
    """Check that many cases, always the same ones."""
    chosen = settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    chosen(given(st.data())(check))()


def write(name: str, content: bytes) -> str:
    Path(name).write_bytes(content)
    return name


def fresh(name: str) -> Path:
    """Return the path of a folder or file that is not there."""
    path = Path(name)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    return path


def check_recipe(data: st.DataObject) -> None:
    text = data.draw(recipes())
    call("validate", write("recipe.toml", text.encode(errors="replace")))


def check_recipe_file(data: st.DataObject) -> None:
    content = data.draw(damaged(GOOD_RECIPE.read_bytes()))
    call(data.draw(st.sampled_from(("validate", "show"))), write("recipe.toml", content))


def check_overrides(data: st.DataObject) -> None:
    texts = data.draw(st.lists(overrides(), min_size=1, max_size=4))
    call(data.draw(st.sampled_from(("validate", "validate", "show"))), "digits_revnet18", *sets(*texts))


def check_grid(data: st.DataObject) -> None:
    """Grids, cells and seeds of a sweep."""
    several = st.lists(overrides() | WILD_TEXT, min_size=1, max_size=2)
    words = [
        w for text in data.draw(several) for w in (data.draw(st.sampled_from(("--grid", "--cell"))), text)
    ]
    seeds = data.draw(
        st.sampled_from(("", "0", "0,1", "1,1", "x", "-1", "0-9", "99999999999999999999")) | WILD_TEXT
    )
    call(
        "sweep", "digits_revnet18", *words, *(["--seeds", seeds] if seeds else []), *sets(*TINY), "--dry-run"
    )


def check_journal(data: st.DataObject) -> None:
    """What reads journals: lists, comparisons, the simulator's comparison, a run that is to go on."""
    whole, run = finished_run(), fresh("run")
    shutil.copytree(whole, run)
    (run / "metrics.jsonl").write_bytes(data.draw(damaged_journals((whole / "metrics.jsonl").read_bytes())))
    for words in (
        ("ls", "runs", "--directory", "."),
        ("ls", "runs", "--json", "--directory", "."),
        ("compare", "run", str(whole)),
        ("compare", "run", str(whole), "--json"),
        ("simulate", "--compare", "run"),
    ):
        call(*words)
    if data.draw(st.integers(0, 9)) == 0:
        call("compare", "run", str(whole), "--plot", "curves.png")
    if data.draw(st.integers(0, 4)) == 0:
        assert call("resume", "run").code == 0
        assert exported(run) == exported(whole)


def check_checkpoints(data: st.DataObject) -> None:
    """Damaged checkpoints give the bits that were saved, or none; a run goes on from one that is whole."""
    template = killed_run(*(OF_TWO_PROCESSES if data.draw(st.booleans()) else ()))
    run = template.copy(fresh("run"))
    injure_run(data.draw, run, only="checkpoints/")
    best = ["--best"] if data.draw(st.booleans()) else []
    call("eval", "run", *best)
    out = fresh("run.safetensors")
    if call("export", "run", "--out", str(out), *best).code == 0:
        assert exported(run) in template.weights
    if data.draw(st.integers(0, 2)) == 0:
        check_resumed(template, run)


def check_resumed(template: Template, run: Path) -> None:
    """The newest whole checkpoint is gone on from, and each newer one is named."""
    intact = template.intact(run)
    names = [path.name for path in template.checkpoints()]
    newer = names[names.index(intact[-1]) + 1 :] if intact else []
    damaged = [name for name in newer if (run / "checkpoints" / name).is_dir()]
    ended = call("resume", "run", *sets(*PINNED))
    if intact and "leads out of the run folder" not in ended.err:
        assert ended.code == 0, ended.err
        assert [name for name in damaged if name not in ended.err] == []
    if ended.code == 0:
        assert exported(run) == template.final


def check_run_folder(data: st.DataObject) -> None:
    """Any file of a run folder, or any folder in it."""
    template = killed_run()
    run = template.copy(fresh("run"))
    injured = injure_run(data.draw, run)
    for words in (
        ("ls", "runs", "--directory", "."),
        ("compare", "run", str(template.folder)),
        ("show", "run/resolved.toml"),
        ("validate", "run/resolved.toml"),
    ):
        call(*words)
    if is_small(run / "resolved.toml"):
        call("eval", "run")
        call("export", "run", "--out", str(fresh("run.safetensors")))
        if data.draw(st.integers(0, 2)) == 0:
            ended = call("resume", "run", *sets(*PINNED))
            if ended.code == 0 and "resolved.toml" not in injured:
                assert exported(run) == template.final


def is_small(resolved: Path) -> bool:
    """Tell whether a recipe that may be damaged asks for no more work than a test has time for."""
    try:
        recipe = load_recipe(resolved).recipe
    except UserError:
        return True
    numbers = (
        recipe.model.width,
        recipe.model.depth,
        recipe.data.batch_size,
        recipe.data.fake_samples,
        recipe.data.image_size,
        recipe.data.steps_per_epoch,
        recipe.training.epochs,
        recipe.engine.replicas,
    )
    return max(numbers) <= 64


def check_sweep_table(data: st.DataObject) -> None:
    """The table of a sweep whose cells are done, from journals that are damaged."""
    whole = finished_sweep()
    sweep = fresh("sweep")
    shutil.copytree(whole, sweep)
    cell = data.draw(st.sampled_from(sorted(path.name for path in sweep.iterdir())))
    journal = sweep / cell / "metrics.jsonl"
    journal.write_bytes(data.draw(damaged_journals(journal.read_bytes())))
    words = ("sweep", "digits_revnet18", *SWEEP, "--dir", "sweep")
    listed = call(*words, "--dry-run", "--json")
    if listed.code == 0 and all("finished" in cell["would"] for cell in json.loads(listed.out)["cells"]):
        call(*words)


SWEEP = ("--grid", "optimizer.lr=0.1,0.2", *sets(*TINY, "training.epochs=1"))
_sweeps: list[Path] = []


def finished_sweep() -> Path:
    if not _sweeps:
        folder = finished_run().parent / "sweep"
        listed = call("sweep", "digits_revnet18", *SWEEP, "--dir", str(folder), "--dry-run", "--json")
        for cell in json.loads(listed.out)["cells"]:
            lr = cell["values"]["optimizer.lr"]
            train(Path(cell["folder"]), "training.epochs=1", f"optimizer.lr={lr}")
        _sweeps.append(folder)
    return _sweeps[0]


def check_sync(data: st.DataObject) -> None:
    """What is sent of a damaged journal; each call starts MLflow, which takes seconds."""
    whole, run = finished_run(), fresh("run")
    shutil.copytree(whole, run)
    (run / "metrics.jsonl").write_bytes(data.draw(damaged_journals((whole / "metrics.jsonl").read_bytes())))
    call("sync", "run", "--uri", f"sqlite:///{Path.cwd() / 'mlflow.db'}")


@cases(130, 3000)
def test_recipes(count: int) -> None:
    fuzz(check_recipe, count=count)


@cases(60, 1500)
def test_recipe_files(count: int) -> None:
    fuzz(check_recipe_file, count=count)


@cases(100, 2000)
def test_overrides(count: int) -> None:
    fuzz(check_overrides, count=count)


@cases(60, 1000)
def test_grids(count: int) -> None:
    fuzz(check_grid, count=count)


@cases(60, 1200)
def test_journals(count: int) -> None:
    fuzz(check_journal, count=count)


@cases(45, 600)
def test_checkpoints(count: int) -> None:
    fuzz(check_checkpoints, count=count)


@cases(35, 500)
def test_run_folders(count: int) -> None:
    fuzz(check_run_folder, count=count)


@cases(10, 200)
def test_sweep_tables(count: int) -> None:
    fuzz(check_sweep_table, count=count)


@pytest.mark.long
@pytest.mark.timeout(LONG_S)
def test_sync() -> None:
    fuzz(check_sync, count=40)
