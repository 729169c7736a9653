import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from petractl.data.decoding import decode
from petractl.data.shard_index import INDEX_NAME, read_index
from petractl.data.shard_store import open_shards
from petractl.data.writing import building
from petractl.data.writing.building import BuildOptions, build_shards, preview_build, sample_key
from petractl.data.writing.journal import JOURNAL_NAME
from petractl.errors import DataError, RunError, UserError

SMALL = BuildOptions(samples_per_shard=3)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


class Stopping:
    """A watch that ends the build after so many samples."""

    def __init__(self, after: int) -> None:
        self._left = after

    def begin(self, what: str, total: int) -> None:
        pass

    def advance(self, samples: int) -> None:
        self._left -= samples
        if self._left <= 0:
            raise KeyboardInterrupt


def test_every_sample_is_in_one_shard(both_splits: Path, tmp_path: Path) -> None:
    built = build_shards(str(both_splits), tmp_path / "out", SMALL)
    assert sorted(files(tmp_path / "out")) == [
        INDEX_NAME,
        *(f"train-00000{number}.tar" for number in range(4)),
        "val-000000.tar",
        "val-000001.tar",
    ]
    index = read_index(tmp_path / "out")
    assert index is not None
    assert (index.classes, index.class_names, index.image_size) == (3, ("ant", "bee", "cat"), (24, 32))
    assert [entry.name for entry in index.shards] == [shard.name for shard in built.shards]
    for split in ("train", "val"):
        store = open_shards([str(tmp_path / "out")], where="data", split=split)
        images = {}
        for number in range(sum(store.sizes)):
            sample = store.read(number)
            images[sample.image] = store.class_names[sample.label]
        source = {path.read_bytes(): path.parent.name for path in both_splits.glob(f"{split}/*/*.jpg")}
        assert images == source


def test_neighbours_are_of_several_classes(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    source = write_folder(tmp_path / "src", count=20)
    build_shards(str(source), tmp_path / "out", BuildOptions(samples_per_shard=10))
    store = open_shards([str(tmp_path / "out" / "shard-000000.tar")], where="data")
    assert len({store.read(number).label for number in range(10)}) == 3
    build_shards(str(source), tmp_path / "plain", BuildOptions(samples_per_shard=10, seed=None))
    store = open_shards([str(tmp_path / "plain" / "shard-000000.tar")], where="data")
    assert [store.read(number).label for number in range(10)] == [0] * 10


def test_same_bytes_by_any_number_of_workers(both_splits: Path, tmp_path: Path) -> None:
    for workers in (1, 4):
        options = BuildOptions(samples_per_shard=3, resize=16)
        build_shards(str(both_splits), tmp_path / str(workers), options, workers=workers)
    assert files(tmp_path / "1") == files(tmp_path / "4")
    build_shards(str(both_splits), tmp_path / "other", BuildOptions(samples_per_shard=3, resize=16, seed=1))
    assert files(tmp_path / "other") != files(tmp_path / "1")


def test_a_build_that_was_stopped_goes_on(both_splits: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_shards(str(both_splits), tmp_path / "whole", SMALL)
    with pytest.raises(KeyboardInterrupt):
        build_shards(str(both_splits), out, SMALL, workers=1, watch=Stopping(after=8))
    left = files(out)
    assert sorted(left) == [JOURNAL_NAME, "train-000000.tar", "train-000001.tar"]
    before = {name: (out / name).stat().st_mtime_ns for name in left}
    built = build_shards(str(both_splits), out, SMALL)
    assert built.kept == 2
    assert files(out) == files(tmp_path / "whole")
    assert (out / "train-000001.tar").stat().st_mtime_ns == before["train-000001.tar"]


def test_a_shard_that_was_damaged_meanwhile_is_made_again(both_splits: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_shards(str(both_splits), tmp_path / "whole", SMALL)
    with pytest.raises(KeyboardInterrupt):
        build_shards(str(both_splits), out, SMALL, workers=1, watch=Stopping(after=8))
    damaged = bytearray((out / "train-000000.tar").read_bytes())
    damaged[1000] ^= 1
    (out / "train-000000.tar").write_bytes(damaged)
    (out / ".train-000002.tar.partial").write_bytes(b"half")
    assert build_shards(str(both_splits), out, SMALL).kept == 1
    assert files(out) == files(tmp_path / "whole")


def test_other_settings_do_not_mix(both_splits: Path, tmp_path: Path, picture: Callable[..., bytes]) -> None:
    with pytest.raises(KeyboardInterrupt):
        build_shards(str(both_splits), tmp_path / "out", SMALL, workers=1, watch=Stopping(after=8))
    with pytest.raises(UserError, match="its resize is 0, not 16"):
        build_shards(str(both_splits), tmp_path / "out", BuildOptions(samples_per_shard=3, resize=16))
    (both_splits / "train" / "ant" / "new.jpg").write_bytes(picture(77))
    with pytest.raises(UserError, match="its source has changed since"):
        build_shards(str(both_splits), tmp_path / "out", SMALL)
    with pytest.raises(UserError, match=r'its splits is \["train", "val"\], not \["train"\]'):
        build_shards(str(both_splits), tmp_path / "out", BuildOptions(samples_per_shard=3, split="train"))


@pytest.mark.parametrize("change", ["rename", "replace"])
def test_a_source_that_changed_meanwhile_does_not_mix(
    both_splits: Path, tmp_path: Path, picture: Callable[..., bytes], change: str
) -> None:
    out, changed = tmp_path / "out", both_splits / "train" / "ant" / "ant_1.jpg"
    with pytest.raises(KeyboardInterrupt):
        build_shards(str(both_splits), out, SMALL, workers=1, watch=Stopping(after=8))
    if change == "rename":
        changed.rename(changed.with_name("zebra.jpg"))
    else:
        changed.write_bytes(picture(77))
    before = files(out)
    with pytest.raises(UserError, match="its source has changed since") as refused:
        build_shards(str(both_splits), out, SMALL)
    assert files(out) == before
    # The remedy it names.
    assert f"or remove {out / JOURNAL_NAME} and its shards to begin anew" in (refused.value.hint or "")
    for name in before:
        (out / name).unlink()
    build_shards(str(both_splits), out, SMALL)
    build_shards(str(both_splits), tmp_path / "whole", SMALL)
    assert files(out) == files(tmp_path / "whole")


def test_a_build_that_was_killed_at_its_very_end(both_splits: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("petractl.data.writing.journal.Journal.remove", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_shards(str(both_splits), out, SMALL)
    before = files(out)
    assert build_shards(str(both_splits), out, SMALL).kept == 6
    del before[JOURNAL_NAME]
    assert files(out) == before


def test_a_split_is_added_to_the_other(both_splits: Path, tmp_path: Path) -> None:
    build_shards(str(both_splits), tmp_path / "whole", SMALL)
    out = tmp_path / "out"
    build_shards(str(both_splits / "train"), out, SMALL)
    # By itself the folder has two classes, numbered 0 and 1.
    build_shards(str(both_splits / "val"), out, SMALL)
    assert files(out) == files(tmp_path / "whole")


def test_what_is_in_the_way(both_splits: Path, tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    out = tmp_path / "out"
    build_shards(str(both_splits), out, BuildOptions(split="train"))
    before = files(out)
    refused = [
        (both_splits, SMALL, "already holds the shard train-000000.tar"),
        (write_folder(tmp_path / "photographs"), SMALL, "already holds the shard train-000000.tar"),
        (write_folder(tmp_path / "x" / "val", classes=("dog",)), SMALL, "is no class of the training data"),
    ]
    for source, options, message in refused:
        with pytest.raises(UserError, match=message):
            build_shards(str(source), out, options)
    assert files(out) == before
    (out / INDEX_NAME).unlink()
    with pytest.raises(UserError, match=r"holds train-000000.tar, which is in no index"):
        build_shards(str(both_splits), out, SMALL)


@pytest.mark.parametrize("name", ["my-train", "x/y", "-x", "a b", "Value"])
def test_unfit_names(both_splits: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="--name"):
        build_shards(str(both_splits), tmp_path / "out", BuildOptions(name=name))


@pytest.fixture
def stopped_by_damage(both_splits: Path, tmp_path: Path) -> Path:
    """The destination of a build that stopped at a damaged image, after finishing some shards."""
    (both_splits / "val" / "cat" / "cat_1.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DataError, match=r"sample 'cat/cat_1.jpg': its JPEG is truncated") as stopped:
        build_shards(str(both_splits), tmp_path / "out", SMALL, workers=1)
    assert not (tmp_path / "out" / INDEX_NAME).exists()
    assert (tmp_path / "out" / "train-000000.tar").exists()
    assert stopped.value.hint == (
        "with --on-error skip the same command leaves out such samples and goes on; mended or taken out it "
        "makes another source, of which shards are built anew, in another folder"
    )
    return tmp_path / "out"


def test_after_damage_the_build_goes_on_without_it(both_splits: Path, stopped_by_damage: Path) -> None:
    finished = len(list(stopped_by_damage.glob("*.tar")))
    skipping = BuildOptions(samples_per_shard=3, on_error="skip")
    built = build_shards(str(both_splits), stopped_by_damage, skipping)
    assert built.kept == finished
    assert [bad.key for bad in built.skipped] == ["cat/cat_1.jpg"]
    assert not (stopped_by_damage / JOURNAL_NAME).exists()


@pytest.mark.parametrize("mend", [True, False])
def test_after_damage_is_mended_the_build_begins_anew(
    both_splits: Path, tmp_path: Path, stopped_by_damage: Path, picture: Callable[..., bytes], mend: bool
) -> None:
    bad = both_splits / "val" / "cat" / "cat_1.jpg"
    if mend:
        bad.write_bytes(picture(201))
    else:
        bad.unlink()
    with pytest.raises(UserError, match="its source has changed since"):
        build_shards(str(both_splits), stopped_by_damage, SMALL)
    built = build_shards(str(both_splits), tmp_path / "other", SMALL)
    assert sum(entry.samples for entry in built.index.shards) == 15 + mend


@pytest.mark.parametrize("indexed", [True, False])
def test_after_a_damaged_shard_the_build_goes_on_without_it(
    both_splits: Path, tmp_path: Path, indexed: bool
) -> None:
    build_shards(str(both_splits), tmp_path / "set", SMALL)
    damaged = tmp_path / "set" / "val-000001.tar"
    damaged.write_bytes(b"\xff" * damaged.stat().st_size)
    if not indexed:
        (tmp_path / "set" / INDEX_NAME).unlink()
    stopping = BuildOptions(samples_per_shard=4, classes=3)
    with pytest.raises(DataError, match="not a readable shard") as stopped:
        build_shards(str(tmp_path / "set"), tmp_path / "out", stopping, workers=1)
    assert "or give --on-error skip to go on without what is lost" in stopped.value.hint
    finished = len(list((tmp_path / "out").glob("*.tar")))
    assert finished == (3 if indexed else 0)
    skipping = BuildOptions(samples_per_shard=4, classes=3, on_error="skip")
    built = build_shards(str(tmp_path / "set"), tmp_path / "out", skipping)
    assert built.kept == finished
    assert all(bad.place == str(damaged) for bad in built.skipped)
    assert built.skipped


def test_a_shard_that_lacks_samples_is_not_kept_where_damage_stops(both_splits: Path, tmp_path: Path) -> None:
    (both_splits / "train" / "bee" / "bee_2.jpg").write_bytes(b"no image")
    skipping = BuildOptions(samples_per_shard=12, on_error="skip")
    with pytest.raises(KeyboardInterrupt):
        # The first shard is finished with 12 samples, and the second begun.
        build_shards(str(both_splits), tmp_path / "out", skipping, workers=1, watch=Stopping(after=13))
    with pytest.raises(DataError, match=r"sample 'bee/bee_2.jpg'"):
        build_shards(str(both_splits), tmp_path / "out", BuildOptions(samples_per_shard=12))
    assert build_shards(str(both_splits), tmp_path / "out", skipping).skipped[0].key == "bee/bee_2.jpg"


def test_names_with_a_splits_word_inside_another(both_splits: Path, tmp_path: Path) -> None:
    build_shards(str(both_splits), tmp_path / "out", BuildOptions(name="medieval-latest", split="train"))
    build_shards(str(both_splits), tmp_path / "out", BuildOptions(name="medieval-latest", split="val"))
    for split, count in (("train", 12), ("val", 4)):
        assert open_shards([str(tmp_path / "out")], where="data", split=split).sizes == (count,)


def test_a_damaged_image_is_left_out(both_splits: Path, tmp_path: Path) -> None:
    (both_splits / "train" / "bee" / "bee_2.jpg").write_bytes(b"no image")
    (both_splits / "val" / "cat" / "cat_0.jpg").write_bytes(b"")
    options = BuildOptions(samples_per_shard=3, on_error="skip")
    built = build_shards(str(both_splits), tmp_path / "out", options)
    assert [(bad.key, bad.reason) for bad in built.skipped] == [
        ("bee/bee_2.jpg", "its image's 8 bytes are not a JPEG or PNG"),
        ("cat/cat_0.jpg", "its image is empty (0 bytes)"),
    ]
    assert sum(entry.samples for entry in built.index.shards) == 14


def test_a_shard_of_damage_only(tmp_path: Path) -> None:
    (tmp_path / "src" / "ant").mkdir(parents=True)
    (tmp_path / "src" / "ant" / "0.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="not one of its 1 samples can be read"):
        build_shards(str(tmp_path / "src"), tmp_path / "out", BuildOptions(on_error="skip"))


def test_shards_are_made_of_shards(both_splits: Path, tmp_path: Path) -> None:
    build_shards(str(both_splits), tmp_path / "a", SMALL)
    built = build_shards(str(tmp_path / "a"), tmp_path / "b", BuildOptions(name="b", samples_per_shard=100))
    assert [(entry.name, entry.samples) for entry in built.index.shards] == [
        ("b-train-000000.tar", 12),
        ("b-val-000000.tar", 4),
    ]
    assert built.index.class_names == ("ant", "bee", "cat")
    images = set()
    for folder in ("a", "b"):
        store = open_shards([str(tmp_path / folder)], where="data", split="train")
        samples = [store.read(number) for number in range(12)]
        images.add(frozenset((sample.image, sample.label) for sample in samples))
    assert len(images) == 1


def test_compressed_sources_leave_no_copy(tmp_path: Path, write_cifar_shard, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    written = write_cifar_shard(tmp_path / "src" / "train-0.tar.gz", 4)
    build_shards(str(tmp_path / "src"), tmp_path / "out", BuildOptions(classes=10, seed=None))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [INDEX_NAME, "train-000000.tar"]
    assert not (tmp_path / "home").exists()
    store = open_shards([str(tmp_path / "out")], where="data")
    assert (decode(store.read(2).image).transpose(2, 0, 1) == written.images[2]).all()


def test_a_preview_leaves_no_trace(tmp_path: Path, write_cifar_shard) -> None:
    write_cifar_shard(tmp_path / "src" / "train-0.tar.gz", 7)
    options = BuildOptions(classes=10, samples_per_shard=4)
    planned = preview_build(str(tmp_path / "src"), tmp_path / "out", options)
    assert [(shard.name, len(shard.rows)) for shard in planned.shards] == [
        ("train-000000.tar", 4),
        ("train-000001.tar", 3),
    ]
    assert not (tmp_path / "out").exists()


def test_a_wrong_source_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        build_shards(str(tmp_path / "nothing"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_source_and_destination_lie_apart(both_splits: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(both_splits)
    refused = [
        (both_splits, both_splits / "shards", "DST lies in SRC"),
        (both_splits, both_splits / "train" / "ant" / "deep", "DST lies in SRC"),
        (both_splits, tmp_path / "link" / "shards", "DST lies in SRC"),
        (both_splits, both_splits, "DST is SRC itself"),
        (both_splits / "train", both_splits, "DST holds SRC"),
        (both_splits / "train", tmp_path, "DST holds SRC"),
    ]
    for source, folder, message in refused:
        for make in (build_shards, preview_build):
            with pytest.raises(UserError, match=message):
                make(str(source), folder, SMALL)
    assert sorted(path.name for path in both_splits.iterdir()) == ["train", "val"]
    build_shards(str(both_splits), tmp_path / "a", SMALL)
    pattern = str(tmp_path / "a" / "val-{000000..000001}.tar")
    with pytest.raises(UserError, match="DST holds SRC"):
        build_shards(pattern, tmp_path / "a", BuildOptions(name="b"))
    # Named shards are no folder: what is beside them is not theirs.
    build_shards(pattern, tmp_path / "a" / "b", SMALL)


def test_threads_end_with_the_build(both_splits: Path, tmp_path: Path) -> None:
    (both_splits / "train" / "bee" / "bee_2.jpg").write_bytes(b"no image")
    with pytest.raises(DataError):
        build_shards(str(both_splits), tmp_path / "out", SMALL, workers=4)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shard")]
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_full_disk_fails_the_run(both_splits: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "out/.train-000000.tar.partial")

    monkeypatch.setattr(building, "write_shard", full)
    with pytest.raises(RunError, match="cannot be written: No space left"):
        build_shards(str(both_splits), tmp_path / "out", SMALL)


def test_a_place_where_nothing_can_be_written(both_splits: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="this is a file"):
        build_shards(str(both_splits), tmp_path / "file", SMALL)
    with pytest.raises(UserError, match="cannot be made"):
        build_shards(str(both_splits), tmp_path / "file" / "out", SMALL)


@pytest.mark.parametrize(
    ("key", "stored"),
    [
        ("n01440764/n01440764_10026.JPEG", "00000007_n01440764_10026"),
        ("a.b c/d.e.jpg", "00000007_d_e"),
        ("00000003_old", "00000007_old"),
        ("0" * 200, "00000007_" + "0" * 60),
        ("häh?", "00000007_h_h"),
        ("...", "00000007"),
    ],
)
def test_keys_have_no_dot(key: str, stored: str) -> None:
    assert sample_key(7, key) == stored
