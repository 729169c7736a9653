import pytest
from tracking_events import make_plan

from petractl.events import EpochTrained, Evaluated, RunFinished, RunStarted, StageCounted, StepsDone
from petractl.tracking import report


def test_plan_facts_hold_the_batch_arithmetic():
    facts = dict(report.plan_facts(make_plan()))
    assert facts["batch"] == "64 per microbatch x k 2 = 128 per update"
    assert facts["epoch"] == "23 microbatches = 12 updates"
    assert facts["run"] == "3 epochs = 36 updates"
    assert facts["model"] == "3,000 parameters, 17.7 MFLOPs per image (forward)"
    assert facts["method"] == (
        "petra; keeps between forward and backward: inputs of 1 unit (1 stage), nothing (1 stage)"
    )
    assert facts["schedule"] == "tight; 2 stages, gradients up to 0.5 updates late"


def test_stage_table_has_a_row_for_each_stage_in_one_unit():
    header, rows = report.stage_table(make_plan(flops=0.7e9))
    assert header[3] == "GFLOPs per image"
    assert rows == [
        ("0", "stem, block1", "1,000", "0.70", "inputs of 1 unit", "1", "0.5"),
        ("1", "block2", "2,000", "1.40", "nothing", "0", "0"),
    ]
    lines = report.aligned(header, rows)
    assert len({line.index("inputs") for line in lines[1:2]} | {lines[2].index("nothing")}) == 1


def test_epoch_line_off_a_terminal():
    trained = EpochTrained(3, 0.4123, 88.41, 1437, 5321.4, 0.3, 0.05, 36)
    evaluated = Evaluated(3, 0.5, 91.02, 99.0, 360, 0.1)
    assert report.epoch_line(trained, 20, [evaluated]) == (
        "epoch  3/20  loss 0.412  top-1 88.4 %  test top-1 91.0 %  5,321 images/s  lr 0.05"
    )


def test_progress_line_without_and_with_an_estimate():
    steps = StepsDone(1, 120, 1230, 2.3, 10.0, 3.21, 0.1, 60)
    line = "epoch 1/3  120/1,230 microbatches  loss 2.300  top-1 10.0 %  3.21 images/s  "
    assert report.progress_line(steps, 3, None) == line
    assert report.progress_line(steps, 3, 65.0) == line + "1 min 05 s left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.9, "59.9 s"),
        (59.97, "1 min 00 s"),
        (3599.9, "1 h 00 min"),
        (7620, "2 h 07 min"),
        (float("inf"), "?"),
    ],
)
def test_duration(seconds, text):
    assert report.duration(seconds) == text


def test_counts_prove_that_nothing_was_dropped():
    counts = report.Counts()
    assert counts.proof() == ""
    for epoch in range(1, 1001):
        for stage in range(10):
            counts.add(StageCounted(epoch, stage, 23, 23, 23, 12, 1))
    assert counts.proof() == (
        "23,000 microbatches in = forwards = backwards on each of 10 stages; "
        "12,000 updates, 1,000 of them from a partial group"
    )


@pytest.mark.parametrize("numbers", [(22, 23, 23), (23, 22, 23), (23, 23, 22), (22, 22, 22)])
def test_counts_name_the_stage_that_is_not_equal(numbers):
    counts = report.Counts()
    counts.add(StageCounted(1, 0, 23, 23, 23, 12, 0))
    counts.add(StageCounted(1, 1, *numbers, 12, 0))
    assert counts.proof().startswith("NOT EQUAL: stage 1: ")
    assert "stage 0" not in counts.proof()


def test_results_leave_out_what_was_not_measured():
    finished = RunFinished(3, 12.3, None, None, None, None, None, 5321.4)
    assert report.results(finished, None, None) == [("time", "12.3 s, 5,321 images/s in training")]


def test_title_says_when_a_run_is_resumed():
    started = RunStarted("runs/one", "r", "petra", "revnet18", "digits", 5)
    assert report.title_line(started) == "r: revnet18 on digits by petra, resumed after epoch 5"
