"""The cases of oracle 6, and one run of a case: in this process, or as one process of a world.

Run as a script it is one process of a world that runs all cases, each with links of its own.
"""

import itertools
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from petractl import build
from petractl.engine.process_pipeline import ProcessPipeline
from petractl.engine.world import Launch, World, connect, join
from petractl.models.units import Coupling, TwoFunctionCoupling
from petractl.optim import optimizer_state
from petractl.recipe.load import LoadedRecipe, load_recipe

RECIPE = """
[model]
name = "revnet18"
width = 4
[data]
name = "digits"
batch_size = 300
[method]
name = "petra"
[optimizer]
lr = 0.05
clip_norm = 5.0
[engine]
threads = 1
[tracking]
mlflow = false
"""

METHODS = {
    "petra": [],
    "graph": ["method.name=delayed", "method.keep=graph"],
    "inputs+parameters": ["method.name=delayed", "method.keep=inputs+parameters"],
    "inputs": ["method.name=delayed", "method.keep=inputs"],
    "parameters": ["method.name=delayed", "method.keep=parameters"],
    "reversible": ["method.name=reversible"],
    "backprop": ["method.name=backprop"],
}
OTHERS = {
    "paper": ["engine.schedule=paper", "method.accumulation=2"],
    "slack, bfloat16": ["engine.slack=1", "engine.precision=bfloat16"],
    "rounded messages": ["engine.wire_dtype=int8", "engine.wire_dtype_backward=bfloat16"],
    "dropout": ["model.name=oracle_6_cases:dropout_net", "engine.schedule=paper"],
    "adamw, graph": ["method.name=delayed", "method.keep=graph", "optimizer.name=adamw", "optimizer.lr=0.01"],
}
CASES: dict[str, list[str]] = {
    f"{name}, k = {k}": [*overrides, f"method.accumulation={k}"]
    for (name, overrides), k in itertools.product(METHODS.items(), (1, 3))
} | OTHERS

EPOCHS = 2


class Stem(nn.Module):
    """Two streams that are views of one tensor, with gaps: they must arrive as they were."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 2 * width, 3, padding=1)
        self.norm = nn.BatchNorm2d(2 * width)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.norm(self.conv(images)).chunk(2, dim=1)


class Head(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, classes)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return self.linear(torch.cat([x1, x2], dim=1).mean(dim=(2, 3)))


def inner(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.Tanh(), nn.Dropout(0.2)
    )


def dropout_net(*, in_channels: int, width: int, classes: int) -> list[nn.Module]:
    body = [Coupling(inner(width)), TwoFunctionCoupling(inner(width), inner(width)), Coupling(inner(width))]
    return [Stem(in_channels, width), *body, Head(width, classes)]


def load(folder: Path, overrides: list[str]) -> LoadedRecipe:
    path = folder / "oracle_6.toml"
    if not path.exists():
        path.write_text(RECIPE)
    return load_recipe(str(path), overrides=overrides)


def run_case(loaded: LoadedRecipe, *, launch: Launch | None, world: World | None) -> dict[str, Tensor]:
    """Train and evaluate; return everything that lives here by name, and the losses where they are known."""
    built = build.build(build.check(loaded, launch=launch), world=world)
    found: dict[str, Tensor] = {}
    pipeline, length = built.pipeline, built.length
    for epoch in range(EPOCHS):
        pipeline.stages[-1].totals.reset()
        data = built.training_data
        source = None
        if data is not None:
            source = ((built.placement.images(b), b.labels) for b in data.epoch(epoch))
        pipeline.train(
            source, num_microbatches=length.microbatches, num_rows=length.rows, offset=epoch * length.rows
        )
        totals = pipeline.stages[-1].totals
        if totals.loss is not None and totals.correct is not None:
            found[f"epoch {epoch} loss"] = totals.loss.clone()
            found[f"epoch {epoch} correct"] = totals.correct.clone()
        scores = built.evaluate()
        found[f"epoch {epoch} scores"] = torch.tensor(
            [scores.loss, scores.top1, scores.top5], dtype=torch.float64
        )
    found |= {name: tensor.clone().contiguous() for name, tensor in built.network.state_dict().items()}
    names = {id(p): name for name, p in built.network.named_parameters()}
    for stage in pipeline.stages:
        groups = stage.updater.optimizer.param_groups
        named = [(names[id(p)], p) for group in groups for p in group["params"]]
        tensors, _ = optimizer_state(stage.updater.optimizer, named)
        found |= {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    if isinstance(pipeline, ProcessPipeline):
        pipeline.close()
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    launch = Launch.from_environment()
    assert launch is not None
    stages = f"partition.stages={launch.world_size}"
    layout = build.check(load(folder, [stages]), launch=launch).layout
    store = connect(launch)
    device = torch.device("cpu")
    world = join(launch, layout.seat(launch.rank), store=store, device=device, timeout_s=60)
    for number, overrides in enumerate(CASES.values()):
        loaded = load(folder, [*overrides, stages])
        found = run_case(loaded, launch=launch, world=world)
        save_file(found, folder / f"case-{number}-rank-{launch.rank}.safetensors")
    world.close()


if __name__ == "__main__":
    main()
