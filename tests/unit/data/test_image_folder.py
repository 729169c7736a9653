import os
import pickle
from pathlib import Path

import pytest

from petractl.data import encoded
from petractl.data.encoded import BadSample
from petractl.data.image_folder import is_image_folder, open_image_folder
from petractl.errors import DataError

_WHERE = "data.train"


def _make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def test_classes_and_images_in_the_order_of_their_names(tmp_path: Path) -> None:
    _make(tmp_path, "dog/b.jpg", "dog/a.JPEG", "cat/deep/er/x.png", "cat/x.txt", "cat/.x.jpg", ".git/x.jpg")
    folder = open_image_folder(tmp_path, where=_WHERE)
    assert folder.class_names == ("cat", "dog")
    assert (folder.sizes, folder.classes) == ((3,), 2)
    read = [folder.read(index) for index in range(3)]
    assert [sample.key for sample in read] == ["cat/deep/er/x.png", "dog/a.JPEG", "dog/b.jpg"]
    assert [sample.label for sample in read] == [0, 1, 1]
    assert all(sample.image == sample.key.encode() for sample in read)
    assert {sample.place for sample in read} == {str(tmp_path)}
    assert pickle.loads(pickle.dumps(folder)).read(1) == read[1]


def test_it_agrees_with_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    _make(tmp_path, *(f"c{n % 3}/{'sub/' * (n % 2)}{n}.jpg" for n in range(20)))
    theirs = ImageFolder(str(tmp_path))
    ours = open_image_folder(tmp_path, where=_WHERE)
    samples = [ours.read(index) for index in range(ours.sizes[0])]
    assert sorted((f"{tmp_path}/{s.key}", s.label) for s in samples) == sorted(theirs.samples)
    assert list(ours.class_names) == theirs.classes


def test_a_test_set_has_the_training_sets_numbers(tmp_path: Path) -> None:
    _make(tmp_path, "train/a/0.jpg", "train/b/0.jpg", "train/c/0.jpg", "val/c/0.jpg", "val/a/0.jpg")
    names = open_image_folder(tmp_path / "train", where=_WHERE).class_names
    val = open_image_folder(tmp_path / "val", where="data.val", class_names=names)
    assert [val.read(index).label for index in range(2)] == [0, 2]
    assert val.classes == 3
    _make(tmp_path, "val/d/0.jpg")
    with pytest.raises(DataError, match="d is no class of the training data") as caught:
        open_image_folder(tmp_path / "val", where="data.val", class_names=names)
    assert caught.value.where == "data.val"


def test_names_of_any_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = os.fsencode(tmp_path) + b"/a/\xff\xc3.jpg"
    with open(path, "wb") as file:
        file.write(b"x")
    assert open_image_folder(tmp_path, where=_WHERE).read(0).image == b"x"


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    _make(tmp_path, "set/a/0.jpg", "elsewhere/1.jpg")
    (tmp_path / "set/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/a/again").symlink_to(tmp_path / "set/a")
    (tmp_path / "set/a/2.jpg").symlink_to(tmp_path / "elsewhere/1.jpg")
    folder = open_image_folder(tmp_path / "set", where=_WHERE)
    assert [folder.read(index).key for index in range(folder.sizes[0])] == ["a/0.jpg", "a/2.jpg", "b/1.jpg"]


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("link", "No such file"),
        ("pipe", "not a regular file"),
        ("empty", "empty"),
        ("huge", "above the limit"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_bad_sample(
    tmp_path: Path, kind: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make(tmp_path, "a/0.jpg")
    path = tmp_path / "a" / "1.jpg"
    if kind == "link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(b"" if kind == "empty" else b"x" * 100)
        monkeypatch.setattr(encoded, "MAX_IMAGE_BYTES", 50)
    folder = open_image_folder(tmp_path, where=_WHERE)
    with pytest.raises(BadSample, match=said) as caught:
        folder.read(1)
    assert (caught.value.place, caught.value.key) == (str(tmp_path), "a/1.jpg")
    assert folder.read(0).label == 0


def test_other_endings(tmp_path: Path) -> None:
    _make(tmp_path, "a/0.webp", "a/1.jpg")
    assert open_image_folder(tmp_path, where=_WHERE, extensions=("webp",)).read(0).key == "a/0.webp"


@pytest.mark.parametrize(
    ("names", "said"),
    [((), "no folder"), (("0.jpg",), "no folder of a class"), (("a/0.jpg", "b/0.txt"), "b holds no image")],
)
def test_what_is_no_image_folder_is_an_error(tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        open_image_folder(_make(tmp_path / "set", *names), where=_WHERE)
    assert caught.value.where == _WHERE
    assert caught.value.hint


def test_shards_are_no_image_folder(tmp_path: Path) -> None:
    assert not is_image_folder(tmp_path)
    assert not is_image_folder(tmp_path / "none")
    assert is_image_folder(_make(tmp_path, "a/0.jpg"))
    assert not is_image_folder(_make(tmp_path, "0.tar"))
