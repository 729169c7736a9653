import logging
import re

from tracking_events import make_end, make_measured, make_plan, make_run

from petractl.events import (
    EpochStarted,
    EventBus,
    RunFailed,
    StepsDone,
    WarningRaised,
    as_record,
)
from petractl.tracking.log_file import LogFile, log_line

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}  "


def line_of(event):
    line = log_line(as_record(event, time=1.5))
    assert re.match(TIME, line)
    return re.sub(TIME, "", line)


def logged(path, events, **settings):
    bus = EventBus()
    bus.subscribe(LogFile(path, **settings))
    for event in events:
        bus.emit(event)
    bus.close()
    return path.read_text().splitlines()


def test_every_event_is_one_readable_line(tmp_path):
    events = [*make_run(tmp_path), make_measured(1, 1), WarningRaised("two\nlines"), make_end()]
    lines = logged(tmp_path / "logs" / "stage-01.log", events)
    assert len(lines) == len(events)
    assert all(re.match(TIME, line) for line in lines)


def test_a_line_has_words_first_and_leaves_out_what_is_not_there():
    assert line_of(EpochStarted(3)) == "epoch started  epoch 3"
    assert line_of(make_measured(1, 2, idle=12.0, replica=1)) == (
        "stage measured  epoch 1  stage 2  replica=1  rank=4  seconds=2  compute_percent=88"
        "  wait_forward_percent=6  wait_backward_percent=3  idle_percent=12  bytes_sent_forward=1048576"
        "  bytes_sent_backward=524288  staleness_updates=0.5  peak_memory_bytes=1048576"
    )
    assert "stages=2  microbatch_size=64" in line_of(make_plan())
    assert line_of(RunFailed("first\nsecond")) == "run failed  message=first | second"


def test_credentials_do_not_reach_the_log():
    assert "hunter2" not in line_of(WarningRaised("no answer from http://me:hunter2@host/"))


def test_progress_is_logged_once_a_minute(tmp_path):
    now = 0.0

    def steps_every_25_s():
        nonlocal now
        for n in range(1, 8):
            yield StepsDone(1, n, 23, 1.0, 50.0, 100.0, 0.1, n)
            now += 25.0

    lines = logged(tmp_path / "stage-00.log", steps_every_25_s(), clock=lambda: now)
    assert [re.search(r"microbatches=(\d+)", line)[1] for line in lines] == ["1", "4", "7"]


def test_a_log_is_continued_and_shared(tmp_path):
    path = tmp_path / "stage-00.log"
    path.write_text("from before\n")
    listener = LogFile(path)
    listener.handle(EpochStarted(1), as_record(EpochStarted(1), time=0.0))
    with path.open("a") as other:  # another writer, while the listener has the file open
        other.write("a library's warning\n")
    listener.handle(EpochStarted(2), as_record(EpochStarted(2), time=0.0))
    listener.close()
    ends = [line.rpartition("  ")[2] for line in path.read_text().splitlines()]
    assert ends == ["from before", "epoch 1", "a library's warning", "epoch 2"]


def test_the_time_is_written_as_logging_writes_it():
    seconds = 1_700_000_000.25
    record = logging.makeLogRecord({"created": seconds, "msecs": 250})
    line = log_line(as_record(EpochStarted(1), time=seconds))
    assert line.startswith(logging.Formatter().formatTime(record) + "  ")
