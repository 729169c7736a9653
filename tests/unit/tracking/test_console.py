import io
import itertools
import re
from dataclasses import replace

import pytest
from tracking_events import make_end, make_measured, make_process_plan, make_run

from petractl.events import (
    CheckpointSaved,
    EventBus,
    RunFailed,
    RunInterrupted,
    RunStarted,
    SamplesSkipped,
    StepsDone,
    WarningRaised,
)
from petractl.tracking import report
from petractl.tracking.console import ConsoleListener, RemainingTime


class Terminal(io.StringIO):
    def isatty(self):
        return True


def show(events, *, stderr=None, **settings):
    stderr, stdout = stderr or io.StringIO(), io.StringIO()
    bus = EventBus()
    bus.subscribe(ConsoleListener(stderr=stderr, stdout=stdout, **settings))
    for event in events:
        bus.emit(event)
    bus.close()
    return stderr.getvalue(), stdout.getvalue()


def test_off_a_terminal_there_are_plain_unwrapped_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    run = tmp_path / ("long" * 20)
    err, _ = show([*make_run(run), make_end()])
    lines = err.splitlines()
    assert "\x1b" not in err
    assert "digits_revnet18: revnet18 on digits by petra" in lines
    assert f"run folder {run}" in lines
    assert "batch     64 per microbatch x k 2 = 128 per update" in lines
    header = next(line for line in lines if line.startswith("stage"))
    assert all(
        word in header for word in ("units", "parameters", "MFLOPs per image", "keeps", "W", "staleness")
    )
    epochs = [line for line in lines if re.match(r"epoch \d/3", line)]
    assert epochs[0] == "epoch 1/3  loss 1.000  top-1 81.0 %  test top-1 82.0 %  5,321 images/s  lr 0.05"
    assert len(epochs) == 3


def test_colour_forced_into_a_file_gives_no_live_line(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    err, _ = show([*make_run(tmp_path), make_end()])
    assert "\x1b[2K" not in err
    assert "\r" not in err


def test_an_epoch_without_evaluation_is_told_when_the_next_begins(tmp_path):
    err, _ = show([*make_run(tmp_path, evaluate_every=2), make_end()])
    epochs = [line for line in err.splitlines() if re.match(r"epoch \d/3", line)]
    assert ["test top-1" in line for line in epochs] == [False, True, False]


def test_a_long_epoch_gets_a_line_each_minute(tmp_path):
    now = 0.0

    def steps_every_25_s():
        nonlocal now
        for n in range(1, 13):
            now += 25.0
            yield StepsDone(1, n, 23, 1.0, 50.0, 100.0, 0.1, n)

    start = [*make_run(tmp_path, epochs=1)][:3]
    err, _ = show(itertools.chain(start, steps_every_25_s()), clock=lambda: now)
    told = [line for line in err.splitlines() if "microbatches  loss" in line]
    assert [line.split()[2] for line in told] == ["3/23", "6/23", "9/23", "12/23"]
    assert told[0].endswith("  8 min 20 s left")


def test_the_summary_goes_to_stdout_and_names_everything(run_dir):
    (run_dir / "plots").mkdir()
    (run_dir / "plots" / "curves.png").write_bytes(b"")
    saved = [
        CheckpointSaved(2, f"{run_dir}/checkpoints/best", True, 0.1),
        CheckpointSaved(3, "c/last", False, 0.1),
    ]
    err, out = show(
        [*make_run(run_dir), *saved, make_end()], tracking=lambda: "mlflow ui --backend-store-uri sqlite:///x"
    )
    assert "test top-1" in out
    assert "84.00 % (best 84.00 % in epoch 3)" in out
    assert "69 microbatches in = forwards = backwards on each of 2 stages; 36 updates" in out
    assert f"best checkpoint  {run_dir}/checkpoints/best (epoch 2)" in out
    assert "last checkpoint  c/last (epoch 3)" in out
    assert f"curves           {run_dir}/plots/curves.png" in out
    assert f"journal          {run_dir}/metrics.jsonl" in out
    assert "mlflow ui --backend-store-uri sqlite:///x" in out
    assert f"petractl eval {run_dir}" in out
    assert f"petractl export {run_dir} --out one.safetensors" in out
    assert "petractl eval" not in err
    assert out.isascii()


def processes_run(run_dir):
    """A run of two stages in two replicas."""
    for event in make_run(run_dir):
        if event.name == "plan_made":
            event = make_process_plan()
        elif event.name == "evaluated":
            for replica in (0, 1):
                for stage in (0, 1):
                    yield make_measured(event.epoch, stage, idle=3.0 + 9 * stage + replica, replica=replica)
        elif event.name == "stage_counted":
            yield replace(event, replica=1)
        yield event
    yield make_end()


def test_what_stages_measured_is_in_every_epoch_and_in_the_summary(tmp_path):
    err, out = show(processes_run(tmp_path))
    assert "processes  2 stages x 2 replicas = 4 processes, messages by nccl" in err.splitlines()
    epochs = [line for line in err.splitlines() if re.match(r"epoch \d/3", line)]
    assert ["idle 3 to 13 %" in line for line in epochs] == [True] * 3
    assert "138 microbatches in = forwards = backwards on each of 2 stages of 2 replicas (69 + 69)" in out
    assert "idle 3.0 % (stage 0 of replica 0) to 13.0 % (stage 1 of replica 1); 18.0 MiB sent" in out


def test_measures_of_a_past_epoch_are_not_told_again(tmp_path):
    events = [*make_run(tmp_path)]
    events.insert(2, make_measured(0, 0, idle=50.0))
    assert "idle" not in show([*events, replace(make_end())])[0]


def test_next_commands_are_quoted_for_the_shell(tmp_path):
    _, out = show([*make_run(tmp_path / "my run"), make_end()])
    assert f"petractl eval '{tmp_path}/my run'" in out
    assert "curves" not in out  # none were drawn


def test_a_resumed_run_says_since_when_it_counted(tmp_path):
    _, out = show([*make_run(tmp_path, first=3), make_end()])
    assert "23 microbatches in" in out
    assert "(since epoch 2)" in out


def test_warnings_have_their_hint_on_its_own_line(tmp_path):
    err, _ = show([WarningRaised("milestone [7] lies beyond the end", "remove it"), WarningRaised("alone")])
    assert err == "warning: milestone [7] lies beyond the end\nhint: remove it\nwarning: alone\n"


def test_an_interrupted_run_says_how_to_go_on_and_has_no_summary(tmp_path):
    interrupted = RunInterrupted(3, "petractl resume runs/one", cause="a signal")
    err, out = show([*make_run(tmp_path), interrupted])
    assert err.endswith(
        "interrupted by a signal; it goes on after epoch 2\nhint: continue with: petractl resume runs/one\n"
    )
    assert out == ""


@pytest.mark.parametrize(
    ("epoch", "microbatch", "words"),
    [
        (1, None, "nothing was saved yet"),
        (3, None, "it goes on after epoch 2"),
        (3, 7, "it goes on after microbatch 7 of epoch 3"),
    ],
)
def test_an_interrupted_run_says_where_it_goes_on(epoch, microbatch, words):
    interrupted = RunInterrupted(epoch, "petractl resume runs/one", microbatch=microbatch)
    assert f"interrupted; {words}\n" in show([interrupted])[0]


def test_what_was_left_out_is_told(tmp_path):
    err, _ = show([*make_run(tmp_path), SamplesSkipped(3, 1, ("a.tar: 7: no label",))])
    assert "epoch 3: 1 bad sample left out\n  a.tar: 7: no label\n" in err


def test_what_the_end_waits_for_is_told_after_why_the_run_failed(tmp_path):
    for events, expected in (
        ([RunFailed("ValueError: no\nmore")], "failed: ValueError: no\nwaiting\nleft\n"),
        ([make_end()], "waiting\nleft\n"),
    ):
        stderr = io.StringIO()
        console = ConsoleListener(stderr=stderr, stdout=io.StringIO())
        for event in [*make_run(tmp_path), *events]:
            console.handle(event, {})
        before = len(stderr.getvalue())
        console.tell_waiting("waiting")
        console.tell_waiting("left")
        assert stderr.getvalue()[before:] == expected


def test_a_failed_run_has_no_summary(tmp_path):
    assert show([*make_run(tmp_path), RunFailed("out of memory")])[1] == ""


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def live_run(run_dir):
    for event in make_run(run_dir):
        yield event
        if event.name == "epoch_started":
            yield StepsDone(event.epoch, 11, 23, 0.7, 75.0, 4321.0, 0.1, 6)
    yield make_end()


def test_on_a_terminal_there_is_a_live_line_and_one_kept_line_for_each_epoch(tmp_path, terminal):
    err, out = show(live_run(tmp_path), stderr=terminal)
    assert "11/23 microbatches  loss 0.700  top-1 75.0 %  4,321 images/s" in err
    assert "evaluating" in err
    assert err.count("test top-1") == 3
    assert "\x1b[?25l" in err  # the cursor is hidden,
    assert err.rindex("\x1b[?25h") > err.rindex("\x1b[?25l")  # and shown again at the end
    assert "\x1b" not in out


def test_no_color_is_honoured(tmp_path, terminal, monkeypatch):
    colour = re.compile(r"\x1b\[(?:\d+;)*[39][0-7][;m]")
    coloured, _ = show([WarningRaised("x"), *live_run(tmp_path)], stderr=terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    plain, _ = show([WarningRaised("x"), *live_run(tmp_path)], stderr=Terminal())
    assert colour.search(coloured)
    assert not colour.search(plain)


def test_a_narrow_terminal_gets_no_bar_and_loses_nothing_else(tmp_path, terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    err, _ = show(live_run(tmp_path), stderr=terminal)
    assert "epoch 1/3 11/23  loss 0.700  top-1 75.0 %  4,321 images/s" in err


def test_a_dumb_terminal_gets_plain_lines(tmp_path, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    err, _ = show(live_run(tmp_path), stderr=terminal)
    assert "\x1b[?25l" not in err


def test_a_run_without_a_plan_is_shown_all_the_same(tmp_path):
    events = [event for event in make_run(tmp_path) if event.name != "plan_made"]
    err, out = show([*events, replace(make_end(), peak_memory_bytes=None)])
    assert "epoch 1  loss 1.000" in err
    assert "memory" not in out
    assert isinstance(events[0], RunStarted)


def test_remaining_time_is_the_mean_time_of_a_microbatch_times_those_to_come():
    now = 0.0
    remaining = RemainingTime(clock=lambda: now)
    assert remaining.estimate(5) is None
    remaining.epoch_started(1, epochs=3, steps_per_epoch=10)
    assert remaining.estimate(0) is None
    now = 10.0
    assert remaining.estimate(5) == pytest.approx(50.0)  # 2 s each, 25 to come
    remaining.epoch_trained()
    now = 60.0  # an evaluation took its time
    remaining.epoch_started(2, epochs=3, steps_per_epoch=10)
    assert remaining.estimate(10) == pytest.approx(30.0)


def test_a_narrow_terminal_gets_fewer_columns():
    header = (
        "stage",
        "units",
        "parameters",
        "MFLOPs per image",
        "keeps",
        "W lookahead",
        "staleness in updates",
    )
    rows = [("0", "stem", "352", "0.04", "input", "9", "9")]
    assert report.narrow(header, rows) == (("stage", "units", "keeps", "W"), [("0", "stem", "input", "9")])
