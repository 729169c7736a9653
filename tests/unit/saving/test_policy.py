"""When a run is saved: by updates, by time, because it is told to stop; the same on all replicas."""

import os

import pytest

from petractl.engine.cut import SAVE, STOP
from petractl.recipe.interval import Interval, parse_interval
from petractl.saving.policy import CutPolicy, StopRequests

ROWS, K = 10, 4


class Board:
    """A store that all share."""

    def __init__(self):
        self.texts = {}
        self.numbers = []

    def tell(self, key, value):
        self.texts[key] = value

    def ask(self, key):
        return self.texts.get(key)

    def agree(self, number):
        """All of an update begin before the first of them asks."""
        self.numbers.append(number)
        return lambda: max(self.numbers)


class Clock:
    """A clock that moves when told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def stops(board, clock, *, signalled=lambda: "", notice=None):
    return StopRequests(signalled=signalled, board=board, notice=notice, clock=clock)


NEVER = Interval()


def policy(interval=NEVER, *, ahead=0, replica=0, replicas=1, board=None, clock=None, **options):
    board, clock = board or Board(), clock or Clock()
    return CutPolicy(
        interval,
        rows=ROWS,
        accumulation=K,
        ahead=ahead,
        replica=replica,
        num_replicas=replicas,
        stops=stops(board, clock, **options),
        board=board,
        clock=clock,
    )


def decisions(p, epoch=0):
    p.begin(epoch)
    return {m: flags for m in range(ROWS) if (flags := p.decide(m))}


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("1 epoch", Interval(epochs=1)),
        ("12 epochs", Interval(epochs=12)),
        ("1 update", Interval(updates=1)),
        ("500 updates", Interval(updates=500)),
        ("90 s", Interval(seconds=90.0)),
        ("10 min", Interval(seconds=600.0)),
        ("2 h", Interval(seconds=7200.0)),
    ],
)
def test_an_interval_is_read(text, interval):
    assert parse_interval(text) == interval


@pytest.mark.parametrize(
    "text", ["", "0 updates", "-1 epoch", "1.5 h", "10 minutes", "epoch", "1  epoch", "5"]
)
def test_what_is_no_interval_is_refused(text):
    with pytest.raises(ValueError, match="must be a whole number and a unit"):
        parse_interval(text)


def test_a_cut_every_so_many_updates_counts_on_over_epochs():
    p = policy(Interval(updates=2))
    assert decisions(p, 0) == {7: SAVE}, "updates close after microbatches 3, 7 and 9"
    assert decisions(p, 1) == {3: SAVE, 9: SAVE}
    assert decisions(p, 2) == {7: SAVE}


def test_epochs_are_no_cuts():
    assert decisions(policy(Interval(epochs=1))) == {}


def test_a_cut_by_time_waits_for_an_update_and_counts_from_the_last():
    clock = Clock()
    p = policy(Interval(seconds=60.0), clock=clock)
    p.begin(0)
    clock.now += 61.0
    assert [p.decide(m) for m in range(4)] == [0, 0, 0, SAVE]
    clock.now += 59.0
    assert [p.decide(m) for m in range(4, 8)] == [0, 0, 0, 0]
    clock.now += 2.0
    assert p.decide(9) == SAVE


def test_a_stop_waits_for_no_update():
    asked = []
    p = policy(signalled=lambda: "SIGTERM" if asked else "")
    assert p.decide(0) == 0
    asked.append(1)
    assert p.decide(1) == SAVE | STOP


def test_a_notice_file_stops(tmp_path):
    clock, notice = Clock(), tmp_path / "notice"
    p = policy(clock=clock, notice=notice)
    assert p.decide(0) == 0
    notice.touch()
    assert p.decide(1) == 0, "files are looked at twice a second at most"
    clock.now += 1.0
    assert p.decide(2) == SAVE | STOP
    assert str(notice) in p._stops.cause


def test_a_notice_that_was_there_before_is_an_old_one_until_it_changes(tmp_path):
    clock, notice = Clock(), tmp_path / "notice"
    notice.touch()
    p = policy(clock=clock, notice=notice)
    assert p.decide(0) == 0
    clock.now += 1.0
    assert p.decide(1) == 0
    os.utime(notice, (1, 1))
    clock.now += 1.0
    assert p.decide(2) == SAVE | STOP


def test_the_cause_is_known_once_the_run_has_stopped():
    """Replicas agree on a stop faster than they look for what another one has told."""
    board = Board()
    one, other = stops(board, Clock()), stops(board, Clock(), signalled=lambda: "SIGTERM")
    assert not one.look()
    other.look()
    assert not one.look()
    assert one.look_again() == "SIGTERM"


def test_a_process_tells_the_others_of_its_signal():
    board, clock = Board(), Clock()
    one = stops(board, clock)
    other = stops(board, clock, signalled=lambda: "SIGTERM")
    assert not one.look()
    assert other.look()
    clock.now += 1.0
    assert one.look()
    assert one.cause == "SIGTERM"
    assert other.is_own
    assert not one.is_own


def lists(replicas_policies, until=ROWS):
    """Run the first stages of replicas side by side, in the order that updates force; return their cuts."""
    found = [{} for _ in replicas_policies]
    for p in replicas_policies:
        p.begin(0)
    for first in range(0, until, K):
        group = range(first, min(first + K, until))
        for p, cuts in zip(replicas_policies, found, strict=True):
            cuts |= {m: flags for m in group if (flags := p.decide(m))}
        replicas_policies[0]._board.numbers.clear()
        for p in replicas_policies:
            p.before_update(group[-1])
        for p in replicas_policies:
            p.after_update(group[-1])
    return found


def test_replicas_cut_at_the_same_rows_by_a_clock_that_only_the_first_has():
    board, clock = Board(), Clock()
    both = [
        policy(Interval(seconds=60.0), replica=r, replicas=2, board=board, clock=clock if r == 0 else Clock())
        for r in range(2)
    ]
    clock.now += 100.0
    first, second = lists(both)
    assert first == second == {4: SAVE}


def test_replicas_stop_together_and_only_once():
    board, clock = Board(), Clock()
    both = [
        policy(replica=r, replicas=2, board=board, clock=clock, signalled=lambda r=r: "" if r else "SIGINT")
        for r in range(2)
    ]
    assert lists(both) == [{4: SAVE | STOP}] * 2


def test_replicas_are_not_cut_in_the_last_group_where_they_may_differ():
    both = [policy(Interval(updates=1), replica=r, replicas=2) for r in range(2)]
    assert [decisions(p) for p in both] == [{3: SAVE, 7: SAVE}] * 2


def test_what_was_due_in_the_last_group_is_due_at_the_end_of_the_epoch():
    """Every second update: 2 (in the first epoch's midst), 4, and 6, which is the second epoch's last."""
    both = [policy(Interval(updates=2), replica=r, replicas=2) for r in range(2)]
    assert [(decisions(p, 0), p.is_due()) for p in both] == [({7: SAVE}, False)] * 2
    assert [(decisions(p, 1), p.is_due()) for p in both] == [({3: SAVE}, True)] * 2
    alone = policy(Interval(updates=2))
    assert (decisions(alone, 1), alone.is_due()) == ({3: SAVE, 9: SAVE}, False)


def test_by_a_clock_an_epoch_is_due_that_had_no_place_for_a_cut():
    clock = Clock()
    p = policy(Interval(seconds=60.0), ahead=ROWS, replicas=2, clock=clock)
    assert (decisions(p), p.is_due()) == ({}, False)
    clock.now += 60.0
    assert (decisions(p), p.is_due(), p.is_due()) == ({}, True, False)


def test_nor_where_something_in_flight_is_of_that_group():
    both = [policy(Interval(updates=1), ahead=1, replica=r, replicas=2) for r in range(2)]
    assert [decisions(p) for p in both] == [{3: SAVE}] * 2
    assert decisions(policy(Interval(updates=1), ahead=1)) == {3: SAVE, 7: SAVE, 9: SAVE}
