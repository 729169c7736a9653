import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from petractl.data import Data, describe_data, open_data
from petractl.data.dataset import PhotographData
from petractl.errors import DataError

Write = Callable[[Path, list[tuple[str, bytes]]], Path]
CLASS_NAMES = ["ant", "bee", "cat"]


def picture(seed: int, *, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


def encoded(seed: int, *, kind: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    picture(seed, size=size).save(file, format=kind)
    return file.getvalue()


@pytest.fixture
def shards(tmp_path: Path, write_shard: Write) -> Path:
    """Six training samples in two shards and four to test on, 3 classes, no index."""
    folder = tmp_path / "shards"
    for name, seeds in {"train-0": range(3), "train-1": range(3, 6), "val-0": range(4)}.items():
        entries = [
            entry
            for seed in seeds
            for entry in ((f"{seed}.jpg", encoded(seed)), (f"{seed}.cls", str(seed % 3).encode()))
        ]
        write_shard(folder / f"{name}.tar", entries)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two training images per class and one to test on, in folders of their classes."""
    root = tmp_path / "folders"
    for split, count in (("train", 2), ("val", 1)):
        for label, name in enumerate(CLASS_NAMES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                (root / split / name / f"{number}.JPEG").write_bytes(encoded(10 * label + number))
    return root


def opened(name: str = "shards", **keys: object) -> PhotographData | Data:
    return open_data(name, **{"train": "", "val": "", "seed": 0, **keys})


def described(name: str = "shards", **keys: object) -> object:
    return describe_data(name, **{"train": "", "val": "", **keys})


def write_index(folder: Path, **facts: object) -> None:
    shards = [
        {"name": path.name, "samples": 3 if "train" in path.name else 4}
        for path in sorted(folder.glob("*.tar"))
    ]
    (folder / "index.json").write_text(json.dumps({"version": 1, **facts, "shards": shards}))


def test_shards_of_a_folder(shards: Path) -> None:
    data = opened(train=str(shards), classes=3, image_size=16)
    assert isinstance(data, PhotographData)
    info = data.info
    assert (info.name, info.classes, info.channels, info.height, info.width) == ("shards", 3, 3, 16, 16)
    assert (info.train_samples, info.val_samples) == (6, 4)
    assert described(train=str(shards), classes=3, image_size=16) == info
    (batch,) = data.train_loader(batch_size=6).epoch(0)
    assert batch.images.shape == (6, 3, 16, 16)
    assert sorted(batch.labels.tolist()) == [0, 0, 1, 1, 2, 2]


def test_shards_by_pattern_and_list(shards: Path) -> None:
    train, val = f"{shards}/train-{{0..1}}.tar", [f"{shards}/val-0.tar"]
    data = opened(train=train, val=val, classes=5)
    assert (data.info.classes, data.info.height) == (5, 224)


def test_the_classes_must_be_known(shards: Path) -> None:
    with pytest.raises(DataError, match="how many classes") as caught:
        opened(train=str(shards))
    assert caught.value.where == "data.classes"
    write_index(shards, classes=3)
    assert opened(train=str(shards)).info.classes == 3
    assert described(train=str(shards)).classes == 3
    with pytest.raises(DataError, match="3 classes, more than 2"):
        opened(train=str(shards), classes=2)


def test_a_test_set_alone_has_the_classes_of_the_training_set(shards: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (shards / "val-0.tar").rename(other / "val-0.tar")
    write_index(shards, classes=3)
    data = opened(train=str(shards), val=str(other), test_only=True)
    assert (data.info.classes, data.info.train_samples, data.info.val_samples) == (3, 0, 4)
    with pytest.raises(DataError, match="how many classes"):
        opened(val=str(other), test_only=True)


@pytest.mark.parametrize("name", ["shards", "imagenet"])
def test_folders_of_classes(
    name: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    folders.rename(tmp_path / "data" / name)
    monkeypatch.chdir(tmp_path)
    data = opened(name, image_size=16)
    assert data.info.classes == (1000 if name == "imagenet" else 3)
    assert (data.info.train_samples, data.info.val_samples) == (6, 3)
    labels = [label for batch in data.eval_loader(batch_size=2) for label in batch.labels.tolist()]
    assert labels == [0, 1, 2]
    assert described(name, image_size=16) == data.info


def test_a_folder_of_classes_for_each_split(folders: Path) -> None:
    data = opened(train=str(folders / "train"), val=str(folders / "val"))
    assert (data.info.train_samples, data.info.val_samples, data.info.classes) == (6, 3, 3)


def test_both_splits_have_the_same_classes(folders: Path) -> None:
    (folders / "val" / "bee").rename(folders / "val" / "bird")
    with pytest.raises(DataError, match="bird is no class of the training data") as caught:
        opened(train=str(folders))
    assert caught.value.where == "data.val"
    for test_only in (False, True):
        with pytest.raises(DataError, match="bird is no class of the training data"):
            opened(train=str(folders / "train"), val=str(folders / "val"), test_only=test_only)


@pytest.mark.parametrize("test_only", [False, True])
def test_a_class_that_the_test_set_lacks_shifts_no_label(folders: Path, test_only: bool) -> None:
    shutil.rmtree(folders / "val" / "ant")
    data = opened(train=str(folders), image_size=16, test_only=test_only)
    assert data.info.classes == 3
    labels = [label for batch in data.eval_loader(batch_size=2) for label in batch.labels.tolist()]
    assert labels == [1, 2]


def test_a_file_of_both_splits_is_warned_of(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(train=str(shards), classes=3)
    assert not caplog.records
    (shards / "val-1.tar").symlink_to("train-1.tar")
    opened(train=str(shards), classes=3)
    assert [r.getMessage() for r in caplog.records] == [
        f"{shards}/train-1.tar: trained on and validated on as well"
    ]


def test_the_folder_of_training_classes_is_no_test_set(folders: Path) -> None:
    with pytest.raises(DataError, match="the val split of shards is not in"):
        opened(train=str(folders / "train"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("imagenet", ["ILSVRC2012_img_train.tar", "image-net.org", "data/imagenet/train"]),
        ("shards", ["set data.train", "petractl shards build"]),
    ],
)
def test_a_missing_set_says_what_to_get(
    name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for use in (opened, described):
        with pytest.raises(DataError, match=f"train split of {name} is not in data/{name}") as caught:
            use(name)
        assert caught.value.where == "data.train"
        assert all(word in caught.value.hint for word in words)


@pytest.mark.parametrize("train", ["nope", "nope-{00..03}.tar", "pipe:cat x.tar"])
def test_a_wrong_training_set_is_told_before_a_missing_test_set(train: str) -> None:
    with pytest.raises(DataError) as caught:
        describe_data("shards", train=train, val="")
    assert caught.value.where == "data.train"
    assert train[:4] in caught.value.what


def test_imagenet_takes_shards_of_fewer_classes(shards: Path) -> None:
    write_index(shards, classes=3)
    assert opened("imagenet", train=str(shards)).info.classes == 1000
    assert opened("imagenet", train=str(shards), classes=3).info.classes == 3
    write_index(shards, classes=1001)
    with pytest.raises(DataError, match="1001 classes, more than 1000"):
        opened("imagenet", train=str(shards))


def test_small_images_are_cropped_after_padding(tmp_path: Path, write_shard: Write) -> None:
    for name in ("train-0", "val-0"):
        entries = [(f"{n}.png", encoded(n, kind="PNG", size=(32, 32))) for n in range(4)]
        labels = [(f"{n}.cls", b"1") for n in range(4)]
        pairs = [entry for pair in zip(entries, labels, strict=True) for entry in pair]
        write_shard(tmp_path / f"{name}.tar", pairs)
    index = {"classes": 2, "image_size": [32, 32]}
    sizes = [{"name": f"{name}-0.tar", "samples": 4} for name in ("train", "val")]
    (tmp_path / "index.json").write_text(json.dumps({"version": 1, **index, "shards": sizes}))
    data = opened(train=str(tmp_path))
    assert isinstance(data, PhotographData)
    assert (data.info.height, data.crop, data.pixels.resize) == (32, "pad", 32)
    kept = opened(train=str(tmp_path), resident=True)
    assert isinstance(kept, Data)
    assert kept.resident
    expected = np.asarray(picture(2, size=(32, 32))).transpose(2, 0, 1)
    np.testing.assert_array_equal(kept.train.images[2], expected)
    large = opened(train=str(tmp_path), image_size=64, crop="random-resized")
    assert (large.info.height, large.crop, large.pixels.resize) == (64, "random-resized", 0)


def test_keys_reach_the_loader(shards: Path) -> None:
    data = opened(
        train=str(shards),
        classes=3,
        image_size=20,
        resize=24,
        crop_scale=0.3,
        decoder="pillow",
        image_entries=("jpg",),
        shuffle_buffer=7,
        on_error="skip",
        max_skipped=2,
    )
    assert isinstance(data, PhotographData)
    pixels = data.pixels
    assert (pixels.size, pixels.resize, pixels.scale, pixels.decoder) == (20, 24, (0.3, 1.0), "pillow")
    assert pixels.formats == ("JPEG",)
    assert (data.shuffle_buffer, data.on_error, data.max_skipped) == (7, "skip", 2)


def test_a_crop_larger_than_the_image_is_refused(shards: Path) -> None:
    write_index(shards, classes=3, image_size=[32, 32])
    with pytest.raises(DataError, match="30 is less than the side of what is cut out of it, 32") as caught:
        described(train=str(shards), resize=30)
    assert caught.value.where == "data.resize"


def test_entries_of_several_parts(tmp_path: Path, write_shard: Write) -> None:
    for name in ("train-0", "val-0"):
        entries = [
            entry
            for n in range(3)
            for entry in ((f"{n}.left.jpg", encoded(n)), (f"{n}.jpg", b"no"), (f"{n}.y.cls", b"1"))
        ]
        write_shard(tmp_path / f"{name}.tar", entries)
    data = opened(
        train=str(tmp_path), classes=2, image_size=8, image_entries=("left.jpg",), label_entry="y.cls"
    )
    (batch,) = data.eval_loader(batch_size=9)
    assert batch.labels.tolist() == [1, 1, 1]


def test_numbers_of_fake_data_are_refused(shards: Path) -> None:
    with pytest.raises(DataError, match="RGB, 3 channels"):
        opened(train=str(shards), classes=3, channels=1)
    with pytest.raises(DataError, match="not made up"):
        opened(train=str(shards), classes=3, fake_samples=8)
