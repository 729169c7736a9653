"""What a recorder keeps of an epoch, and what it says was waited for."""

import time

import torch

from petractl.engine.recorder import Recorder
from petractl.engine.schedule import Kind, Operation

CPU = torch.device("cpu")


def test_operations_in_their_order_with_what_was_waited_for() -> None:
    recorder = Recorder(CPU)
    for kind, waited_s in (
        (Kind.FORWARD, 0.5),
        (Kind.BACKWARD, 0.5),
        (Kind.UPDATE, 0.5),
        (Kind.FORWARD, 0.0),
    ):
        with recorder.operation(1, Operation(kind, 3), waited_s=waited_s):
            time.sleep(0.001)
    records = recorder.records()
    assert [(r.stage, r.kind, r.microbatch, r.waited_for) for r in records] == [
        (1, "F", 3, "forward"),
        (1, "B", 3, "backward"),
        (1, "U", 3, "other"),
        (1, "F", 3, ""),
    ]
    assert all(r.end_s - r.start_s >= 0.001 for r in records)
    assert [r.start_s for r in records] == sorted(r.start_s for r in records)


def test_the_first_stage_waits_for_data_not_for_a_message() -> None:
    recorder = Recorder(CPU)
    with recorder.operation(0, Operation(Kind.FORWARD, 0), waited_s=0.5):
        pass
    assert recorder.records()[0].waited_for == "other"


def test_where_nobody_says_how_long_it_waited_the_gap_tells() -> None:
    recorder = Recorder(CPU)
    with recorder.work(1, "F", 0):
        pass
    time.sleep(0.01)
    with recorder.work(1, "B", 0):
        pass
    with recorder.work(1, "W", 0):
        pass
    assert [r.waited_for for r in recorder.records()] == ["", "backward", ""]


def test_only_the_first_microbatches_of_an_epoch_are_kept() -> None:
    recorder = Recorder(CPU, limit=2)
    for i in range(4):
        with recorder.work(0, "F", i):
            pass
    assert [r.microbatch for r in recorder.records()] == [0, 1]
