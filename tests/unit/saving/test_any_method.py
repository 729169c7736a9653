"""Every method goes on from the middle of an epoch, through files: same bits, or in another shape."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fuzz_calls import call

from petractl import checkpoint, launch
from petractl.errors import UserError
from petractl.session import Session

RECIPE = """
[model]
name = "{model}"
width = 2
[data]
name = "fake"
image_size = 8
fake_samples = 56
batch_size = 8
[method]
{method}
accumulation = 2
[partition]
stages = 4
[engine]
device = "cpu"
mode = "in-process"
threads = 1
schedule = "{schedule}"
[optimizer]
name = "{optimizer}"
lr = 0.05
[training]
epochs = 2
warmup_epochs = 1.0
[run]
checkpoint_every = "1 update"
keep_last = 100
[tracking]
mlflow = false
"""
ASYNCHRONOUS = {
    "petra": 'name = "petra"',
    "petra-forward-statistics": 'name = "petra"\nbn_statistics = "forward"',
    "delayed-graph": 'name = "delayed"',
    "delayed-inputs+parameters": 'name = "delayed"\nkeep = "inputs+parameters"',
    "delayed-inputs": 'name = "delayed"\nkeep = "inputs"',
    "delayed-parameters": 'name = "delayed"\nkeep = "parameters"',
    "fg-reverse": 'name = "forward-gradient"\ntarget = "global"\nguess = "local"\nderivative = "reverse"',
    "fg-forward": 'name = "forward-gradient"\ntarget = "global"\nguess = "local"\nderivative = "forward"',
    "fg-random": 'name = "forward-gradient"\ntarget = "global"\nguess = "random-gaussian"',
    "fg-weight": 'name = "forward-gradient"\ntarget = "sum"\nguess = "local"\nspace = "weight"',
}
LOCKED = {
    "backprop": 'name = "backprop"',
    "reversible": 'name = "reversible"',
    "local": 'name = "local"',
    "fg-local": 'name = "forward-gradient"\ntarget = "local"\nguess = "ntk"',
}
CASES = [(name, text, "paper") for name, text in ASYNCHRONOUS.items()]
CASES += [(name, text, "auto") for name, text in LOCKED.items()]


def begin(folder: Path, method: str, schedule: str, *, optimizer="sgd", model="revnet18", **settings) -> Path:
    text = RECIPE.format(method=method, schedule=schedule, optimizer=optimizer, model=model)
    (folder / "recipe.toml").write_text(text)
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    assert launch.run(str(folder / "recipe.toml"), directory=folder / "run", overrides=overrides) == 0
    return folder / "run"


def only(run: Path, name: str, target: Path) -> Path:
    """Return a copy of a run that was ended when it had made this checkpoint."""
    shutil.copytree(run, target)
    for path in checkpoint.checkpoint_paths(target / "checkpoints"):
        if path.name != name:
            shutil.rmtree(path)
    journal = target / "metrics.jsonl"
    kept = [line for line in journal.read_text().splitlines() if json.loads(line)["event"] != "run_finished"]
    journal.write_text("".join(f"{line}\n" for line in kept))
    return target


def final(run: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint.load_checkpoint(run / "checkpoints" / "epoch-0002")
    return {f"{group}/{name}": t for group, table in saved.tensors.items() for name, t in table.items()}


def assert_same(run: Path, other: Path) -> None:
    a, b = final(run), final(other)
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]
    for event in ("epoch_trained", "evaluated"):
        assert last(run, event)["loss"] == last(other, event)["loss"]
    assert last(other, "epoch_trained")["update"] == 8


def last(run: Path, event: str) -> dict:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == event][-1]


@pytest.mark.parametrize(
    ("method", "schedule"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_a_method_goes_on_with_the_same_bits(tmp_path, method, schedule):
    run = begin(tmp_path, method, schedule)
    names = [path.name for path in checkpoint.checkpoint_paths(run / "checkpoints")]
    assert names == [
        *(f"epoch-0001-microbatch-{m:06d}" for m in (2, 4, 6, 7)),
        "epoch-0001",
        *(f"epoch-0002-microbatch-{m:06d}" for m in (2, 4, 6, 7)),
        "epoch-0002",
    ]
    for name in ("epoch-0001-microbatch-000002", "epoch-0002-microbatch-000004"):
        again = only(run, name, tmp_path / name)
        assert launch.resume(again, overrides=[]) == 0
        assert_same(run, again)


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_optimisers_go_on_with_the_same_bits(tmp_path, optimizer):
    run = begin(tmp_path, ASYNCHRONOUS["petra"], "tight", optimizer=optimizer)
    again = only(run, "epoch-0001-microbatch-000004", tmp_path / "again")
    assert launch.resume(again, overrides=[]) == 0
    assert_same(run, again)


def test_an_epoch_that_was_trained_and_not_evaluated_is_evaluated(tmp_path):
    run = begin(tmp_path, ASYNCHRONOUS["petra"], "tight")
    again = only(run, "epoch-0001-microbatch-000007", tmp_path / "again")
    assert launch.resume(again, overrides=[]) == 0
    assert_same(run, again)
    started = last(again, "run_started")
    assert (started["resumed_from_epoch"], started["resumed_from_microbatch"]) == (0, 7)


@pytest.mark.parametrize("name", ["petra", "delayed-graph", "delayed-inputs+parameters"])
@pytest.mark.parametrize("change", ["partition.stages=1", "partition.stages=6", "engine.schedule=tight"])
def test_another_pipeline_goes_on_from_the_drained_weights(tmp_path, monkeypatch, name, change):
    began_with = {}

    def train(self, state, train=Session.train):
        began_with.update({name: x.clone() for name, x in self._built.network.state_dict().items()})
        return train(self, state)

    run = begin(tmp_path, ASYNCHRONOUS[name], "paper")
    again = only(run, "epoch-0001-microbatch-000002", tmp_path / "again")
    monkeypatch.setattr(Session, "train", train)
    assert launch.resume(again, overrides=[change]) == 0
    warning = last(again, "warning_raised")["message"]
    assert "drained first, 5 microbatches of epoch 1" in warning
    drained = checkpoint.load_checkpoint(again / "checkpoints" / "epoch-0001-microbatch-000007")
    assert began_with.keys() == drained.tensors["model"].keys()
    assert all(torch.equal(x, began_with[key]) for key, x in drained.tensors["model"].items())
    counted = [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]
    counts = [r for r in counted if r["event"] == "stage_counted" and r["epoch"] == 1][-1]
    assert counts["forwards"] == counts["backwards"] == 7
    assert drained.state["training"]["is_drained"]
    assert last(again, "run_finished")["epochs"] == 2


def test_the_model_of_a_checkpoint_in_mid_epoch_can_be_evaluated_and_exported(tmp_path):
    run = begin(tmp_path, ASYNCHRONOUS["petra"], "tight")
    again = only(run, "epoch-0002-microbatch-000004", tmp_path / "again")
    for arguments in (["eval", str(again)], ["export", str(again), "--out", str(tmp_path / "w.safetensors")]):
        assert call(*arguments).code == 0


def with_samples(run: Path, count: int) -> Path:
    resolved = (run / "resolved.toml").read_text()
    assert "fake_samples = 56" in resolved
    (run / "resolved.toml").write_text(resolved.replace("fake_samples = 56", f"fake_samples = {count}"))
    return run


def test_an_epoch_does_not_go_on_with_data_of_another_length(tmp_path):
    """It ended in an AssertionError with fewer samples, and lost some in silence with more."""
    run = begin(tmp_path, ASYNCHRONOUS["petra"], "tight")
    for count, rows in ((24, 3), (80, 10)):
        again = with_samples(only(run, "epoch-0002-microbatch-000004", tmp_path / str(count)), count)
        ended = call("resume", str(again))
        assert ended.code == 2
        assert f"an epoch has {rows} microbatches with these data, and had 7: it cannot go on" in ended.err
    again = with_samples(only(run, "epoch-0001", tmp_path / "after"), 80)
    ended = call("resume", str(again))
    assert ended.code == 0
    assert "data: an epoch has 10 microbatches with these data, and had 7" in ended.err


def test_a_run_whose_recipe_was_deleted_gets_it_again(tmp_path, monkeypatch):
    def save(self, *arguments, write=Session._note_saved):
        self._folder.resolved.unlink(missing_ok=True)
        write(self, *arguments)

    monkeypatch.setattr(Session, "_note_saved", save)
    run = begin(tmp_path, ASYNCHRONOUS["petra"], "tight")
    assert "was gone, and is written again" in last(run, "warning_raised")["message"]
    assert call("eval", str(run)).code == 0


def test_a_folder_whose_name_is_not_text_is_refused(tmp_path):
    (tmp_path / "recipe.toml").write_text(
        RECIPE.format(method='name = "petra"', schedule="tight", optimizer="sgd", model="revnet18")
    )
    with pytest.raises(UserError, match="is not UTF-8"):
        launch.run(str(tmp_path / "recipe.toml"), directory=tmp_path / "bad\udcff", overrides=[])
    assert not (tmp_path / "bad\udcff").exists()


@pytest.mark.parametrize("command", ["eval", "export"])
def test_what_stands_in_for_a_damaged_checkpoint_is_told(tmp_path, command):
    run = begin(tmp_path, ASYNCHRONOUS["petra"], "tight")
    (run / "checkpoints" / "epoch-0002" / "model.safetensors").write_bytes(b"")
    ended = call(command, str(run), *(["--out", str(tmp_path / "w")] if command == "export" else []))
    assert ended.code == 0
    assert "model.safetensors is not what the manifest says" in ended.err
    assert "hint: epoch-0002-microbatch-000007 is taken instead" in ended.err
