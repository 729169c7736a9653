"""Signals stop a run, but not one that has only its end to write."""

import os
import signal

import pytest

from petractl.interrupts import Interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_interrupts(number: int) -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts().handled():
        os.kill(os.getpid(), number)


def test_while_finishing_the_first_is_answered_and_the_second_obeyed(capsys) -> None:
    with Interrupts().handled() as interrupts:
        interrupts.finishing = True
        os.kill(os.getpid(), signal.SIGINT)
        assert "finishing" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts().handled():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
