from petractl.events import (
    EpochStarted,
    EpochTrained,
    Evaluated,
    PlanMade,
    RunFinished,
    RunStarted,
    StageCounted,
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
