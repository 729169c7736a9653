"""Exact pipelines give what the in-process engine gives, whatever the schedule (real processes)."""

import time
from dataclasses import replace

import pytest
import torch
from exact_cases import CASES, REFUSED, REPLICATED, SIZE, Case, launch, load, pipeline_of, reference
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from petractl.engine.exact_rules import (
    EXACT_SCHEDULES,
    exact_schedule_problem,
    flushes,
    runs_as_one,
    stages_per_process,
)
from petractl.engine.exact_stage import Stopwatch, as_output
from petractl.recipe.schema import EXACT_SCHEDULE_NAMES, STAGES_PER_PROCESS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("exact")
    launch(found, list(CASES))
    return found


class TestEqualsTheInProcessEngine:
    @pytest.mark.parametrize("name", CASES)
    def test_weights_statistics_counters_and_loss(self, folder, name):
        case = CASES[name]
        places = load(folder, name)
        assert len(places) == case.places
        expected = reference(case)
        found = {key: value for place in places for key, value in place["tensors"].items()}
        assert found.keys() == expected["tensors"].keys()
        tolerance = 1e-6 if case.options else 1e-12
        for key, value in expected["tensors"].items():
            assert torch.allclose(found[key], value, rtol=tolerance, atol=tolerance), key
        counters = {j: c for place in places for j, c in place["counters"].items()}
        if not case.extra_rows:
            assert counters == expected["counters"]
        assert places[-1]["samples"] == expected["samples"]
        assert places[-1]["means"] == pytest.approx(expected["means"], rel=tolerance)

    def test_every_microbatch_is_told_of_once_in_every_process(self, folder):
        """A process that is told to stop looks for that after each microbatch."""
        for name, case in CASES.items():
            *others, last = load(folder, name)
            expected = [i for count in case.epochs for i in range(count)]
            assert last["done"] == expected, name
            assert [sorted(place["done"]) for place in others] == [sorted(expected)] * len(others), name


class TestRows:
    def test_updates_follow_the_replica_with_the_most_microbatches(self, folder):
        # 6 microbatches of k = 4, the last of 2 samples; 10 rows: the third update holds nothing
        for place in load(folder, "extra rows"):
            assert place["reduced"] == [4 * SIZE, SIZE + 2, 0]
            (counters,) = place["counters"].values()
            assert (counters.forwards, counters.backwards) == (6, 6)
            assert (counters.updates, counters.partial_groups) == (3, 2)

    def test_a_missing_microbatch_makes_no_update_of_its_own(self, folder):
        for place in load(folder, "rows in the same group"):
            assert place["reduced"] == [4 * SIZE, 2 * SIZE + 2]


class TestReplicas:
    def test_two_replicas_are_one_run_with_twice_the_microbatches_per_update(self, folder):
        expected = reference(replace(REPLICATED, k=2 * REPLICATED.k))["tensors"]
        ranks = [torch.load(folder / f"replicated-{rank}", weights_only=False) for rank in range(4)]
        for key, value in expected.items():
            place = int(int(key.split(".")[0]) >= 2)
            first, second = ranks[place]["tensors"][key], ranks[2 + place]["tensors"][key]
            assert torch.equal(first, second)
            assert torch.allclose(first, value, rtol=1e-12, atol=1e-12), key
        assert [r["counters"].backwards for r in ranks] == [6, 6, 5, 5]
        assert [r["counters"].updates for r in ranks] == [3] * 4


class TestMeasures:
    def test_bytes_are_those_of_activations_and_gradients(self, folder):
        # two streams (n, 4) of float64 in each direction: 11 + 6 microbatches, two of them of 2 samples
        bytes_each_way = 2 * 4 * 8 * (15 * SIZE + 2 * 2)
        first, second = load(folder, "gpipe on 2")
        assert first["bytes"] == {0: (bytes_each_way, 0)}
        assert second["bytes"] == {1: (0, bytes_each_way)}

    def test_a_handover_within_a_process_sends_nothing(self, folder):
        (alone,) = load(folder, "interleaved on 1")
        assert alone["bytes"] == {0: (0, 0), 1: (0, 0)}

    def test_time_is_parted_into_computing_and_waiting(self, folder):
        for place in load(folder, "1f1b on 4"):
            computed, waited = place["seconds"]
            assert computed > 0
            assert waited > 0

    def test_a_stopwatch_starts_again_when_it_is_read(self):
        watch = Stopwatch(CPU)
        with watch.running():
            time.sleep(0.02)
        assert 0.02 <= watch.read() < 1
        assert watch.read() == 0


class TestFailures:
    """In every case the process that failed says why at once, and its neighbours say that it is gone."""

    @pytest.mark.parametrize("name", ["1f1b on 3", "zero-bubble on 4", "interleaved on 2"])
    @pytest.mark.parametrize(
        ("how", "error", "text"),
        [
            ("forward", "ValueError", "the unit is broken"),
            ("backward", "ValueError", "the backward is broken"),
            ("in place", "UserError", "changes its input in place"),
        ],
    )
    def test_a_unit(self, name, how, error, text, tmp_path):
        places = self.fail(name, how, tmp_path)
        assert places[1]["type"] == error
        assert text in places[1]["text"]
        self.lost_their_pipeline([place for n, place in enumerate(places) if n != 1])

    def test_a_process_that_is_killed(self, tmp_path):
        self.lost_their_pipeline(self.fail("1f1b on 3", "killed", tmp_path))

    def test_data_that_do_not_come(self, tmp_path):
        first, second = self.fail("gpipe on 2", "silent", tmp_path)
        assert first["type"] == "RunError"
        assert second["type"] == "Stalled"
        assert second["seconds"] < 3

    def test_a_stage_that_zero_bubble_would_give_no_gradient(self, tmp_path):
        first, second = self.fail("only an index, zero-bubble", "no", tmp_path)
        assert second["type"] == "UserError"
        assert second["text"].startswith("stage 1: no stream that enters it has a gradient")
        self.lost_their_pipeline([first])

    def test_data_that_end(self, tmp_path):
        first, *others = self.fail("gpipe on 2", "data", tmp_path)
        assert first["type"] == "RunError"
        assert first["text"].startswith("stage 0: the data ended after 5 microbatches")
        self.lost_their_pipeline(others)

    def fail(self, name, how, tmp_path):
        world = (CASES | REFUSED)[name].places
        launch(tmp_path, [name], world=world, how=how)
        places = load(tmp_path, name)
        assert len(places) == world - (how == "killed")
        assert all(place["seconds"] < 15 for place in places)
        return places

    def lost_their_pipeline(self, places):
        assert [place["type"] for place in places] == ["PeerLost"] * len(places), places
        assert all("lost the connection to its pipeline" in place["text"] for place in places)


class FakeGroup:
    """What torch's constructors ask of a process group."""

    def __init__(self, size: int) -> None:
        self.size = size

    def stages(self, monkeypatch, *, per_process: int) -> list[PipelineStage]:
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 0)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: self.size)
        monkeypatch.setattr("torch.distributed.pipelining.stage._warn_if_eager_nccl", lambda group: None)
        total = self.size * per_process
        return [PipelineStage(torch.nn.Identity(), p * self.size, total, CPU) for p in range(per_process)]


def refuses(schedule: str, *, places: int, count: int, monkeypatch) -> bool:
    stages = FakeGroup(places).stages(monkeypatch, per_process=stages_per_process(schedule))
    try:
        if schedule == "gpipe":
            ScheduleGPipe(stages[0], count)
        elif schedule == "1f1b":
            Schedule1F1B(stages[0], count)
        elif schedule == "interleaved-1f1b":
            ScheduleInterleaved1F1B(stages, count)
        else:
            ScheduleInterleavedZeroBubble(stages, count)
    except ValueError:
        return True
    return False


class TestRules:
    @pytest.mark.parametrize("schedule", EXACT_SCHEDULES)
    def test_they_are_those_of_torch(self, schedule, monkeypatch):
        for places in range(1, 5):
            for count in range(1, 14):
                refused = refuses(schedule, places=places, count=count, monkeypatch=monkeypatch)
                problem = exact_schedule_problem(
                    schedule,
                    num_stages=places * stages_per_process(schedule),
                    num_places=places,
                    accumulation=count,
                )
                assert bool(problem) == refused, (places, count)

    def test_interleaving_gives_a_process_two_stages(self):
        assert [stages_per_process(s) for s in EXACT_SCHEDULES] == [1, 1, 2, 1]

    def test_the_recipe_knows_the_same_ones(self):
        assert EXACT_SCHEDULE_NAMES == EXACT_SCHEDULES
        assert {s: STAGES_PER_PROCESS.get(s, 1) for s in EXACT_SCHEDULES} == {
            s: stages_per_process(s) for s in EXACT_SCHEDULES
        }

    @pytest.mark.parametrize("schedule", EXACT_SCHEDULES)
    def test_flushes_hold_every_microbatch_and_can_run(self, schedule):
        for places in range(1, 9):
            for count in range(1, 60):
                found = flushes(schedule, num_places=places, count=count)
                assert sum(n for _, n in found) == count
                assert all(n > 0 and runs_as_one(name, num_places=places, count=n) for name, n in found)
                assert len(found) <= 2

    def test_too_few_microbatches_for_1f1b(self):
        assert exact_schedule_problem("1f1b", num_stages=4, num_places=4, accumulation=2) == (
            '"1f1b" needs at least as many microbatches per update as stages, but '
            "accumulation(2) < stages(4): set method.accumulation = 4 or more, partition.stages = 2 or "
            'fewer, or engine.schedule = "gpipe"'
        )

    @pytest.mark.parametrize("schedule", ["interleaved-1f1b", "zero-bubble"])
    @pytest.mark.parametrize(("places", "count"), [(2, 5), (3, 11), (4, 9), (2, 1001)])
    def test_unequal_rounds(self, schedule, places, count):
        stages = places * stages_per_process(schedule)
        text = exact_schedule_problem(schedule, num_stages=stages, num_places=places, accumulation=count)
        assert f"accumulation({count}) over {places} processes" in text
        below, above = (
            int(word.strip(","))
            for word in text.split("method.accumulation = ")[1].split()[:3]
            if word != "or"
        )
        assert below < count < above
        for k in (below, above):
            assert not exact_schedule_problem(schedule, num_stages=stages, num_places=places, accumulation=k)

    def test_a_wrong_number_of_stages(self):
        text = exact_schedule_problem("interleaved-1f1b", num_stages=6, num_places=2, accumulation=4)
        assert "processes(2) x 2 = 4, but the net has 6 stages" in text
        assert text.endswith("set partition.stages = 4 or start 3 processes")
        text = exact_schedule_problem("interleaved-1f1b", num_stages=5, num_places=2, accumulation=4)
        assert text.endswith("set partition.stages = 4")
        text = exact_schedule_problem("gpipe", num_stages=3, num_places=2, accumulation=4)
        assert "stages(3) != processes(2)" in text


class TestOutputs:
    def test_an_output_shares_memory_and_may_be_detached_in_place(self):
        x = torch.randn(3, requires_grad=True)
        y = torch.relu(x)
        out = as_output(y)
        assert out.data_ptr() == y.data_ptr()
        out.detach_()
        y.sum().backward()
        assert torch.equal(x.grad, (x > 0).float())

    def test_it_has_the_derivative_of_what_it_stands_for(self):
        x, anchor = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
        grads = torch.autograd.grad(
            (as_output(2 * x, anchor=anchor) ** 2).sum(), [x, anchor], allow_unused=True
        )
        assert torch.allclose(grads[0], 8 * x)
        assert grads[1] is None

    def test_a_gradient_comes_for_what_has_none_of_its_own_but_not_for_an_index(self):
        assert as_output(torch.ones(2)).requires_grad
        assert not as_output(torch.ones(2, dtype=torch.int64)).requires_grad


def test_a_schedule_that_torch_would_refuse_is_our_own_bug(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_process_group_ranks", lambda group: [0, 1, 2, 3])
    part = type("Part", (), {"index": 0})()
    case = Case("1f1b", 4, (1, 2, 3), k=2)
    monkeypatch.setattr("exact_cases.dist.group", type("G", (), {"WORLD": None}))
    with pytest.raises(AssertionError, match="at least as many microbatches"):
        pipeline_of(case, [part], place=0, group=None)
