"""Medians and spreads of what the processes measured."""

import pytest

from petractl.bench.measuring import Round, Segment
from petractl.bench.summary import Measurement, ProcessSummary, Spread, rate_of, summarise_processes
from petractl.events import PlanMade


def make_plan(**changes: object) -> PlanMade:
    values: dict[str, object] = {
        "stages": (),
        "microbatch_size": 8,
        "accumulation": 2,
        "samples_per_update": 16,
        "steps_per_epoch": 10,
        "updates_per_epoch": 5,
        "epochs": 1,
        "train_samples": 80,
        "val_samples": 8,
        "parameters": 100,
        "schedule": "tight",
        "method": "petra",
        "precision": "float32",
        "device": "cpu",
        "threads": 1,
    }
    return PlanMade(**{**values, **changes})  # type: ignore[arg-type]


def test_a_spread_has_its_median_and_its_ends() -> None:
    assert Spread((3.0, 1.0, 2.0)).as_json() == {
        "median": 2.0,
        "min": 1.0,
        "max": 3.0,
        "all": [3.0, 1.0, 2.0],
    }


def test_the_rate_is_the_sum_over_replicas() -> None:
    assert rate_of([Round(None), Round(100.0), Round(None), Round(90.0)]) == 190.0


def test_processes_have_their_medians() -> None:
    rounds = [
        [Round(None, 10.0, 100.0), Round(5.0, 30.0, 50.0)],
        [Round(None, 20.0, 100.0), Round(6.0, 50.0, 50.0)],
        [Round(None, 60.0, 100.0), Round(7.0, 40.0, 50.0)],
    ]
    assert summarise_processes(rounds, stages=[(0,), (1,)], peak_memory_bytes=[7, 9]) == (
        ProcessSummary(0, (0,), 7, 20.0, 100.0),
        ProcessSummary(1, (1,), 9, 40.0, 50.0),
    )
    alone = summarise_processes([[Round(5.0)]], stages=[(0, 1)], peak_memory_bytes=[7])
    assert alone == (ProcessSummary(0, (0, 1), 7, None, None),)


@pytest.mark.parametrize(
    ("sent", "replicas", "total"),
    [((100.0, 50.0), 1, 150.0), ((100.0, 50.0), 2, 75.0), ((None, None), 1, None)],
)
def test_bytes_on_the_wire_are_per_pipeline(
    sent: tuple[float | None, ...], replicas: int, total: float | None
) -> None:
    measured = Measurement(
        variant="petra",
        plan=make_plan(replicas=replicas),
        segment=Segment(2, 4, 2),
        images_per_s=Spread((1.0,)),
        ratio=Spread((1.0,)),
        processes=tuple(ProcessSummary(rank, (rank,), 7 + rank, None, s) for rank, s in enumerate(sent)),
        has_diverged=False,
    )
    assert measured.bytes_sent == total
    assert measured.idle == ()
    assert measured.peak_memory_bytes == (7, 8)
    written = measured.as_json()
    assert written["bytes_sent_per_microbatch"] == total
    assert [p["peak_memory_bytes"] for p in written["processes"]] == [7, 8]
    assert written["microbatches"] == {"warmup": 2, "timed": 4, "cooldown": 2}
