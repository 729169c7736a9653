"""What is said when memory is not enough: who needs what, and what would fit."""

import re

import pytest

from petractl import build
from petractl.build.advice import in_words, memory_advice
from petractl.engine.memory_left import MemoryLeft
from petractl.recipe.load import load_recipe

GIB = 2**30


def plan(*overrides: str) -> build.CheckedPlan:
    common = ["engine.device=cpu", "data.batch_size=512", "model.width=4"]
    return build.check(load_recipe("digits_revnet18", overrides=[*common, *overrides]))


def needed(what: str) -> float:
    """Return the MiB that the fullest stage needs."""
    return float(re.search(r"needs? ([\d,]+) MiB", what)[1].replace(",", ""))


def test_one_process_is_told_the_fullest_stage_and_what_fits() -> None:
    checked = plan("engine.mode=in-process", "partition.stages=3")
    left = MemoryLeft(int(needed(memory_advice(checked, stage=None, left=None)[0]) * 2**20), shared=True)
    what, hint = memory_advice(checked, stage=None, left=left)
    assert re.match(
        r"by the memory model stage \d \(units \d to \d\) needs \d+ MiB, the most, and all stages \d+ MiB "
        r"with data.batch_size = 512, and there are \d+ MiB$",
        what,
    )
    found = re.match(r"data.batch_size = (\d+) fits, with method.accumulation = (\d+)", hint)
    batch, k = map(int, found.groups())
    assert 0 < batch < 512
    assert batch * k >= 512
    assert "stages" not in hint, "in one process, stages share the memory"
    # What is advised is enough.
    again = plan(
        "engine.mode=in-process",
        "partition.stages=3",
        f"data.batch_size={batch}",
        f"method.accumulation={k}",
    )
    _, hint = memory_advice(again, stage=None, left=left)
    assert "something else takes memory" in hint


def test_a_process_is_told_its_own_stage() -> None:
    checked = plan("engine.mode=processes", "partition.stages=2")
    everything, _ = memory_advice(checked, stage=1, left=None)
    assert "stage 1 (units" in everything
    most = needed(everything)
    what, hint = memory_advice(checked, stage=1, left=MemoryLeft(int(most * 2**20 * 0.6), shared=False))
    assert what.endswith("for it")
    assert "data.batch_size = " in hint


def test_replicas_on_one_machine_share_its_memory() -> None:
    one = plan("engine.mode=processes", "partition.stages=2")
    two = plan("engine.mode=processes", "partition.stages=2", "engine.replicas=2")
    need = needed(memory_advice(one, stage=0, left=None)[0])
    left = MemoryLeft(int(need * 2**20), shared=True)
    batches = [
        int(re.search(r"data.batch_size = (\d+) fits", memory_advice(each, stage=0, left=left)[1])[1])
        for each in (one, two)
    ]
    assert batches[1] < batches[0]


def test_where_nothing_fits_that_is_said() -> None:
    _, hint = memory_advice(plan("engine.mode=in-process"), stage=None, left=MemoryLeft(0, shared=True))
    assert hint.startswith("nothing smaller fits either")


def test_where_it_should_have_fitted_something_else_is_named() -> None:
    _, hint = memory_advice(
        plan("engine.mode=in-process"), stage=None, left=MemoryLeft(64 * GIB, shared=True)
    )
    assert hint.startswith("so something else takes memory")


def test_blocks_have_no_model() -> None:
    checked = plan("engine.mode=in-process", "method.name=local", "partition.stages=2")
    assert memory_advice(checked, stage=None, left=None) == ("", "lower data.batch_size (now 512)")


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved-1f1b", "zero-bubble"])
def test_exact_pipelines_are_told_too(schedule: str) -> None:
    checked = plan(
        f"engine.schedule={schedule}",
        "engine.mode=processes",
        "method.name=backprop",
        "method.accumulation=4",
        "partition.stages=4",
    )
    what, _ = memory_advice(checked, stage=3, left=MemoryLeft(GIB, shared=False))
    assert "stage 3" in what


def test_bytes_are_told_in_a_unit_that_suits() -> None:
    assert in_words(3 * 2**20) == "3 MiB"
    assert in_words(5 * GIB // 2) == "2.5 GiB"
