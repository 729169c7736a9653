import contextlib
import json
import math
import resource
from pathlib import Path

import numpy as np
import pytest

from petractl.errors import DataError, RunError
from petractl.events import EpochTrained, EventBus, RunFailed, as_record
from petractl.tracking.journal import Journal, JournalTail, encode_record, read_journal


def trained(epoch, loss=0.5):
    return EpochTrained(epoch, loss, 90.0, 100, 1000.0, 0.1, 0.05, epoch * 10)


def write(run_dir, *events):
    bus = EventBus(clock=lambda: 7.25)
    bus.subscribe(Journal(run_dir))
    for event in events:
        bus.emit(event)
    bus.close()


def test_one_line_of_json_for_each_event_and_read_back(tmp_path):
    write(tmp_path / "run", trained(1), RunFailed("x\ny"))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[0])["epoch"] == 1
    assert read_journal(tmp_path / "run") == [
        as_record(trained(1), time=7.25),
        as_record(RunFailed("x\ny"), time=7.25),
    ]
    assert read_journal(tmp_path / "run" / "metrics.jsonl") == read_journal(tmp_path / "run")


def test_each_event_is_on_disk_before_the_next(tmp_path):
    journal = Journal(tmp_path)
    journal.handle(trained(1), as_record(trained(1), time=0.0))
    assert len(read_journal(tmp_path)) == 1
    journal.close()


def test_what_is_not_finite_is_written_as_strings_that_float_reads(tmp_path):
    write(tmp_path, trained(1, math.nan), trained(2, math.inf), trained(3, -math.inf))

    def refuse(literal):
        raise AssertionError(literal)

    losses = [json.loads(line, parse_constant=refuse)["loss"] for line in (tmp_path / "metrics.jsonl").open()]
    assert losses == ["NaN", "Infinity", "-Infinity"]
    assert math.isnan(float(losses[0]))
    assert float(losses[2]) == -math.inf


def test_scalars_of_numpy_and_paths_do_not_break_a_line():
    line = encode_record(
        {
            "a": np.float32(0.5),
            "b": np.int64(3),
            "c": np.float32("nan"),
            "d": Path("x"),
            "e": [np.float64(1.0)],
        }
    )
    assert json.loads(line) == {"a": 0.5, "b": 3, "c": "NaN", "d": "x", "e": [1.0]}


def test_a_resumed_run_continues_the_same_file(tmp_path):
    write(tmp_path, trained(1))
    write(tmp_path, trained(2))
    assert [record["epoch"] for record in read_journal(tmp_path)] == [1, 2]


def test_a_truncated_last_line_is_skipped_by_the_reader_and_removed_by_the_next_writer(tmp_path):
    write(tmp_path, trained(1))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    assert [record["epoch"] for record in read_journal(path)] == [1]
    write(tmp_path, trained(2))
    assert [record["epoch"] for record in read_journal(path)] == [1, 2]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    write(tmp_path, trained(1))
    path = tmp_path / "metrics.jsonl"
    path.write_text("[1]\n" + path.read_text())
    with pytest.raises(DataError, match=r"metrics.jsonl:1: not a JSON object"):
        read_journal(path)


def test_a_missing_journal_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no journal"):
        read_journal(tmp_path / "nothing")


def test_the_tail_gives_each_complete_line_once(tmp_path):
    tail = JournalTail(tmp_path)
    assert tail.read() == []
    write(tmp_path, trained(1))
    assert [record["epoch"] for record in tail.read()] == [1]
    assert tail.read() == []
    path = tmp_path / "metrics.jsonl"
    line = encode_record(as_record(trained(2), time=0.0))
    with path.open("a") as file:
        file.write(line[:30])
    assert tail.read() == []
    with path.open("a") as file:
        file.write(line[30:] + "\n")
    assert [record["epoch"] for record in tail.read()] == [2]


@contextlib.contextmanager
def no_room(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_a_full_disk_refuses_is_written_when_there_is_room_and_told_once(tmp_path):
    told = []
    journal = Journal(tmp_path, on_warning=lambda message, hint: told.append(message))
    events = [trained(epoch) for epoch in range(1, 6)]
    line = len(encode_record(as_record(events[0], time=0.0))) + 1
    for event in events[:3]:
        with no_room(line + line // 2):  # of the second event the half
            journal.handle(event, as_record(event, time=0.0))
    assert [record["epoch"] for record in read_journal(tmp_path)] == [1]
    assert told == [f"{journal.path} cannot be written: File too large"]
    for event in events[3:]:
        journal.handle(event, as_record(event, time=0.0))
    journal.close()
    assert [record["epoch"] for record in read_journal(tmp_path)] == [1, 2, 3, 4, 5]


def test_what_is_missing_at_the_end_is_told(tmp_path, caplog):
    bus = EventBus()
    bus.subscribe(Journal(tmp_path))
    with no_room(0):
        bus.emit(trained(1))
        bus.close()
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "File too large" in caplog.text


def test_a_journal_that_cannot_be_opened_is_one_clear_error(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match="the journal cannot be written"):
        Journal(tmp_path)
