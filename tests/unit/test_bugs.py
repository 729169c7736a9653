"""One test for every bug found by fuzzing, through the command line that it was found with."""

import json
import shutil
from pathlib import Path

import pytest
from fuzz_calls import call, sets
from fuzz_runs import finished_run

from petractl.data import open_data
from petractl.restarts import told_by_journal
from petractl.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run(), tmp_path / "run"))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_resolved_recipe_of_another_net_is_told(run: Path) -> None:
    """Ended in a traceback of `load_state_dict`."""
    replace(run / "resolved.toml", "depth = 2", "depth = 3")
    ended = call("eval", str(run))
    assert ended.code == 1
    assert "describes another net than epoch-0003 has" in ended.err
    assert "units.3" in ended.err


def test_a_journal_line_without_an_event_does_not_stop_the_simulator(run: Path) -> None:
    """Ended in a KeyError."""
    whole = call("simulate", "--compare", str(run)).out
    with (run / "metrics.jsonl").open("a") as journal:
        journal.write('{"time": 1}\n')
    assert call("simulate", "--compare", str(run)).out == whole


def test_a_journal_with_more_ahead_than_can_be_is_told(run: Path) -> None:
    """Ended in a ValueError of the simulator."""
    replace(run / "metrics.jsonl", '"lookahead":3', '"lookahead":70000')
    ended = call("simulate", "--compare", str(run))
    assert ended.code == 2
    assert "the journal tells what cannot be: 70,000 microbatches ahead are too many" in ended.err


def test_a_journal_of_an_epoch_without_end_is_not_simulated(run: Path) -> None:
    """Simulated for hours."""
    replace(run / "metrics.jsonl", '"steps_per_epoch":2', '"steps_per_epoch":2000000000')
    ended = call("simulate", "--compare", str(run))
    assert ended.code == 2
    assert "2,000,000,000 microbatches x 4 stages are too many to simulate" in ended.err


def test_an_epoch_that_is_no_number_is_left_out_of_the_list_of_runs(run: Path) -> None:
    """Ended in a TypeError."""
    with (run / "metrics.jsonl").open("a") as journal:
        journal.write('{"event": "epoch_trained", "epoch": [null]}\n')
        journal.write('{"event": "evaluated", "top1": 1e999}\n')
        journal.write("[" * 100_000 + "\n")
    listed = call("ls", "runs", "--directory", str(run.parent), "--json")
    assert listed.code == 0
    assert [(row["epochs_done"], row["status"]) for row in json.loads(listed.out)] == [(3, "finished")]


@pytest.mark.parametrize("line", ["[" * 200_000, '{"event": "run_started", "time": 1' + "0" * 400 + "}"])
def test_a_damaged_line_of_the_journal_tells_nothing(tmp_path, line) -> None:
    """Deep brackets were a RecursionError, and a time too large for a float an OverflowError."""
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    assert told_by_journal(RunFolder(tmp_path)).began_s is None


@pytest.mark.parametrize(
    ("key", "value", "most"),
    [
        ("model.width", 2**31 - 1, "1,000,000"),
        ("model.classes", 2**63 - 1, "1,000,000,000"),
        ("model.depth", 2**31 - 1, "10,000"),
        ("data.classes", 2**63 - 1, "1,000,000,000"),
        ("data.image_size", 2**31 - 1, "65,536"),
        ("data.channels", 2**53 + 1, "1,000,000"),
        ("data.batch_size", 2**63 - 1, "1,000,000,000"),
        ("auxiliary.width", 2**63 - 1, "1,000,000"),
    ],
)
def test_a_size_past_all_use_is_told(key, value, most) -> None:
    """Ended in a RuntimeError ("Storage size calculation overflowed"), or went on for ever."""
    ended = call("validate", "digits_revnet18", *sets(f"{key}={value}", "data.name=fake"))
    assert ended.code == 2
    assert f"{key}: must be at most {most}, not {value}" in ended.err


@pytest.mark.parametrize("balance", ["memory", "time"])
def test_a_net_past_all_memory_is_told(balance) -> None:
    """Sizes that are right one by one ended in a RuntimeError of the whole net."""
    data = ("data.name=fake", "data.fake_samples=4", "data.image_size=65536", "data.batch_size=1000000000")
    cut = ("partition.stages=3", f"partition.balance={balance}", "engine.device=cpu")
    ended = call("validate", "digits_revnet18", *sets(*data, *cut, "model.width=1000000"))
    assert ended.code == 2
    assert "model: the net is too large: " in ended.err
    assert "hint: make model.width" in ended.err


def test_a_net_past_the_memory_of_this_machine_ends_the_run_in_words(tmp_path) -> None:
    """Ended in a RuntimeError of torch's allocator."""
    here = f"run.directory={tmp_path}"
    alone = ("engine.mode=in-process", "engine.device=cpu", "tracking.mlflow=false")
    ended = call("run", "digits_revnet18", *sets(here, *alone, "model.width=1000000"))
    assert ended.code == 1
    assert "error: out of memory: " in ended.err
    assert "can't allocate memory" in ended.err


def test_fake_images_past_all_memory_are_told() -> None:
    """Ended in a MemoryError of numpy, in `run`."""
    large = ("data.name=fake", "data.fake_samples=1000000000", "data.image_size=65536")
    ended = call("validate", "digits_revnet18", *sets(*large))
    assert ended.code == 2
    assert "data.fake_samples: 1,250,000,000 images of 3 x 65536 x 65536 are 15,000,000,000 GiB" in ended.err


def test_fake_classes_without_images_cost_nothing() -> None:
    """Ended in a MemoryError of numpy: every class had its pattern."""
    sizes = {"fake_samples": 8, "image_size": 8}
    few, many = (open_data("fake", train="", val="", seed=0, classes=n, **sizes) for n in (8, 10**9))
    assert (few.train.images == many.train.images).all()
    assert few.train.labels.tolist() == many.train.labels.tolist()
