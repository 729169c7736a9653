import os
from pathlib import Path

import pytest

from petractl.data.places import ShardPlace, brace_names, find_shards, scheme, shards_in, splits_said
from petractl.data.shard_index import ShardEntry, ShardIndex, index_text
from petractl.errors import DataError

_WHERE = "data.train"


def _make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def _index(folder: Path, *names: str) -> Path:
    entries = tuple(ShardEntry(name=name, samples=1, place=name) for name in names)
    path = folder / "index.json"
    path.write_text(index_text(ShardIndex(shards=entries)))
    return path


def _names(places: tuple[ShardPlace, ...]) -> list[str]:
    assert all(place.kind == "file" for place in places)
    return [place.name for place in places]


def test_patterns_lists_and_file_urls_keep_their_order(tmp_path: Path) -> None:
    _make(tmp_path, "x-00.tar", "x-01.tar", "y z.tar")
    places = [f"{tmp_path}/x-{{01,00}}.tar", f"file://{tmp_path}/y%20z.tar"]
    assert _names(find_shards(places, where=_WHERE)) == ["x-01.tar", "x-00.tar", "y z.tar"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", ["a-train-0.tar", "a-train-1.tar.gz"]), ("val", ["a-val-0.tar.zst"]), (None, 4)],
)
def test_a_folder_gives_the_shards_of_the_split(tmp_path: Path, split: object, expected: object) -> None:
    _make(tmp_path, "a-train-1.tar.gz", "a-train-0.tar", "a-val-0.tar.zst", "b.tgz", ".hidden.tar", "x.txt")
    found = _names(find_shards([str(tmp_path)], where=_WHERE, split=split))  # type: ignore[arg-type]
    assert found == expected or len(found) == expected


def test_a_folder_of_folders_gives_that_of_the_split(tmp_path: Path) -> None:
    _make(tmp_path, "train/0.tar", "train/1.tar", "validation/0.tar")
    assert _names(find_shards([str(tmp_path)], where=_WHERE, split="train")) == ["0.tar", "1.tar"]
    assert _names(find_shards([str(tmp_path)], where=_WHERE, split="val")) == ["0.tar"]


def test_shards_that_name_no_split_count_only_where_they_are_asked_for(tmp_path: Path) -> None:
    _make(tmp_path, "1.tar", "0.tar")
    assert _names(find_shards([str(tmp_path)], where=_WHERE, split="val")) == ["0.tar", "1.tar"]
    assert shards_in(tmp_path, "val", named_only=True) == []


def test_an_index_is_a_place(tmp_path: Path) -> None:
    _make(tmp_path, "b-train.tar", "a-train.tar", "c-val.tar", "not-listed.tar")
    index = str(_index(tmp_path, "b-train.tar", "a-train.tar", "c-val.tar"))
    assert _names(find_shards([index], where=_WHERE, split="train")) == ["b-train.tar", "a-train.tar"]
    assert _names(find_shards([index], where=_WHERE, split="val")) == ["c-val.tar"]
    assert len(find_shards([index], where=_WHERE)) == 3


def test_shards_of_the_index_that_are_gone_are_named(tmp_path: Path) -> None:
    _make(tmp_path, "train-0.tar", "val-0.tar")
    index = _index(tmp_path, "train-0.tar", "train-1.tar", "val-0.tar")
    for place in (str(tmp_path), str(index)):
        with pytest.raises(DataError, match=r"no such file: .*train-1\.tar") as caught:
            find_shards([place], where=_WHERE, split="train")
        assert caught.value.where == _WHERE
    assert _names(find_shards([str(tmp_path)], where=_WHERE, split="val")) == ["val-0.tar"]


@pytest.mark.parametrize(
    ("place", "folder", "name"),
    [
        ("https://host/set/train-0.tar", "https://host/set", "train-0.tar"),
        ("s3://bucket/train-0.tar", "s3://bucket", "train-0.tar"),
        ("https://host/set/train-0.tar?signature=a/b", "", "train-0.tar"),
    ],
)
def test_urls_are_taken_as_they_are(place: str, folder: str, name: str) -> None:
    (found,) = find_shards([place], where=_WHERE)
    assert (found.kind, found.folder, found.name) == ("url", folder, name)


def test_patterns_of_urls_are_written_out() -> None:
    found = find_shards(["s3://bucket/{00..02}.tar"], where=_WHERE)
    assert [place.text for place in found] == [f"s3://bucket/0{n}.tar" for n in range(3)]


@pytest.mark.parametrize("place", ["pipe:touch {marker}", " pipe:touch {marker}", "PIPE:touch {marker}"])
def test_a_pipe_is_refused_unless_allowed_and_not_run_here(tmp_path: Path, place: str) -> None:
    place = place.format(marker=tmp_path / "marker")
    with pytest.raises(DataError, match="would run a command") as caught:
        find_shards([place], where=_WHERE)
    assert "allow_pipe" in caught.value.hint
    (found,) = find_shards([place], where=_WHERE, allow_pipe=True)
    assert (found.kind, found.folder) == ("pipe", "")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("{folder}/none.tar", r"no such file: .*none\.tar"),
        ("{folder}/a-{{0..2}}.tar", r"a-1\.tar, .*a-2\.tar \(2 of 3 files\)"),
        ("{folder}/empty", "empty holds no shard"),
        ("{folder}/fifo.tar", "neither a file nor a folder"),
        ("file://elsewhere/a.tar", "file of another machine"),
        ("{folder}/a-{{0..99999999999}}.tar", "more than 100000 files"),
        ("{folder}/" + "{{a,b}}" * 60, "more than 100000 files"),
        ("{folder}/" + "{{a..z}}" * 20, "more than 100000 files"),
        ("{folder}/" + "{{a,{{b,c{{1..9}}}}}}" * 12, "more than 100000 files"),
        ("{folder}/a-{{0..1.tar", "bad pattern"),
    ],
)
def test_what_is_not_there_is_an_error(tmp_path: Path, place: str, said: str) -> None:
    _make(tmp_path, "a-0.tar", "empty/x.txt")
    os.mkfifo(tmp_path / "fifo.tar")
    with pytest.raises(DataError, match=said) as caught:
        find_shards([place.format(folder=tmp_path)], where=_WHERE)
    assert caught.value.where == _WHERE
    assert caught.value.hint


def test_a_folder_of_another_split_says_so(tmp_path: Path) -> None:
    _make(tmp_path, "train-0.tar")
    with pytest.raises(DataError, match="no shard of the val split"):
        find_shards([str(tmp_path)], where="data.val", split="val")


def test_a_shard_named_twice_is_an_error(tmp_path: Path) -> None:
    _make(tmp_path, "a.tar")
    with pytest.raises(DataError, match="named twice"):
        find_shards([str(tmp_path), f"{tmp_path}/a.tar"], where=_WHERE)


@pytest.mark.parametrize(
    ("place", "expected"), [("a:b.tar", ""), ("C:/x", ""), ("gs://b/x", "gs"), ("file:/x", "file"), ("x", "")]
)
def test_schemes(place: str, expected: str) -> None:
    assert scheme(place) == expected


def test_nested_patterns_below_the_limit_are_written_out() -> None:
    assert len(brace_names("x-{a{0..99},b{0..99}}-{0..499}.tar", _WHERE)) == 100_000


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("medieval-train-0.tar", ("train",)),
        ("latest-contest-train_00.tar", ("train",)),
        ("imagenet1k-validation-00.tar", ("val",)),
        ("a-TEST0.tar", ("val",)),
        ("cifarTrain-0.tar", ("train",)),
        ("strain-retrieval-festival.tar", ()),
        ("trainval-0.tar", ("train",)),
        ("train_val-0.tar", ("train", "val")),
    ],
)
def test_a_split_is_said_at_the_start_of_a_word(name: str, said: tuple[str, ...]) -> None:
    assert splits_said(name) == said


def test_training_shards_are_not_validated_on_for_their_name(tmp_path: Path) -> None:
    _make(tmp_path, "medieval-train-0.tar", "medieval-train-1.tar", "medieval-val-0.tar")
    places = [str(tmp_path), str(_index(tmp_path, "medieval-train-0.tar", "medieval-val-0.tar"))]
    for place in places:
        assert _names(find_shards([place], where=_WHERE, split="val")) == ["medieval-val-0.tar"]


@pytest.mark.parametrize("names", [["test-train-0.tar", "val-0.tar"], ["train-val/0.tar"]])
def test_a_name_that_says_both_splits_is_refused(tmp_path: Path, names: list[str]) -> None:
    _make(tmp_path, *names)
    with pytest.raises(DataError, match="both train and val") as caught:
        find_shards([str(tmp_path)], where=_WHERE, split="train")
    assert "pattern" in caught.value.hint


def test_a_url_named_twice_is_an_error() -> None:
    with pytest.raises(DataError, match=r"a\.tar is named twice: its"):
        find_shards(["s3://bucket/a.tar"] * 2, where=_WHERE)


def test_the_same_file_by_a_link_is_named_twice(tmp_path: Path) -> None:
    _make(tmp_path, "a.tar")
    (tmp_path / "b.tar").symlink_to("a.tar")
    with pytest.raises(DataError, match=r"b\.tar is named twice \(it is the same file as .*a\.tar\)"):
        find_shards([str(tmp_path)], where=_WHERE)


def test_an_index_whose_names_say_both_splits_is_refused(tmp_path: Path) -> None:
    _make(tmp_path, "test-train-0.tar", "val-0.tar")
    index = _index(tmp_path, "test-train-0.tar", "val-0.tar")
    with pytest.raises(DataError, match="both train and val"):
        find_shards([str(index)], where="data.val", split="val")


@pytest.mark.parametrize("part", ["{a,b}", "{a,{b,c{1..9}}}", "{a..z}", "{0..9}"])
def test_a_pattern_of_too_many_names_is_not_written_out(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def expand(pattern: str) -> list[str]:
        raise AssertionError(pattern)

    monkeypatch.setattr("braceexpand.braceexpand", expand)
    with pytest.raises(DataError, match="more than 100000 files"):
        brace_names("x/" + part * 17, _WHERE)
