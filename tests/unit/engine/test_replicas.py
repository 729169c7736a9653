"""Replicas of a stage: the average that they make, when it is made, and that they stay equal to the bit."""

import pytest
import torch
import torch.multiprocessing
from replica_cases import (
    ROWS,
    SAMPLES,
    TRAINING,
    WORLD,
    drive,
    gradient,
    microbatch,
    reducer_parameters,
    run_cases,
    share,
    statistics_of,
)
from small_nets import make_pipeline, make_stages, make_units, microbatches, sgd_updater, tensors
from torch import Tensor, nn
from torch.nn import functional

REPLICAS = (2, 3)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[tuple[str, int], list[dict[str, Tensor]]]:
    """Run all cases in one launch; return, by case and number of replicas, what each replica found."""
    folder = tmp_path_factory.mktemp("replicas")
    torch.multiprocessing.spawn(run_cases, args=(str(folder),), nprocs=WORLD)
    found = [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]
    return {key: [one[key] for one in found if key in one] for key in found[0]}


def assert_same_bits(found: list[dict[str, Tensor]], *, but: tuple[str, ...] = ()) -> None:
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, value in found[0].items():
            if not name.endswith(but or ("no such name",)):
                assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("replicas", REPLICAS)
def test_gradients_are_averaged_over_samples(results, replicas):
    found = results["reduction", replicas]
    samples = SAMPLES[replicas]
    assert_same_bits(found)
    expected = {}
    for round_ in range(3):
        for place, p in enumerate(p for unit in reducer_parameters() for p in unit):
            given = [gradient(round_, r, place, p) if n else None for r, n in enumerate(samples)]
            pairs = [(n, g) for n, g in zip(samples, given, strict=True) if g is not None]
            if pairs:
                expected[f"{round_}.{place}"] = sum(n * g.double() for n, g in pairs) / sum(samples)
    assert found[0].keys() == expected.keys(), "a gradient where no replica has one, or none where one has"
    for name, value in expected.items():
        rtol = 1e-12 if found[0][name].dtype is torch.float64 else 1e-6
        torch.testing.assert_close(found[0][name].double(), value, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("replicas", REPLICAS)
def test_a_parameter_of_two_units_is_reduced_when_it_is_complete(results, replicas):
    expected = torch.full((2,), 11.0 + (replicas - 1) / 2)
    for found in results["shared_parameter", replicas]:
        torch.testing.assert_close(found["p"], expected)


@pytest.mark.parametrize("replicas", REPLICAS)
def test_waiting_for_a_slow_replica_is_counted(results, replicas):
    slow, *others = (float(found["wait_s"]) for found in results["waiting", replicas])
    assert all(0.2 < waited < 10.0 for waited in others)
    assert slow < min(others)


@pytest.mark.parametrize("replicas", REPLICAS)
def test_running_statistics_are_averaged_and_counts_taken_from_the_first(results, replicas):
    found = results["statistics", replicas]
    assert_same_bits(found)
    one = found[0]
    assert torch.equal(one["shared"], one["alias"])
    own = [statistics_of(replica) for replica in range(replicas)]
    for name in ("mean", "shared"):
        torch.testing.assert_close(one[name], torch.stack([o[name] for o in own]).mean(dim=0))
    assert torch.equal(one["half"], torch.full((2,), (replicas - 1) / 2, dtype=torch.float16))
    assert one["count"] == 10
    assert one["flags"].tolist() == [True, True]
    assert torch.equal(one["mask"], torch.tensor([0.1, float("-inf"), 1 / 3])), (
        "equal values stay, to the bit"
    )


def by_hand(method: str, k: int, replicas: int) -> dict[str, Tensor]:
    """Train without an engine: plain autograd on every replica's groups, weighted by their samples."""
    units = make_units()
    updater = sgd_updater(list(nn.Sequential(*units).named_parameters()))
    parameters = [p for unit in units for p in unit.parameters()]
    shares = [share(r, replicas) for r in range(replicas)]
    for _ in range(2):
        for start in range(0, ROWS, k):
            groups = [data[start : start + k] for data in shares]
            total = sum(len(y) for group in groups for _, y in group)
            for p in parameters:
                p.grad = torch.zeros_like(p)
            for group in groups:
                weight = sum(len(y) for _, y in group) / total / max(1, len(group))
                for x, y in group:
                    streams = (x,)
                    for unit in units:
                        out = unit(*streams)
                        streams = out if isinstance(out, tuple) else (out,)
                    (functional.cross_entropy(streams[0], y) * weight).backward()
            updater.step(delay=0, position=0)
    return {name: value for name, value in tensors(units).items() if not is_statistic(name)}


def is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("replicas", REPLICAS)
def test_training_is_that_of_the_average_written_out(results, replicas, k):
    """Shares of unequal sizes, a last row that only one replica has, groups of which some hold nothing."""
    found = results["training", replicas][0]
    for name, value in by_hand("backprop", k, replicas).items():
        torch.testing.assert_close(found[f"backprop.{k}.{name}"], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("replicas", REPLICAS)
def test_replicas_stay_equal_to_the_bit(results, replicas):
    """All but the running statistics, which are each replica's own until they are averaged."""
    assert_same_bits(
        results["training", replicas], but=("running_mean", "running_var", "num_batches_tracked")
    )


@pytest.mark.parametrize(("method", "k"), TRAINING)
@pytest.mark.parametrize("replicas", REPLICAS)
def test_replicas_with_equal_data_are_as_one(results, replicas, method, k):
    units = make_units()
    drive(make_stages(units, method), [microbatch(i) for i in range(5)], method=method, k=k, rows=5)
    for found in results["equal_shares", replicas]:
        for name, value in tensors(units).items():
            torch.testing.assert_close(found[f"{method}.{k}.{name}"], value, rtol=1e-11, atol=1e-11)


def test_a_lost_replica_is_named(results):
    assert all("lost" in found for found in results["lost_peer", WORLD])


def test_a_silent_replica_is_told_from_a_lost_one(results):
    (found,) = results["silent_peer", 2]
    assert "stalled" in found


class Recorder:
    """Stands in for a reducer; `done` tells how many backwards the stage had finished at each call."""

    def __init__(self, stage) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self._stage = stage

    def start(self, unit: int, *, samples: int) -> None:
        assert all(p.grad is not None for p in self._stage.keepers[unit].evaluator.parameters)
        self.calls.append((f"start {unit}", samples, self._stage.counters.backwards))

    def finish(self, *, samples: int) -> None:
        self.calls.append(("finish", samples, self._stage.counters.backwards))


@pytest.mark.parametrize("method", ["petra", "delayed", "backprop"])
def test_each_unit_starts_within_the_groups_last_backward(method):
    """5 microbatches of 5 samples, k = 2: groups of 10, 10 and 5 samples."""
    stages = make_stages(make_units(), method, cuts=[2, 5])
    for stage in stages:
        stage.reducer = Recorder(stage)
    make_pipeline(stages, k=2, schedule="sequential" if method == "backprop" else "tight").train(
        iter(microbatches(5)), num_microbatches=5
    )
    for stage in stages:
        count = len(stage.keepers)
        expected = []
        for samples, done in ((10, 2), (10, 4), (5, 5)):
            expected += [(f"start {n}", samples, done - 1) for n in reversed(range(count))]
            expected.append(("finish", samples, done))
        assert stage.reducer.calls == expected


def test_an_empty_group_gives_no_samples():
    stage = make_stages(make_units(), "petra")[0]
    stage.reducer = Recorder(stage)
    stage.update(partial=True)
    assert stage.reducer.calls == [("finish", 0, 0)]
    assert stage.counters.updates == stage.counters.partial_groups == 1


def test_replicas_draw_in_unit_randomness_by_the_global_microbatch():
    """Row i of replica r is drawn as number (offset + i) x R + r is without replicas."""

    def loss(*, offset: int, replica: int = 0, replicas: int = 1) -> float:
        torch.manual_seed(0)
        units = [nn.Linear(6, 4).double(), nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).double()]
        stages = make_stages(units, "delayed", "inputs", cuts=[1])
        for stage in stages:
            stage.replica, stage.replicas = replica, replicas
        make_pipeline(stages).train(iter(microbatches(1)), num_microbatches=1, offset=offset)
        return float(stages[-1].totals.loss)

    assert loss(offset=2, replica=1, replicas=3) == loss(offset=7)
    assert loss(offset=2, replica=0, replicas=3) == loss(offset=6) != loss(offset=7)
