"""Checkpoints exist whole or not at all, and loading one runs nothing."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from petractl.checkpoint import (
    Moment,
    OtherVersion,
    _digest,
    checkpoint_paths,
    discard_unfinished,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from petractl.errors import RunError


def save(folder: Path, epoch: int) -> Path:
    tensors = {
        "model": {"units.0.weight": torch.full((2, 3), float(epoch))},
        "optimizer": {"units.0.weight/momentum_buffer": torch.arange(6.0).reshape(2, 3)},
    }
    return save_checkpoint(folder, epoch=epoch, tensors=tensors, state={"best": 1.5})


def test_what_was_saved_is_loaded(tmp_path) -> None:
    path = save(tmp_path, 3)
    loaded = load_checkpoint(path)
    assert path.name == "epoch-0003"
    assert loaded.epoch == 3
    assert loaded.state == {"best": 1.5}
    assert torch.equal(loaded.tensors["model"]["units.0.weight"], torch.full((2, 3), 3.0))
    assert set(loaded.tensors) == {"model", "optimizer"}


def test_saving_again_replaces(tmp_path) -> None:
    save(tmp_path, 1)
    assert load_checkpoint(save(tmp_path, 1)).epoch == 1
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0001"]


@pytest.mark.parametrize(
    "damage",
    [
        *("flip", "truncate", "missing", "manifest", "not-json", "other-format", "escape", "deep", "renamed"),
        *("epoch-infinite", "one-bit-of-a-number", "one-bit-of-a-name", "no-checksum"),
    ],
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(tmp_path, damage: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    file, manifest = path / "model.safetensors", path / "manifest.json"
    content = json.loads(manifest.read_text())
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-5])
    elif damage == "missing":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text('{"epoch": 2}')
    elif damage == "not-json":
        manifest.write_text("{")
    elif damage == "other-format":
        manifest.write_text(json.dumps({**content, "format": 99}))
    elif damage == "deep":
        manifest.write_text("[" * 200_000)
    elif damage == "renamed":
        path.rename(path.with_name("epoch-0004"))
        path = path.with_name("epoch-0004")
    elif damage == "epoch-infinite":
        manifest.write_text(manifest.read_text().replace('"epoch": 2', '"epoch": Infinity'))
    elif damage == "one-bit-of-a-number":
        manifest.write_text(manifest.read_text().replace("1.5", "1.7"))
    elif damage == "one-bit-of-a-name":
        manifest.write_text(manifest.read_text().replace("best", "rest"))
    elif damage == "no-checksum":
        del content["sha256"]
        manifest.write_text(json.dumps(content))
    else:
        manifest.write_text(json.dumps({**content, "files": {"../epoch-0001/model.safetensors": "0"}}))
    with pytest.raises(RunError, match=path.name):
        load_checkpoint(path)
    newest, errors = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.epoch == 1
    assert len(errors) == 1


def test_a_pickle_in_the_place_of_tensors_is_never_run(tmp_path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    path = save(tmp_path, 1)
    (path / "model.safetensors").write_bytes(pickle.dumps(Hostile()))
    assert newest_checkpoint(tmp_path)[0] is None
    assert not (tmp_path / "ran").exists()


def test_an_interrupted_write_leaves_no_checkpoint(tmp_path, monkeypatch) -> None:
    save(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("petractl.checkpoint.save_file", full)
    with pytest.raises(RunError, match="No space left"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0001"]


def test_the_last_and_the_best_are_kept(tmp_path) -> None:
    for epoch in range(1, 7):
        save(tmp_path, epoch)
    prune_checkpoints(tmp_path, newest=Moment(6), keep_last=2, best_epoch=3)
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["epoch-0003", "epoch-0005", "epoch-0006"]


def test_epochs_are_numbers_not_words(tmp_path) -> None:
    for epoch in (9999, 10000):
        save(tmp_path, epoch)
    (tmp_path / "epoch-last").mkdir()
    (tmp_path / "epoch-last" / "manifest.json").write_text("{}")
    newest, errors = newest_checkpoint(tmp_path)
    assert newest is not None
    assert (newest.epoch, errors) == (10000, [])


def test_damaged_later_ones_do_not_push_out_the_whole_one(tmp_path) -> None:
    for epoch in (2, 3, 5, 6):
        save(tmp_path, epoch)
    for epoch in (5, 6):
        (tmp_path / f"epoch-000{epoch}" / "model.safetensors").write_bytes(b"damaged")
    save(tmp_path, 4)
    prune_checkpoints(tmp_path, newest=Moment(4), keep_last=1, best_epoch=2)
    newest, errors = newest_checkpoint(tmp_path)
    assert newest is not None
    assert (newest.epoch, len(errors)) == (4, 2)
    assert (tmp_path / "epoch-0002").exists()
    assert not (tmp_path / "epoch-0003").exists()


def test_there_is_none_in_an_empty_folder(tmp_path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") == (None, [])


def test_one_of_a_newer_version_is_not_called_damaged(tmp_path) -> None:
    path = save(tmp_path, 1)
    manifest = path / "manifest.json"
    content = {**json.loads(manifest.read_text()), "format": 99}
    content["sha256"] = _digest({name: value for name, value in content.items() if name != "sha256"})
    manifest.write_text(json.dumps(content))
    with pytest.raises(OtherVersion, match="a newer petractl made it"):
        load_checkpoint(path)


@pytest.mark.parametrize("number", [0, 1, 3, 6])
def test_a_bit_of_the_format_is_damage_as_any_other(tmp_path, number: int) -> None:
    path = save(tmp_path, 1)
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', f'"format": {number}'))
    with pytest.raises(RunError, match="is not what was written") as caught:
        load_checkpoint(path)
    assert not isinstance(caught.value, OtherVersion)


def test_what_killed_processes_left_is_cleared_away_and_what_was_being_replaced_is_put_back(tmp_path) -> None:
    whole, other = save(tmp_path, 1), save(tmp_path, 2)
    (tmp_path / ".writing-epoch-0003-abcd").mkdir()
    other.rename(tmp_path / ".removing-epoch-0002")
    whole.rename(tmp_path / ".replaced-epoch-0001")
    discard_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0001"]
    assert load_checkpoint(whole).epoch == 1


def test_every_file_is_on_the_disk_before_the_name_that_makes_it_a_checkpoint(tmp_path, monkeypatch) -> None:
    """A power cut may undo what was not synced: files, then what lists them, then the folder's new name."""
    done: list[str] = []
    sync, rename = os.fsync, Path.rename

    def note_sync(descriptor: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        sync(descriptor)

    def note_rename(self: Path, target: Path) -> Path:
        done.append(f"rename to {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    save(tmp_path, 1)
    assert done == [
        "sync model.safetensors",
        "sync optimizer.safetensors",
        "sync manifest.json",
        "sync .writing-epoch-0001",
        "rename to epoch-0001",
        f"sync {tmp_path.name}",
    ]
