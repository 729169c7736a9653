from pathlib import Path

import pytest

from petractl.data.writing.journal import JOURNAL_NAME, open_journal
from petractl.data.writing.shard_file import Skipped, WrittenShard
from petractl.errors import UserError

BUILD = {"source": "/x", "samples_per_shard": 10, "splits": [["train", 3]]}
FIRST = WrittenShard("a-0.tar", 10, 20480, "ab" * 32, (32, 32))
SECOND = WrittenShard("a-1.tar", 9, 20480, "cd" * 32, None, (Skipped("src", "7", "its image is empty"),))


def test_finished_shards_are_remembered(tmp_path: Path) -> None:
    with open_journal(tmp_path, BUILD) as journal:
        assert journal.finished == {}
        journal.add(FIRST)
        journal.add(SECOND)
    with open_journal(tmp_path, BUILD) as journal:
        assert journal.finished == {"a-0.tar": FIRST, "a-1.tar": SECOND}
        journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_was_cut_off_is_forgotten(tmp_path: Path) -> None:
    with open_journal(tmp_path, BUILD) as journal:
        journal.add(FIRST)
        journal.add(SECOND)
    path = tmp_path / JOURNAL_NAME
    path.write_bytes(path.read_bytes()[:-5])
    with open_journal(tmp_path, BUILD) as journal:
        assert list(journal.finished) == ["a-0.tar"]
        journal.add(SECOND)
    with open_journal(tmp_path, BUILD) as journal:
        assert list(journal.finished) == ["a-0.tar", "a-1.tar"]


def test_a_journal_that_was_hardly_begun(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(b'{"source": "/')
    with open_journal(tmp_path, BUILD) as journal:
        assert journal.finished == {}


def test_another_build_is_told_by_what_differs(tmp_path: Path) -> None:
    with open_journal(tmp_path, BUILD):
        pass
    with (
        pytest.raises(UserError, match="its samples per shard is 10, not 20"),
        open_journal(tmp_path, {**BUILD, "samples_per_shard": 20}),
    ):
        pass
    assert (tmp_path / JOURNAL_NAME).is_file()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        open_journal(tmp_path, BUILD),
        pytest.raises(UserError, match="another process is building"),
        open_journal(tmp_path, BUILD),
    ):
        pass
