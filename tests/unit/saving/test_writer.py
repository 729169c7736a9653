"""Writing beside training: one job at a time, and no error is lost."""

import threading

import pytest

from petractl.saving.writer import BackgroundWriter


def test_jobs_are_done_in_order_and_the_next_waits_for_the_one_before():
    writer, done, gate = BackgroundWriter("test"), [], threading.Event()

    def slow():
        gate.wait(10.0)
        done.append("slow")

    writer.submit(slow)
    assert writer.is_busy
    threading.Timer(0.05, gate.set).start()
    writer.submit(lambda: done.append("fast"))
    writer.wait()
    assert done == ["slow", "fast"]
    assert not writer.is_busy


@pytest.mark.parametrize("call", ["check", "wait", "submit"])
def test_what_a_job_raises_is_raised_once_at_the_next_call(call):
    writer, ended = BackgroundWriter("test"), threading.Event()

    def fails():
        ended.set()
        raise OSError("the disk is full")

    writer.submit(fails)
    ended.wait(10.0)
    while writer.is_busy:
        pass
    with pytest.raises(OSError, match="full"):
        writer.submit(lambda: None) if call == "submit" else getattr(writer, call)()
    writer.submit(lambda: None)
    writer.wait()
