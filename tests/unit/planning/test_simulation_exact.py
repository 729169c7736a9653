"""The lists of the exact pipelines are torch's own."""

import pytest
from torch.distributed.pipelining import ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble

from petractl.engine.exact_rules import runs_as_one
from petractl.planning.exact_schedules import Step, exact_steps
from petractl.planning.execution import execute
from petractl.planning.times import Link, StageTimes

KINDS = {"F": "F", "B": "B", "I": "B", "W": "W"}


def torchs_list(schedule: str, *, place: int, num_places: int, count: int) -> list[Step]:
    """What torch's schedule makes for a rank, without the processes that its constructor wants."""
    interleaved = schedule == "interleaved-1f1b"
    kind = ScheduleInterleaved1F1B if interleaved else ScheduleInterleavedZeroBubble
    made = object.__new__(kind)
    made.pp_group_size = num_places
    made.n_local_stages = 2 if interleaved else 1
    made._n_microbatches = count
    made.number_of_rounds = max(1, count // num_places)
    made.microbatches_per_round = count // made.number_of_rounds
    actions = made._calculate_single_rank_operations(place)
    return [
        Step(KINDS[action.computation_type.value], action.stage_index, action.microbatch_index)
        for action in actions
        if action is not None
    ]


@pytest.mark.parametrize("schedule", ["interleaved-1f1b", "zero-bubble"])
@pytest.mark.parametrize("num_places", [1, 2, 3, 4, 8])
def test_the_lists_are_torchs(schedule: str, num_places: int) -> None:
    for count in range(1, 4 * num_places + 1):
        if not runs_as_one(schedule, num_places=num_places, count=count):
            continue
        lists = exact_steps(schedule, num_places=num_places, accumulation=count, num_groups=1)
        for place, steps in enumerate(lists):
            own = [step for step in steps if step.kind != "U"]
            assert own == torchs_list(schedule, place=place, num_places=num_places, count=count)


def test_1f1b_and_gpipe_by_hand() -> None:
    def words(schedule: str, place: int) -> str:
        steps = exact_steps(schedule, num_places=3, accumulation=4, num_groups=1)[place]
        return " ".join(f"{step.kind}{step.microbatch}" for step in steps)

    assert words("gpipe", 1) == "F0 F1 F2 F3 B0 B1 B2 B3 U3"
    assert words("1f1b", 0) == "F0 F1 F2 B0 F3 B1 B2 B3 U3"
    assert words("1f1b", 2) == "F0 B0 F1 B1 F2 B2 F3 B3 U3"


def test_what_torch_refuses_runs_as_two_flushes() -> None:
    steps = exact_steps("interleaved-1f1b", num_places=2, accumulation=5, num_groups=2)[0]
    assert [step.microbatch for step in steps if step.kind == "U"] == [4, 4, 9, 9]
    assert sorted(step.microbatch for step in steps if step.kind == "F" and step.stage == 0) == list(
        range(10)
    )


def test_lists_that_wait_for_each_other_are_refused() -> None:
    lists = [[Step("B", 0, 0), Step("F", 0, 0)], [Step("FB", 1, 0)]]
    with pytest.raises(ValueError, match="place 0 waits for ever before B 0"):
        execute(lists, times=[StageTimes(1, 1)] * 2, links=[Link()], on_span=lambda span: None)
