"""What fits: more samples need more memory, and the largest number that has enough is found."""

import pytest
import torch
from torch import nn

from petractl.methods.family import method_spec
from petractl.planning.costing import Clock, cost_net
from petractl.planning.fit import Cut, Room, fewest_stages, fits, largest_batch, stage_bytes
from petractl.planning.net import Net

CUT = Cut(cuts=(2, 4), lookahead=(2, 1, 0), accumulation=2)


@pytest.fixture(scope="module")
def net() -> Net:
    with torch.device("meta"):
        layers = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(6)]
    units = [*layers[:-1], nn.Sequential(layers[-1], nn.Linear(64, 4))]
    return cost_net(
        units,
        [f"layer{n}" for n in range(6)],
        method=method_spec("delayed", keep="graph"),
        input_shape=(64,),
        batch_size=256,
        clock=Clock(),
        compared=False,
    )


def rooms(*sizes: int) -> list[Room]:
    return [Room((stage,), size) for stage, size in enumerate(sizes)]


def test_each_stage_needs_what_the_memory_model_says(net: Net) -> None:
    sizes = stage_bytes(net, CUT)
    model = net.memory(accumulation=2)
    assert sizes == tuple(size.total for size in model.stages((2, 4), lookahead=(2, 1, 0)))
    assert fits(net, CUT, rooms(*sizes))
    assert not fits(net, CUT, rooms(sizes[0] - 1, *sizes[1:]))
    assert fits(net, CUT, [Room((0, 1, 2), sum(sizes))])
    assert not fits(net, CUT, [Room((0, 1, 2), sum(sizes) - 1)])


@pytest.mark.parametrize("samples", [1, 7, 100, 255])
def test_the_largest_batch_is_found(net: Net, samples: int) -> None:
    enough = rooms(*stage_bytes(net.with_batch(samples), CUT))
    found = largest_batch(net, CUT, enough)
    assert found >= samples
    assert fits(net.with_batch(found), CUT, enough)
    assert not fits(net.with_batch(found + 1), CUT, enough)


def test_all_or_nothing_may_fit(net: Net) -> None:
    assert largest_batch(net, CUT, rooms(10**9, 10**9, 10**9)) == 256
    assert largest_batch(net, CUT, rooms(10**9, 10**9, 1000)) == 0


def test_more_stages_need_less_each(net: Net) -> None:
    def most(stages: int) -> int:
        from petractl.engine.schedule import lookaheads
        from petractl.planning.memory import cuts_by_memory

        model, ahead = net.memory(accumulation=1), lookaheads("tight", num_stages=stages)
        cuts = cuts_by_memory(model, ahead)
        return max(size.total for size in model.stages(cuts, lookahead=ahead))

    sizes = {stages: most(stages) for stages in range(1, 7)}
    for limit in (max(sizes.values()), min(sizes.values()), min(sizes.values()) - 1):
        fitting = [stages for stages, size in sizes.items() if size <= limit and stages > 1]
        found = fewest_stages(net, more_than=1, accumulation=1, device_bytes=limit)
        assert found == min(fitting, default=0)
