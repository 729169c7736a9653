from dataclasses import replace

import pytest
from tracking_events import make_measured, make_plan, make_process_plan

from petractl.events import (
    EpochTrained,
    Evaluated,
    RunFinished,
    RunStarted,
    SamplesSkipped,
    StageCounted,
    StepsDone,
)
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


def test_plan_facts_spell_out_the_processes():
    facts = dict(report.plan_facts(make_process_plan()))
    assert facts["batch"] == "64 per microbatch x k 2 x replicas 2 = 256 per update"
    assert facts["epoch"] == "23 microbatches per replica = 12 updates"
    assert facts["processes"] == "2 stages x 2 replicas = 4 processes, messages by nccl"
    assert facts["compute"] == "cuda:0, cuda:1, 1 thread per process, float32"
    assert "processes" not in dict(report.plan_facts(make_plan()))
    alone = dict(report.plan_facts(make_process_plan(replicas=1, processes=2)))
    assert alone["processes"] == "2 stages = 2 processes, messages by nccl"
    interleaved = dict(report.plan_facts(make_process_plan(stages=4, replicas=2, processes=4)))
    assert interleaved["processes"].startswith("4 stages / 2 per process x 2 replicas = 4 processes")


def test_the_device_of_a_stage_is_shown_where_there_are_several_processes():
    header, rows = report.stage_table(make_process_plan())
    assert header[-1] == "device"
    assert [row[-1] for row in rows] == ["cuda:0", "cuda:1"]
    assert [row[-1] for row in report.narrow(header, rows)[1]] == ["cuda:0", "cuda:1"]
    assert report.stage_table(replace(make_process_plan(), processes=1))[0][-1] != "device"


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


@pytest.mark.parametrize(
    ("idle", "text"),
    [((3.2, 12.0), "idle 3 to 12 %"), ((3.2, 2.9), "idle 3 %"), ((7.0, None), "idle 7 %"), ((None,), "")],
)
def test_epoch_line_has_the_range_of_idle_stages(idle, text):
    measured = [replace(make_measured(3, j), idle_percent=percent) for j, percent in enumerate(idle)]
    line = report.epoch_line(EpochTrained(3, 0.4, 88.0, 9, 53.0, 0.3, 0.05, 36), 20, (), measured)
    assert line.endswith(f"53 images/s  {text}  lr 0.05" if text else "53 images/s  lr 0.05")


def test_waiting_for_data_is_told_where_it_is_known():
    trained = EpochTrained(3, 0.4, 88.0, 9, 53.0, 0.3, 0.05, 36, data_wait_percent=12.4)
    assert report.epoch_line(trained, 20).endswith("53 images/s  data wait 12 %  lr 0.05")
    steps = StepsDone(1, 120, 1230, 2.3, 10.0, 3.21, 0.1, 60, data_wait_percent=0.2)
    assert report.progress_line(steps, 3, 65.0).endswith("3.21 images/s  data wait 0 %  1 min 05 s left")
    assert "wait" not in "".join(report.progress_fields(steps, 65.0, narrow=True))


def test_samples_that_were_left_out_are_named():
    lines = report.skipped_lines(SamplesSkipped(3, 12, ("a.tar: 1: broken", "a.tar: 7: no label")))
    assert lines == ["epoch 3: 12 bad samples left out", "  a.tar: 1: broken", "  a.tar: 7: no label"]


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


def test_counts_add_up_over_replicas():
    counts = report.Counts()
    for epoch in (1, 2):
        for replica, microbatches in enumerate((12, 11)):
            for stage in range(3):
                counts.add(StageCounted(epoch, stage, *[microbatches] * 3, 6, replica, replica))
    assert counts.proof() == (
        "46 microbatches in = forwards = backwards on each of 3 stages of 2 replicas (24 + 22); "
        "12 updates, 2 of them from a partial group"
    )
    counts.add(StageCounted(3, 1, 12, 11, 12, 6, 0, 1))
    assert counts.proof().startswith("NOT EQUAL: stage 0 of replica 1: ")


def test_counts_name_the_replica_that_is_not_equal():
    counts = report.Counts()
    for replica in (0, 1):
        for stage in (0, 1):
            wrong = replica == 1 and stage == 0
            counts.add(StageCounted(1, stage, 5, 5, 4 if wrong else 5, 5, 0, replica))
    assert counts.proof() == "NOT EQUAL: stage 0 of replica 1: 5 in, 5 forwards, 4 backwards"


def test_measures_tell_the_least_and_the_most_idle_stage():
    measures = report.Measures()
    assert measures.summary() == ""
    for epoch, idle in ((1, (2.0, 8.0)), (2, (4.0, 10.0))):
        for stage, percent in enumerate(idle):
            measures.add(make_measured(epoch, stage, idle=percent))
    measures.add(make_measured(3, 1, idle=21.0, seconds=8.0))
    assert measures.summary() == "idle 3.0 % (stage 0) to 17.0 % (stage 1); 7.5 MiB sent between stages"


def test_measures_name_the_replica_where_there_are_several():
    measures = report.Measures()
    for replica in (0, 1):
        for stage in (0, 1):
            measures.add(make_measured(1, stage, idle=1.0 + stage + 2 * replica, replica=replica))
    assert measures.summary().startswith("idle 1.0 % (stage 0 of replica 0) to 4.0 % (stage 1 of replica 1)")


def test_what_was_not_measured_is_not_told():
    measures = report.Measures()
    unknown = replace(make_measured(1, 0), idle_percent=None, bytes_sent_forward=None)
    measures.add(replace(unknown, bytes_sent_backward=None))
    assert measures.summary() == ""
    measures.add(unknown)
    assert measures.summary() == "512.0 KiB sent between stages"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**31, "2.0 GiB"), (2**51, "2,048.0 TiB")],
)
def test_size(num_bytes, text):
    assert report.size(num_bytes) == text


def test_results_leave_out_what_was_not_measured():
    finished = RunFinished(3, 12.3, None, None, None, None, None, 5321.4)
    assert report.results(finished, None, None) == [("time", "12.3 s, 5,321 images/s in training")]


def test_title_says_when_a_run_is_resumed():
    started = RunStarted("runs/one", "r", "petra", "revnet18", "digits", 5)
    assert report.title_line(started) == "r: revnet18 on digits by petra, resumed after epoch 5"
