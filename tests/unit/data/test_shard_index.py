import json
from pathlib import Path

import pytest

from petractl.data.shard_index import ShardEntry, ShardIndex, index_text, parse_index, read_index
from petractl.errors import DataError

_INDEX = ShardIndex(
    shards=(
        ShardEntry("a-0.tar", 3, bytes=10240, sha256="ab" * 32, place="a-0.tar"),
        ShardEntry("a-1.tar", 2, place="a-1.tar"),
    ),
    classes=2,
    class_names=("cat", "dög"),
    image_size=(32, 48),
)


@pytest.mark.parametrize("index", [_INDEX, ShardIndex(shards=_INDEX.shards)])
def test_what_is_written_is_read(tmp_path: Path, index: ShardIndex) -> None:
    (tmp_path / "index.json").write_text(index_text(index))
    assert read_index(tmp_path) == index
    assert json.loads(index_text(index))["version"] == 1
    assert index_text(index).count("\n") > len(index.shards)


def test_a_shard_is_found_by_its_name() -> None:
    assert _INDEX.entry("a-1.tar") == _INDEX.shards[1]
    assert _INDEX.entry("a-2.tar") is None


def test_no_index_is_none(tmp_path: Path) -> None:
    assert read_index(tmp_path) is None


def test_the_form_of_wids_is_read() -> None:
    table = {
        "wids_version": 1,
        "shardlist": [
            {"url": "https://host/a-0.tar?x=1", "nsamples": 3, "filesize": 5},
            {"url": "a-1.tar", "nsamples": 2},
        ],
    }
    index = parse_index(json.dumps(table).encode(), place="x")
    assert [(entry.name, entry.samples, entry.bytes) for entry in index.shards] == [
        ("a-0.tar", 3, 5),
        ("a-1.tar", 2, None),
    ]
    assert index.shards[0].place == "https://host/a-0.tar?x=1"
    assert index.classes == 0


def _text(**changed: object) -> str:
    return json.dumps({**json.loads(index_text(_INDEX)), **changed})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no JSON"),
        ("{" * 100_000, "no JSON"),
        ('{"version": ' + "9" * 10_000 + "}", "no JSON|not a number"),
        ("[]", "no table"),
        ("{}", 'neither "shards" nor "shardlist"'),
        (_text(version=2), "version is 2"),
        (_text(classes=True), '"classes" of it is True'),
        (_text(classes=3), "says 3 classes, and names 2"),
        (_text(class_names=[1, 2]), "no list of names"),
        (_text(image_size=[0, 3]), r"not \[height, width\]"),
        (_text(image_size=32), r"not \[height, width\]"),
        (_text(shards=[]), "lists no shard"),
        (_text(shards={"a": 1}), "no list of tables"),
        (_text(shards=[{"name": "../a.tar", "samples": 1}]), "not a file's name"),
        (_text(shards=[{"name": "a.tar", "samples": -1}]), "not a number from 0"),
        (_text(shards=[{"name": "a.tar", "samples": 1.5}]), "not a number from 0"),
        (_text(shards=[{"samples": 1}]), "not a text"),
        (_text(shards=[{"name": "a.tar", "samples": 1}] * 2), "'a.tar' twice"),
    ],
)
def test_a_damaged_index_is_an_error(text: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        parse_index(text.encode(), place="d/index.json")
    assert caught.value.where == "d/index.json"
    assert "shards build" in caught.value.hint
