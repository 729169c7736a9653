"""The schedule is pure, so it is tested exhaustively: every J, M, k and kind of schedule in reach."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from petractl.engine.schedule import (
    Kind,
    Operation,
    Stretch,
    closes_group,
    group_size,
    lookaheads,
    num_updates,
    operations,
    stage_operations,
    updates_seen_by_backward,
    updates_seen_by_forward,
)

STAGES = range(1, 7)
MICROBATCHES = range(13)
ACCUMULATIONS = range(1, 5)
FORWARDS = (Kind.FORWARD, Kind.FORWARD_BACKWARD)
BACKWARDS = (Kind.BACKWARD, Kind.FORWARD_BACKWARD)


def all_lookaheads(num_stages: int) -> list[tuple[int, ...]]:
    """Return W of every kind of schedule, each once."""
    named = [lookaheads(name, num_stages=num_stages) for name in ("tight", "paper", "sequential")]
    slack = [lookaheads("tight", num_stages=num_stages, slack=slack) for slack in (1, 3)]
    uneven = [max(0, 7 - 3 * j) if j < num_stages - 1 else 0 for j in range(num_stages)]
    flat = [2] * (num_stages - 1) + [0]
    lists = [lookaheads(given, num_stages=num_stages) for given in (uneven, flat)]
    return list(dict.fromkeys([*named, *slack, *lists]))


def all_cases() -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Yield (W, M, k)."""
    for num_stages in STAGES:
        yield from itertools.product(all_lookaheads(num_stages), MICROBATCHES, ACCUMULATIONS)


def all_lists() -> Iterator[tuple[int, int, int, int, bool, tuple[Operation, ...]]]:
    """Yield (j, W_j, M, k, whether the stage is the last, its operations)."""
    for W, M, k in all_cases():
        lists = operations(lookahead=W, num_microbatches=M, accumulation=k)
        assert len(lists) == len(W)
        for j, (w, stage) in enumerate(zip(W, lists, strict=True)):
            yield j, w, M, k, j == len(W) - 1, stage


def test_every_microbatch_goes_forward_and_backward_once_on_every_stage():
    for _, _, M, _, last, stage in all_lists():
        kinds = Counter(o.kind for o in stage)
        expected = {Kind.FORWARD_BACKWARD} if last else {Kind.FORWARD, Kind.BACKWARD}
        assert set(kinds) <= expected | {Kind.UPDATE}
        for chosen in (FORWARDS, BACKWARDS):
            assert [o.microbatch for o in stage if o.kind in chosen] == list(range(M))


def test_a_forward_comes_before_its_backward():
    for _, _, M, _, last, stage in all_lists():
        if not last:
            place = {(o.kind, o.microbatch): n for n, o in enumerate(stage)}
            assert all(place[Kind.FORWARD, i] < place[Kind.BACKWARD, i] for i in range(M))


def test_an_update_follows_every_kth_backward_and_the_last():
    for _, _, M, k, _, stage in all_lists():
        wanted = [i for i in range(M) if (i + 1) % k == 0 or i == M - 1]
        assert [o.microbatch for o in stage if o.kind is Kind.UPDATE] == wanted
        assert len(wanted) == num_updates(num_microbatches=M, accumulation=k)
        for before, o in itertools.pairwise(stage):
            if o.kind is Kind.UPDATE:
                assert before.kind in BACKWARDS
                assert before.microbatch == o.microbatch


def test_the_versions_seen_are_those_counted_in_the_list():
    for _, w, _, k, _, stage in all_lists():
        updates = 0
        for o in stage:
            if o.kind in FORWARDS:
                assert updates == updates_seen_by_forward(o.microbatch, lookahead=w, accumulation=k)
            if o.kind in BACKWARDS:
                assert updates == updates_seen_by_backward(o.microbatch, accumulation=k)
            updates += o.kind is Kind.UPDATE


def test_staleness_is_floor_or_ceiling_of_lookahead_over_accumulation():
    for _, w, M, k, _, _ in all_lists():
        for i in range(M):
            behind = updates_seen_by_backward(i, accumulation=k) - updates_seen_by_forward(
                i, lookahead=w, accumulation=k
            )
            assert behind <= -(-w // k)
            if i >= w:
                assert behind >= w // k


def test_a_replica_with_fewer_microbatches_makes_the_updates_of_all():
    """Its own operations are as without replicas; what it lacks of the updates comes after them."""
    for (W, M, k), more in itertools.product(all_cases(), (0, 1, 2, 5)):
        alone = operations(lookahead=W, num_microbatches=M, accumulation=k)
        stages = operations(lookahead=W, num_microbatches=M, accumulation=k, num_rows=M + more)
        wanted = num_updates(num_microbatches=M + more, accumulation=k)
        for own, stage in zip(alone, stages, strict=True):
            assert stage[: len(own)] == own
            added = stage[len(own) :]
            assert {o.kind for o in added} <= {Kind.UPDATE}
            assert sum(o.kind is Kind.UPDATE for o in stage) == wanted
            groups = [o.microbatch // k for o in stage if o.kind is Kind.UPDATE]
            assert groups == list(range(wanted))
            for o in added:
                assert group_size(o.microbatch, num_microbatches=M, accumulation=k) == 0
                assert o.microbatch == min((o.microbatch // k + 1) * k, M + more) - 1


def test_replicas_of_unequal_shares_in_full():
    def text(num_microbatches: int) -> str:
        stage = stage_operations(
            lookahead=1, num_microbatches=num_microbatches, accumulation=2, is_last=False, num_rows=3
        )
        return " ".join(str(o) for o in stage)

    assert text(3) == "F 0 F 1 B 0 F 2 B 1 U 1 B 2 U 2"
    assert text(2) == "F 0 F 1 B 0 B 1 U 1 U 2"
    assert text(0) == "U 1 U 2"


def test_in_flight_are_at_most_one_more_than_the_lookahead():
    for _, w, M, _, last, stage in all_lists():
        held = most = 0
        for o in stage:
            held += (o.kind is Kind.FORWARD) - (o.kind is Kind.BACKWARD)
            most = max(most, held)
        assert held == 0
        assert most == (0 if last else min(w + 1, M))


def test_groups_are_the_same_on_every_stage_and_add_up():
    for M, k in itertools.product(MICROBATCHES, ACCUMULATIONS):
        sizes = [group_size(i, num_microbatches=M, accumulation=k) for i in range(M)]
        assert sum(1.0 / size for size in sizes) == pytest.approx(
            num_updates(num_microbatches=M, accumulation=k)
        )
        for W in all_lookaheads(3):
            groups = {
                tuple(o.microbatch for o in stage if o.kind is Kind.UPDATE)
                for stage in operations(lookahead=W, num_microbatches=M, accumulation=k)
            }
            assert len(groups) == 1


def runs_dry(lists: Sequence[Sequence[Operation]], order: Sequence[int]) -> bool:
    """Execute the lists with sends that never block, stages in `order`; tell whether all end."""
    position = [0] * len(lists)
    up, down = [set() for _ in lists], [set() for _ in lists]
    moved = True
    while moved:
        moved = False
        for j in order:
            while position[j] < len(lists[j]):
                o = lists[j][position[j]]
                if o.kind in FORWARDS and j > 0 and o.microbatch not in up[j]:
                    break
                if o.kind is Kind.BACKWARD and o.microbatch not in down[j]:
                    break
                if o.kind is Kind.FORWARD:
                    up[j + 1].add(o.microbatch)
                if o.kind in BACKWARDS and j > 0:
                    down[j - 1].add(o.microbatch)
                position[j] += 1
                moved = True
    return all(n == len(stage) for n, stage in zip(position, lists, strict=True))


def test_no_valid_schedule_deadlocks():
    for W, M, k in all_cases():
        lists = operations(lookahead=W, num_microbatches=M, accumulation=k)
        assert runs_dry(lists, range(len(W)))
        assert runs_dry(lists, range(len(W) - 1, -1, -1))


def test_valid_is_exactly_what_cannot_deadlock():
    for body in itertools.product(range(4), repeat=3):
        W = (*body, 0)
        lists = operations(lookahead=W, num_microbatches=9, accumulation=2)
        non_increasing = all(a >= b for a, b in itertools.pairwise(W))
        assert runs_dry(lists, range(4)) == non_increasing
        if non_increasing:
            assert lookaheads(W, num_stages=4) == W
        else:
            with pytest.raises(ValueError, match="deadlock"):
                lookaheads(W, num_stages=4)


@pytest.mark.parametrize("num_stages", STAGES)
def test_the_papers_clock_gives_the_papers_lookahead(num_stages):
    """At every tick forward, then backward, then update: F of i at i + j, B of i at i + 2(J-1) - j."""
    J, M = num_stages, 12
    W = lookaheads("paper", num_stages=J)
    for j, w in enumerate(W):
        ticks = [(i + j, 0, Operation(Kind.FORWARD, i)) for i in range(M)]
        ticks += [(i + 2 * (J - 1) - j, 1, Operation(Kind.BACKWARD, i)) for i in range(M)]
        clock = [o for _, _, o in sorted(ticks, key=lambda t: t[:2])]
        ours = stage_operations(lookahead=w, num_microbatches=M, accumulation=1, is_last=False)
        assert [o for o in ours if o.kind is not Kind.UPDATE] == clock


def test_named_schedules():
    assert lookaheads("sequential", num_stages=4) == (0, 0, 0, 0)
    assert lookaheads("tight", num_stages=4) == (3, 2, 1, 0)
    assert lookaheads("paper", num_stages=4) == (6, 4, 2, 0)
    assert lookaheads([5, 5, 1, 0], num_stages=4) == (5, 5, 1, 0)


def test_slack_goes_from_tight_to_paper():
    assert lookaheads("tight", num_stages=4, slack=1) == (4, 3, 2, 0)
    assert lookaheads("tight", num_stages=4, slack=2) == (5, 4, 2, 0)
    for num_stages in STAGES:
        most = lookaheads("tight", num_stages=num_stages, slack=num_stages)
        assert most == lookaheads("paper", num_stages=num_stages)


def test_sequential_does_one_microbatch_at_a_time():
    stage = stage_operations(lookahead=0, num_microbatches=3, accumulation=2, is_last=False)
    assert " ".join(str(o) for o in stage) == "F 0 B 0 F 1 B 1 U 1 F 2 B 2 U 2"


def test_a_short_epoch_in_full():
    lists = operations(lookahead=(2, 0), num_microbatches=4, accumulation=3)
    text = [" ".join(str(o) for o in stage) for stage in lists]
    assert text[0] == "F 0 F 1 F 2 B 0 F 3 B 1 B 2 U 2 B 3 U 3"
    assert text[1] == "FB 0 FB 1 FB 2 U 2 FB 3 U 3"


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("tigth", r'unknown schedule "tigth" \(known: tight, paper, sequential, or a list\)'),
        ([1, 0], r"the list has 2 entries for 3 stages: give one per stage"),
        ([2, 1, 0, 0], r"the list has 4 entries for 3 stages"),
        ([], r"the list has 0 entries"),
        ([2, -1, 0], r"\[2, -1, 0\] has a negative entry"),
        ([1, 2, 0], r"\[1, 2, 0\] must not increase from one stage to the next: it would deadlock"),
        ([3, 2, 1], r"\[3, 2, 1\] must end with 0: the last stage cannot run ahead"),
    ],
)
def test_invalid_schedules(schedule, message):
    with pytest.raises(ValueError, match=message):
        lookaheads(schedule, num_stages=3)


def test_invalid_numbers():
    with pytest.raises(ValueError, match="slack = -1 must be at least 0"):
        lookaheads("tight", num_stages=3, slack=-1)
    for M, k in [(-1, 1), (3, 0)]:
        with pytest.raises(ValueError, match=f"num_microbatches = {M}, accumulation = {k}"):
            list(stage_operations(lookahead=0, num_microbatches=M, accumulation=k, is_last=False))
    with pytest.raises(ValueError, match="num_rows = 2 is less than num_microbatches = 3"):
        operations(lookahead=(0,), num_microbatches=3, accumulation=1, num_rows=2)


@pytest.mark.parametrize("lookahead", [0, 1, 3])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("is_last", [False, True])
def test_the_rest_after_a_cut_is_the_end_of_the_whole_list(lookahead: int, k: int, is_last: bool) -> None:
    options = {
        "lookahead": 0 if is_last else lookahead,
        "num_microbatches": 7,
        "accumulation": k,
        "is_last": is_last,
    }
    whole = list(stage_operations(**options))
    for m in range(7):
        rest = list(stage_operations(**options, stretch=Stretch(after=m)))
        assert rest == whole[len(whole) - len(rest) :]
        done = whole[: len(whole) - len(rest)]
        closes = closes_group(m, num_microbatches=7, accumulation=k)
        assert done[-1].microbatch == m
        assert done[-1].kind is Kind.UPDATE if closes else done[-1].kind is not Kind.FORWARD
        entered = Stretch(after=m).entered(lookahead=options["lookahead"], num_microbatches=7)
        forwards = [op for op in done if op.kind in (Kind.FORWARD, Kind.FORWARD_BACKWARD)]
        assert len(forwards) == entered


@pytest.mark.parametrize("k", [1, 2])
def test_replicas_that_drain_and_go_on_make_the_same_updates(k: int) -> None:
    """Rows 0 ... 8, of which replica 1 lacks the last; what was in flight lies in whole groups."""

    def updates(count: int, stretch: Stretch) -> list[int]:
        operations = stage_operations(
            lookahead=1, num_microbatches=count, accumulation=k, is_last=False, num_rows=9, stretch=stretch
        )
        return [op.microbatch // k for op in operations if op.kind is Kind.UPDATE]

    for m in range(9 - k):
        until = m + 2
        if (until - 1) // k == 8 // k:
            continue
        drained, rest = Stretch(after=m, until=until), Stretch(first=until)
        assert updates(9, drained) == updates(8, drained)
        assert updates(9, rest) == updates(8, rest)
        assert updates(9, drained) + updates(9, rest) == list(range((m + 1) // k, -(-9 // k)))
