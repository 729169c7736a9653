"""Signals stop a run, but not one that has only its end to write."""

import os
import signal
import time

import pytest

from petractl.interrupts import Interrupts, sigterm_obeyed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_interrupts(number: int) -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts().handled():
        os.kill(os.getpid(), number)


def test_sigterm_interrupts_from_the_first_line() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), sigterm_obeyed():
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with sigterm_obeyed():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_while_finishing_the_first_is_answered_and_the_second_obeyed(capsys) -> None:
    with Interrupts().handled() as interrupts:
        interrupts.finishing = True
        os.kill(os.getpid(), signal.SIGINT)
        assert "finishing" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def signals(interrupts: Interrupts, count: int) -> None:
    for _ in range(count):
        os.kill(os.getpid(), signal.SIGTERM)


def test_where_it_is_deferred_the_first_is_noted_and_one_soon_after_is_the_same(capsys) -> None:
    with Interrupts().handled() as interrupts, interrupts.deferred(30.0):
        signals(interrupts, 2)
        assert interrupts.requested
        assert "within 30 s" in capsys.readouterr().err


def test_where_it_is_deferred_a_later_second_one_interrupts(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Interrupts().handled() as interrupts, interrupts.deferred(30.0):
        signals(interrupts, 1)
        now[0] += 2.0
        with pytest.raises(KeyboardInterrupt):
            signals(interrupts, 1)


def test_one_soon_after_an_interruption_does_not_interrupt_what_saves() -> None:
    with Interrupts().handled() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            signals(interrupts, 1)
        with interrupts.limited(30.0):
            signals(interrupts, 1)


def test_the_deadline_interrupts() -> None:
    with Interrupts().handled() as interrupts, interrupts.deferred(0.05):
        signals(interrupts, 1)
        with pytest.raises(KeyboardInterrupt):
            time.sleep(10.0)
        assert interrupts.is_overdue


def test_a_run_that_is_done_within_the_deadline_is_done() -> None:
    with Interrupts().handled() as interrupts, interrupts.deferred(0.05):
        signals(interrupts, 1)
        interrupts.finishing = True
        time.sleep(0.2)
        assert not interrupts.is_overdue


def test_one_that_leaves_with_the_others_is_told_once_for_nothing(monkeypatch) -> None:
    """Who has started the processes tells the rest to stop when the first has gone."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Interrupts().handled() as interrupts, interrupts.deferred(30.0):
        signals(interrupts, 1)
        now[0] += 2.0
        interrupts.leaving = True
        signals(interrupts, 2)
        now[0] += 2.0
        with pytest.raises(KeyboardInterrupt):
            signals(interrupts, 1)


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts().handled():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
