"""Peak memory: what tensors hold at once, not what the process has."""

import pytest
import torch
from torch import nn

from petractl.bench.memory import peak_of, watched_memory

MIB = 2**20
CPU = torch.device("cpu")


def megabytes(count: int) -> torch.Tensor:
    return torch.ones(count * MIB, dtype=torch.uint8)


def test_the_peak_is_what_is_held_at_once() -> None:
    before = megabytes(16)
    with watched_memory(CPU) as peak:
        a = megabytes(4)
        b = megabytes(2)
        del b, before
        c = megabytes(3)
        del a, c
        megabytes(1)
    assert 7 * MIB <= peak.bytes < 7.1 * MIB


def test_a_peak_before_the_mark_is_left_out_but_not_what_is_held() -> None:
    with watched_memory(CPU) as peak:
        held = megabytes(4)
        megabytes(20)
        peak.counts_from_here()
        megabytes(1)
        del held
        megabytes(3)
    assert 5 * MIB <= peak.bytes < 5.1 * MIB


def test_a_graph_and_an_optimizers_state_count() -> None:
    with watched_memory(CPU) as peak:
        layer = nn.Linear(1024, 1024, bias=False)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            layer(torch.ones(1, 1024)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert 12 * MIB <= peak.bytes < 13 * MIB


def test_an_error_within_the_block_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), watched_memory(CPU):
        1 / 0  # noqa: B018


def test_nothing_is_written_to_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with watched_memory(CPU):
        megabytes(1)
    assert capfd.readouterr() == ("", "")


def test_events_are_taken_by_time_and_those_of_other_devices_left_out() -> None:
    def event(ts: float, change: int, device: int = 0) -> dict[str, object]:
        return {"name": "[memory]", "ts": ts, "args": {"Bytes": change, "Device Type": device}}

    events = [
        event(3, -5),
        event(1, 5),
        event(2, 7),
        event(4, 4),
        event(2.5, 100, device=1),
        {"name": "aten::add"},
    ]
    assert peak_of(events) == 12
    assert peak_of([]) == 0
