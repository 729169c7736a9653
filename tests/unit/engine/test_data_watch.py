import pytest

from petractl.data.encoded import BadSample
from petractl.engine.data_watch import DataWatch, samples_skipped
from petractl.errors import DataError


class Loader:
    """What a training loader tells."""

    def __init__(self):
        self.wait_s = 3.0
        self.start_s = 1.0
        self.skipped = []
        self.max_skipped = 2
        self.slow_hint = "set data.workers = 4"


def test_the_waiting_is_that_of_the_epoch():
    loader = Loader()
    watch = DataWatch(loader)
    watch.begin()
    loader.wait_s += 0.5
    loader.start_s += 0.125
    assert watch.waited_s() == 0.5
    assert watch.steady_s() == 0.375
    assert watch.wait_percent(2.0) == 25.0


def test_where_no_data_enter_nothing_is_waited_for():
    watch = DataWatch(None)
    watch.begin()
    assert watch.waited_s() == 0.0
    assert watch.steady_s() == 0.0
    assert watch.wait_percent(2.0) is None
    assert watch.newly_skipped() == ()


def test_skipped_samples_are_told_once():
    loader = Loader()
    watch = DataWatch(loader)
    loader.skipped += [BadSample("a.tar", "1", "broken"), BadSample("a.tar", "2", "no label")]
    assert watch.newly_skipped() == ("a.tar: 1: broken", "a.tar: 2: no label")
    assert watch.newly_skipped() == ()
    loader.skipped.append(BadSample("a.tar", "1", "broken"))
    assert watch.newly_skipped() == ("a.tar: 1: broken",)


def test_an_epoch_that_waits_long_warns_once_in_a_run_with_what_to_change():
    watch = DataWatch(Loader())
    assert watch.warning(1, waited_s=1.0, seconds=10.1) is None
    warning = watch.warning(2, waited_s=3.0, seconds=12.0)
    assert warning.message == "25 % of epoch 2 (3.0 s) was spent waiting for data"
    assert warning.hint == "set data.workers = 4"
    assert watch.warning(3, waited_s=3.0, seconds=12.0) is None


def test_a_long_epoch_is_warned_of_before_its_end():
    loader = Loader()
    watch = DataWatch(loader)
    watch.begin()
    loader.wait_s += 20.0
    loader.start_s += 15.0
    assert watch.early_warning(1, seconds=29.0) is None, "too early to tell"
    assert watch.early_warning(1, seconds=60.0) is None, "the workers' start is no share"
    loader.wait_s += 3.0
    warning = watch.early_warning(1, seconds=64.0)
    assert warning.message == "12 % of epoch 1 so far (8.0 s) was spent waiting for data"
    assert watch.warning(1, waited_s=8.0, seconds=70.0) is None, "once in a run"


def test_the_replicas_together_may_leave_out_no_more_than_one_may():
    watch = DataWatch(Loader())
    watch.require_few([("a.tar: 1: broken",), ("b.tar: 7: broken",)])
    watch.require_few([(), ("a.tar: 1: broken",)])
    with pytest.raises(DataError, match="3 different bad samples were met, more than max_skipped = 2"):
        watch.require_few([("a.tar: 2: broken",), ()])


def test_a_share_of_next_to_no_time_is_no_reason_to_warn():
    assert DataWatch(Loader()).warning(1, waited_s=0.5, seconds=1.0) is None


def test_the_event_counts_all_and_names_the_first_ten_different_ones():
    event = samples_skipped(4, [("a", "b", "a"), tuple("cdefghijklm")])
    assert (event.epoch, event.count) == (4, 14)
    assert event.samples == tuple("abcdefghij")
    assert samples_skipped(4, [(), ()]) is None
