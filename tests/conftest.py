"""One thread for every test: the same bits everywhere, and no fight for the machine's cores."""

import os
import signal

import pytest
import torch

# For the processes that tests start, and for what sets the threads anew in this one.
os.environ["OMP_NUM_THREADS"] = "1"

# A job in the background of a script, or under nohup, starts with signals ignored; so would what tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
