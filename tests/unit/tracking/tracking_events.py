from dataclasses import replace

from petractl.events import (
    EpochStarted,
    EpochTrained,
    Evaluated,
    PlanMade,
    RunFinished,
    RunStarted,
    StageCounted,
    StageMeasured,
    StagePlan,
)


def make_plan(*, epochs=3, stages=2, flops=5.9e6):
    made = tuple(
        StagePlan(
            j,
            "stem, block1" if j == 0 else f"block{j + 1}",
            2 - min(j, 1),
            1000 * (j + 1),
            flops * (j + 1),
            "inputs of 1 unit" if j == 0 else "nothing",
            stages - 1 - j,
            (stages - 1 - j) / 2,
        )
        for j in range(stages)
    )
    return PlanMade(made, 64, 2, 128, 23, 12, epochs, 1437, 360, 3000, "tight", "petra", "float32", "cpu", 1)


def make_run(run_dir, *, epochs=3, first=1, evaluate_every=1, stages=2):
    """The events of a run, without its end."""
    resumed = first - 1 if first > 1 else None
    yield RunStarted(str(run_dir), "digits_revnet18", "petra", "revnet18", "digits", resumed)
    yield make_plan(epochs=epochs, stages=stages)
    for epoch in range(first, epochs + 1):
        yield EpochStarted(epoch)
        yield EpochTrained(epoch, 1.0 / epoch, 80.0 + epoch, 1437, 5321.4, 0.3, 0.05, 12 * epoch)
        for stage in range(stages):
            yield StageCounted(epoch, stage, 23, 23, 23, 12, 1)
        if epoch % evaluate_every == 0:
            yield Evaluated(epoch, 1.5 / epoch, 81.0 + epoch, 99.0, 360, 0.1)


def make_end(epochs=3):
    return RunFinished(epochs, 12.3, 84.0, 3, 0.5, 84.0, 99.0, 5321.4, 2**30)


def make_measured(epoch, stage, *, idle=10.0, replica=0, stages=2, seconds=2.0):
    """What one stage measured in one epoch."""
    compute, forward, backward = 100.0 - idle, idle / 2, idle / 4
    sent = (2**20, 2**19)
    rank = replica * stages + stage
    return StageMeasured(
        epoch, stage, replica, rank, seconds, compute, forward, backward, idle, *sent, 0.5, 2**20
    )


def make_process_plan(*, stages=2, replicas=2, processes=4):
    """The plan of a run in several processes."""
    plan = make_plan(stages=stages)
    placed = tuple(replace(stage, device=f"cuda:{stage.index}") for stage in plan.stages)
    return replace(
        plan,
        stages=placed,
        replicas=replicas,
        processes=processes,
        backend="nccl",
        device="cuda:0, cuda:1",
        samples_per_update=128 * replicas,
    )
