"""Reading a run to be compared: whole journals, damaged ones, resumed ones, those of other versions."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from tracking_events import make_end, make_measured, make_plan, make_run

from petractl.events import Evaluated, RunFailed, RunInterrupted, as_record
from petractl.tracking.comparison_run import METRICS, is_run_folder, read_run
from petractl.tracking.journal import encode_record

DEFAULTS = {"data.batch_size": 64, "optimizer.lr": 0.1}
RESOLVED = '[model]\nname = "revnet18"\n[data]\nname = "digits"\n[method]\nname = "petra"\n'


def write(run_dir: Path, events, *, start=100.0, step=1.0, resolved=RESOLVED) -> Path:
    """Append events to a journal, `step` seconds apart."""
    lines = [encode_record(as_record(event, time=start + n * step)) for n, event in enumerate(events)]
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write("".join(f"{line}\n" for line in lines))
    (run_dir / "resolved.toml").write_text(resolved)
    return run_dir


def read(run_dir: Path):
    return read_run(run_dir, defaults=DEFAULTS)


def test_a_finished_run(run_dir):
    run = read(write(run_dir, [*make_run(run_dir), make_end()]))
    assert (run.name, run.state, run.failure, run.problems) == ("one", "finished", None, ())
    assert (run.epochs_done, run.epochs) == (3, 3)
    assert (run.best_top1, run.best_epoch, run.last_top1, run.last_top5) == (84.0, 3, 84.0, 99.0)
    assert run.last_loss == 0.5
    assert run.images_per_s == 5321.4
    assert (run.peak_memory_bytes, run.device_kind) == (2**30, "cpu")
    assert run.seconds == 17.0  # of 18 events, one second apart
    assert set(run.curves) == set(METRICS)
    assert run.curves["train_loss"].values == (1.0, 1 / 2, 1 / 3)
    assert run.curves["top1"].epochs == (1, 2, 3)
    assert run.curves["top1"].seconds == (6.0, 11.0, 16.0)
    assert run.curves["data_wait_percent"].values == ()


def test_keys_are_those_of_the_run_with_defaults_in_the_order_of_sections(run_dir):
    run = read(write(run_dir, [], resolved='[data]\nbatch_size = 8\nname = "digits"\nancient = 1\n'))
    assert run.keys == {"data.name": "digits", "data.batch_size": 8, "data.ancient": 1, "optimizer.lr": 0.1}
    assert list(run.keys) == ["data.name", "data.batch_size", "data.ancient", "optimizer.lr"]


def test_the_speed_is_the_median_after_the_first_epoch(run_dir):
    speeds = iter((1.0, 100.0, 300.0, 110.0))
    events = [
        replace(event, images_per_s=next(speeds)) if event.name == "epoch_trained" else event
        for event in make_run(run_dir, epochs=4)
    ]
    assert read(write(run_dir, events)).images_per_s == 110.0


def test_the_speed_of_a_single_epoch_is_its_own(run_dir):
    assert read(write(run_dir, make_run(run_dir, epochs=1))).images_per_s == 5321.4


def test_memory_is_the_most_of_any_stage(run_dir):
    measured = [replace(make_measured(1, stage), peak_memory_bytes=2**stage) for stage in (30, 31, 29)]
    run = read(write(run_dir, [*make_run(run_dir), *measured]))
    assert run.peak_memory_bytes == 2**31
    assert read(write(run_dir, [make_end()])).peak_memory_bytes == 2**31


def test_the_kinds_of_device(run_dir):
    plan = make_plan()
    placed = tuple(
        replace(stage, device=name)
        for stage, name in zip(plan.stages, ("cuda:0, cuda:1", "cpu"), strict=True)
    )
    assert read(write(run_dir, [replace(plan, stages=placed)])).device_kind == "cpu, cuda"
    assert read(write(run_dir, [replace(plan, device="cuda:1")])).device_kind == "cuda"


@pytest.mark.parametrize(
    ("end", "state"),
    [
        ([], "unfinished"),
        ([RunInterrupted(2, "petractl resume x")], "interrupted"),
        ([RunFailed("out of memory")], "failed"),
        ([make_end()], "finished"),
    ],
)
def test_states(run_dir, end, state):
    run = read(write(run_dir, [*make_run(run_dir), *end]))
    assert run.state == state
    assert run.failure == ("out of memory" if state == "failed" else None)
    assert (run.peak_memory_bytes is None) == (state != "finished")


def test_a_resumed_run_counts_its_last_epochs_and_no_pause(run_dir):
    write(run_dir, [*make_run(run_dir, epochs=3), RunFailed("lost")])
    later = [replace(event, loss=9.0) if event.name == "epoch_trained" else event for event in
             make_run(run_dir, epochs=3, first=2)]  # fmt: skip
    run = read(write(run_dir, later[:4], start=5000.0))
    assert (run.state, run.failure, run.epochs_done) == ("unfinished", None, 2)
    assert run.curves["train_loss"].values == (1.0, 9.0)
    assert run.curves["top1"].epochs == (1,), "epochs 2 and 3 will be evaluated again"
    assert run.seconds == 17.0 + 3.0


def test_a_cut_and_a_damaged_journal(run_dir):
    write(run_dir, make_run(run_dir, epochs=1))
    path = run_dir / "metrics.jsonl"
    garbage = [
        b"\xff\xfe\x00",
        b"[1, 2]",
        b"[" * 100_000,
        b'{"event": ["x"]}',
        b'{"event": "epoch_trained", "epoch": "x", "time": {}}',
        b'{"event": "epoch_trained", "epoch": 1' + b"0" * 400 + b"}",
        b'{"event": "plan_made", "stages": 3, "device": null, "epochs": "many"}',
        b'{"event": "evaluated", "epoch": 2, "top1": true, "loss": "Infinity", "time": 1e999}',
        b'{"event": "evaluated", "epo',
    ]
    path.write_bytes(path.read_bytes() + b"\n\n" + b"\n".join(garbage))
    run = read(run_dir)
    assert run.problems == (
        "the last line of its metrics.jsonl is cut short",
        "3 lines of its metrics.jsonl cannot be read, the first is line 10",
    )
    assert (run.epochs_done, run.epochs, run.best_top1) == (1, None, 82.0)
    assert run.last_loss == math.inf


def test_values_that_are_no_numbers_are_no_best(run_dir):
    run = read(write(run_dir, [*make_run(run_dir), Evaluated(4, math.nan, math.nan, math.inf, 360, 0.1)]))
    assert (run.best_top1, run.best_epoch) == (84.0, 3)
    assert math.isnan(run.last_top1)
    assert math.isnan(run.last_loss)


def test_a_run_of_an_older_version(run_dir):
    (run_dir / "metrics.jsonl").write_text(
        "".join(
            f"{json.dumps(record)}\n"
            for record in (
                {"event": "run_started"},
                {"event": "epoch_trained", "epoch": 1, "loss": 2.0},
                {"event": "news_of_a_later_version", "epoch": 7, "top1": 100.0},
                {"event": "evaluated", "epoch": 1, "top1": 50.0},
            )
        )
    )
    run = read(run_dir)
    assert run.keys is None
    assert run.problems == ("has no resolved.toml: its keys are not known",)
    assert (run.state, run.epochs_done, run.epochs, run.best_top1) == ("unfinished", 1, None, 50.0)
    assert (run.last_top5, run.images_per_s, run.peak_memory_bytes, run.seconds) == (None, None, None, None)
    assert run.curves["top1"].seconds == (0.0,)


def test_what_is_missing_or_no_file_is_told(run_dir):
    assert not is_run_folder(run_dir)
    (run_dir / "resolved.toml").write_text("[[[")
    assert is_run_folder(run_dir)
    run = read(run_dir)
    assert run.state == "not started"
    assert run.problems == (
        "its resolved.toml is damaged: its keys are not known",
        "has no metrics.jsonl: nothing is known of what it did",
    )
    (run_dir / "metrics.jsonl").mkdir()
    assert read(run_dir).problems[1] == "its metrics.jsonl cannot be read (Is a directory)"
