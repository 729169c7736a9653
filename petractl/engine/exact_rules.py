"""What the exact pipelines ask of a recipe: stages per process, microbatches per update. No torch.

The schedules are torch's own (`torch.distributed.pipelining`), and so are their limits:

    gpipe               all forwards of a group, then all backwards            one stage per process
    1f1b                one forward, one backward in the steady state          one stage per process
    interleaved-1f1b    the same, each process with stages p and p + P         two stages per process
    zero-bubble         ZB1P: 1F1B whose weight gradients fill the bubbles     one stage per process

An update is one flush of the pipeline over a group of `accumulation` microbatches. A group may be smaller at
the end of an epoch, and its last microbatch of another size; what a schedule does not run as one flush is run
as two, for the same gradient.
"""

EXACT_SCHEDULES = ("gpipe", "1f1b", "interleaved-1f1b", "zero-bubble")
_IN_ROUNDS = ("interleaved-1f1b", "zero-bubble")


def stages_per_process(schedule: str) -> int:
    """Return how many stages each process holds: place p holds stages p, p + P, ..."""
    return 2 if schedule == "interleaved-1f1b" else 1


def exact_schedule_problem(schedule: str, *, num_stages: int, num_places: int, accumulation: int) -> str:
    """Return what torch would refuse, with the remedy; "" where there is nothing."""
    assert schedule in EXACT_SCHEDULES, schedule
    per_process = stages_per_process(schedule)
    if num_stages != num_places * per_process:
        return _wrong_stages(schedule, num_stages=num_stages, num_places=num_places)
    if runs_as_one(schedule, num_places=num_places, count=accumulation):
        return ""
    if schedule == "1f1b":
        return (
            f'"1f1b" needs at least as many microbatches per update as stages, but '
            f"accumulation({accumulation}) < stages({num_stages}): set method.accumulation = {num_stages} or "
            f'more, partition.stages = {accumulation} or fewer, or engine.schedule = "gpipe"'
        )
    fitting = [
        k
        for k in range(accumulation - num_places, accumulation + num_places)
        if k > 0 and runs_as_one(schedule, num_places=num_places, count=k)
    ]
    below = max(k for k in fitting if k < accumulation)
    above = min(k for k in fitting if k > accumulation)
    rounds = accumulation // num_places
    return (
        f'"{schedule}" runs the microbatches of an update in equal rounds, but accumulation({accumulation}) '
        f"over {num_places} processes makes {rounds} rounds and {accumulation} is not a multiple of "
        f'{rounds}: set method.accumulation = {below} or {above}, or engine.schedule = "gpipe"'
    )


def flushes(schedule: str, *, num_places: int, count: int) -> tuple[tuple[str, int], ...]:
    """Return how `count` equal microbatches are run: (schedule, microbatches) of each flush, in order.

    One flush where the schedule allows it; else, for the smaller group at the end of an epoch, as few as can
    be.
    """
    if runs_as_one(schedule, num_places=num_places, count=count):
        return ((schedule, count),)
    if schedule == "1f1b":
        return (("gpipe", count),)
    rest = count % num_places
    return ((schedule, count - rest), (schedule, rest))


def runs_as_one(schedule: str, *, num_places: int, count: int) -> bool:
    """Tell whether torch's schedule takes `count` microbatches in one flush."""
    if schedule == "1f1b":
        return count >= num_places
    if schedule in _IN_ROUNDS:
        return count % max(1, count // num_places) == 0
    return True


def _wrong_stages(schedule: str, *, num_stages: int, num_places: int) -> str:
    per_process = stages_per_process(schedule)
    needed = num_places * per_process
    if per_process == 1:
        return (
            f'"{schedule}" gives every stage a process of its own, but stages({num_stages}) != '
            f"processes({num_places}): set partition.stages = {num_places} or start {num_stages} processes"
        )
    processes = f" or start {num_stages // per_process} processes" if num_stages % per_process == 0 else ""
    return (
        f'"{schedule}" gives every process {per_process} stages: processes({num_places}) x {per_process} = '
        f"{needed}, but the net has {num_stages} stages: set partition.stages = {needed}{processes}"
    )
