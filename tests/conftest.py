"""One thread for every test: the same bits everywhere, and no fight for the machine's cores."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
