"""The files of a measured timeline: times from the epoch's start, one chart, harmless where it fails."""

import json
from pathlib import Path

from petractl.engine.recorder import Record
from petractl.tracking.timeline import TimelineFiles

BOOTED_S = 30_000.0  # what a clock says that counts from the start of the machine
RECORDS = [
    (0, Record(0, "F", 0, BOOTED_S + 0.1, BOOTED_S + 0.2)),
    (0, Record(1, "FB", 0, BOOTED_S + 0.3, BOOTED_S + 0.5, "forward")),
    (0, Record(0, "B", 0, BOOTED_S + 0.6, BOOTED_S + 0.7, "backward")),
]


def files(folder: Path, warnings: list[str], *, num_stages: int = 2, num_places: int = 2) -> TimelineFiles:
    return TimelineFiles(
        folder,
        chart=folder / "plots" / "timeline.png",
        name="tiny",
        num_stages=num_stages,
        num_places=num_places,
        warn=warnings.append,
    )


def events(folder: Path, epoch: int = 1) -> list[dict]:
    text = (folder / "traces" / f"epoch-{epoch:04d}.json").read_text()
    return [event for event in json.loads(text)["traceEvents"] if event["ph"] == "X"]


def test_times_count_from_the_first_operation_waits_included(tmp_path) -> None:
    warnings: list[str] = []
    files(tmp_path, warnings).write(1, RECORDS)
    assert min(event["ts"] for event in events(tmp_path)) == 0
    assert max(event["ts"] + event["dur"] for event in events(tmp_path)) < 0.61e6
    assert {event["name"] for event in events(tmp_path)} == {"F 0", "FB 0", "B 0", "wait"}
    assert warnings == []


def test_the_chart_is_drawn_after_the_first_epoch_and_at_the_end(tmp_path) -> None:
    timeline = files(tmp_path, [])
    chart = tmp_path / "plots" / "timeline.png"
    timeline.write(1, RECORDS)
    first = chart.read_bytes()
    timeline.write(2, RECORDS[:2])
    assert chart.read_bytes() == first
    timeline.draw()
    assert chart.read_bytes() != first
    assert len(events(tmp_path, 2)) < len(events(tmp_path, 1))


def test_where_processes_hold_several_stages_the_rows_are_processes(tmp_path) -> None:
    records = [(0, Record(stage, "F", 0, stage + 0.0, stage + 0.5)) for stage in range(4)]
    files(tmp_path, [], num_stages=4, num_places=2).write(1, records)
    assert [(e["tid"], e["args"]["stage"]) for e in events(tmp_path)] == [(0, 0), (1, 1), (0, 2), (1, 3)]


def test_in_one_process_every_stage_has_its_row(tmp_path) -> None:
    files(tmp_path, [], num_stages=2, num_places=1).write(1, RECORDS)
    assert {event["tid"] for event in events(tmp_path)} == {0, 1}


def test_nothing_recorded_writes_nothing(tmp_path) -> None:
    timeline = files(tmp_path, [])
    timeline.write(1, [])
    timeline.draw()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_one_warning(tmp_path) -> None:
    warnings: list[str] = []
    (tmp_path / "traces").write_text("a file where the folder should be")
    timeline = files(tmp_path, warnings)
    timeline.write(1, RECORDS)
    timeline.write(2, RECORDS)
    (message,) = warnings
    assert message.startswith("the timeline could not be written: FileExistsError")
    assert (tmp_path / "plots" / "timeline.png").is_file()
