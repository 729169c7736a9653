"""bfloat16 autocast through the whole engine: the streams stay float32, and what is rebuilt is what was."""

import torch
from torch import nn
from torch.nn import functional

from petractl.engine.assembly import assemble_stages
from petractl.engine.messages import Activation
from petractl.engine.update import Updater
from petractl.methods.family import method_spec
from petractl.models.registry import build_model


def test_a_deep_reversible_net_in_bfloat16():
    torch.manual_seed(0)
    units = build_model("revnet-iso", width=8, classes=4, depth=12).units

    def make_updater(named: list[tuple[str, nn.Parameter]]) -> Updater:
        return Updater(torch.optim.SGD([p for _, p in named], lr=0.0), learning_rate=lambda _: 0.0)

    stages = assemble_stages(
        units,
        names=[""] * len(units),
        cuts=[1, 7],
        method=method_spec("petra"),
        make_updater=make_updater,
        loss=functional.cross_entropy,
        seed=0,
        device=torch.device("cpu"),
        autocast_dtype=torch.bfloat16,
    )
    up = [Activation(0, (torch.randn(8, 3, 8, 8),), torch.arange(8) % 4)]
    for stage in stages[:-1]:
        up.append(stage.forward(up[-1]))
    down = [stages[2].forward_backward(up[2], group_size=1)]
    down.append(stages[1].backward(down[-1], group_size=1))
    stages[0].backward(down[-1], group_size=1)
    for forward, back in ((up[2], down[0]), (up[1], down[1])):
        assert back.streams is not None or forward is up[1]
        for s in (*forward.streams, *back.gradients, *(back.streams or ())):
            assert s.dtype is torch.float32
    assert down[1].streams is None, "the stem keeps its own input"
    for rebuilt, given in zip(down[0].streams, up[2].streams, strict=True):
        assert float((rebuilt - given).norm() / given.norm()) < 1e-6
    used_lower_precision = [s for s in up[1].streams if torch.equal(s, s.bfloat16().float())]
    assert used_lower_precision, "the stem ran in bfloat16"
    assert all(p.grad.dtype is torch.float32 for unit in units for p in unit.parameters())
