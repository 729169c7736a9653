"""One thread for every test: the same bits everywhere, and no fight for the machine's cores."""

import os

import pytest
import torch

# For the processes that tests start, and for what sets the threads anew in this one.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
