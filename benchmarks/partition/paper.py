"""The paper's memory table for RevNet-50: by its own formula, and as petractl counts.

The formula is that of the authors' published code (github.com/stephane-rivaud/PETRA, `compute_memory` in
async_torch/models/models_RevNet.py). Per unit j of J, which is a stage:

    model        parameters, batch norm's statistics, and one input: the least that the computation needs
    inputs       2(J-1-j) times its input, the delay of the paper's clock, where inputs are kept; always in a
                 block that changes the shape
    parameters   2(J-1-j) / k, rounded up, times its parameters

The input of a reversible block, and of the head, counts as one stream of the two. GB are 1e9 bytes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from petractl.engine.schedule import lookaheads
from petractl.methods.family import keepings, method_spec
from petractl.models.registry import build_model
from petractl.models.units import as_streams, is_reversible
from petractl.planning.footprint import trace_footprints
from petractl.planning.memory import MemoryModel

BATCH, SIDE = 64, 224
ROWS = (("inputs+parameters", 44.5), ("inputs", 43.6), ("parameters", 21.2), ("", 20.3))
"""What is kept besides what PETRA keeps, and the paper's GB."""


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes of one unit, as the formula has them."""

    parameters: int
    statistics: int
    input: int
    always_kept: bool


def revnet50() -> Sequence[nn.Module]:
    """Return its units, without memory."""
    with torch.device("meta"):
        return build_model("revnet50", classes=1000, stem="imagenet").units


def parts(units: Sequence[nn.Module], *, both_streams: bool = False) -> list[Part]:
    """Return what the formula reads of each unit; with `both_streams` the whole input of every block."""
    streams: tuple[Tensor, ...] = (torch.zeros(BATCH, 3, SIDE, SIDE, device="meta"),)
    result = []
    for n, unit in enumerate(units):
        changes_shape = 0 < n < len(units) - 1 and not is_reversible(unit)
        counted = streams if changes_shape or both_streams else streams[:1]
        statistics = [b for b in unit.buffers() if b.is_floating_point()]
        result.append(
            Part(
                parameters=_bytes(unit.parameters()),
                statistics=_bytes(statistics),
                input=_bytes(counted),
                always_kept=changes_shape,
            )
        )
        streams = as_streams(unit(*streams))
    return result


def by_formula(found: Sequence[Part], keep: str, *, accumulation: int = 1) -> int:
    """Return the bytes of the net with `keep` in its buffers."""
    total = 0
    for j, part in enumerate(found):
        delay = 2 * (len(found) - 1 - j)
        total += part.parameters + part.statistics + part.input
        if part.always_kept or "inputs" in keep:
            total += delay * part.input
        if "parameters" in keep:
            total += -(-delay // accumulation) * part.parameters
    return total


def by_petractl(units: Sequence[nn.Module], keep: str, *, schedule: str) -> int:
    """Return the sum of what the stages hold at their peaks on GPUs, one unit per stage."""
    spec = method_spec("delayed", keep=keep) if keep else method_spec("petra")
    kept = keepings(spec, [is_reversible(unit) for unit in units])
    shape = (3, SIDE, SIDE)
    footprints = trace_footprints(units, kept, input_shape=shape, samples=BATCH, cpu_kernels=False)
    model = MemoryModel(footprints, samples=BATCH, host_buffers=False)
    lookahead = lookaheads(schedule, num_stages=len(units))
    stages = model.stages(range(1, len(units)), lookahead=lookahead)
    return sum(int(stage.total) for stage in stages)


def main() -> None:
    """Write a Markdown table."""
    units = revnet50()
    counts = (parts(units), parts(units, both_streams=True))
    print("| keeps | the paper | its formula | with both streams | petractl's peak, paper | tight |")
    print("|---|---|---|---|---|---|")
    for keep, paper_gb in ROWS:
        sizes = [by_formula(found, keep) for found in counts]
        sizes += [by_petractl(units, keep, schedule=schedule) for schedule in ("paper", "tight")]
        cells = [keep or "neither (PETRA)", f"{paper_gb}", *(f"{size / 1e9:.1f}" for size in sizes)]
        print(f"| {' | '.join(cells)} |")


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


if __name__ == "__main__":
    main()
