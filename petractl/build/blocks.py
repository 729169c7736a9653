"""What training block by block needs beside the net: auxiliary nets, their weights and their cost."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from petractl.build.parts import memory_format
from petractl.engine.assembly import stage_bounds
from petractl.engine.block_assembly import Auxiliaries, auxiliary_name
from petractl.errors import Problem, UserError
from petractl.estimator import Estimator
from petractl.methods.randomness import derive_seed
from petractl.models.auxiliary import build_auxiliaries
from petractl.models.auxiliary_nets import AuxiliaryNet, reinitialise
from petractl.models.registry import BuiltModel
from petractl.planning.auxiliary_cost import AuxiliaryCost, auxiliary_costs
from petractl.planning.flops import UnitCost
from petractl.recipe.schema import Recipe


def single_block_warnings(recipe: Recipe, *, num_blocks: int) -> list[Problem]:
    """Return what to say of a net that is one block."""
    choice = recipe.method.estimator
    if num_blocks > 1 or (choice is not None and choice.granularity == "net"):
        return []
    what = f"a net of one block has nothing below its loss: {recipe.method.name} is plain backpropagation"
    return [Problem("partition.stages", what, 'set it to "units", or to the number of blocks')]


def costs_of_auxiliaries(
    recipe: Recipe, model: BuiltModel, costs: Sequence[UnitCost], *, cuts: Sequence[int], classes: int
) -> tuple[AuxiliaryCost, ...]:
    """Return what the auxiliary nets cost, made on the current device ("meta"); () where none is used.

    Raises:
        UserError: they cannot be made, or not be made anew.
    """
    choice = recipe.method.estimator
    assert choice is not None
    if not cuts or not _uses_auxiliaries(choice, num_blocks=len(cuts) + 1):
        return ()
    nets = _build(recipe, model.units, costs, cuts=cuts, classes=classes)
    if choice.guess == "ntk":
        for net in nets:
            reinitialise(net)
    if recipe.data.batch_size < _MIN_SAMPLES and any(map(_has_batch_norm, nets)):
        raise UserError(
            f"{recipe.data.batch_size} is too few for the batch norm of the auxiliary nets",
            where="data.batch_size",
            hint=f"give {_MIN_SAMPLES} or more",
        )
    return tuple(auxiliary_costs(nets, costs, cuts=cuts))


def make_auxiliaries(
    recipe: Recipe,
    units: Sequence[nn.Module],
    costs: Sequence[UnitCost],
    *,
    cuts: Sequence[int],
    classes: int,
    device: torch.device,
    wanted: Iterable[int],
) -> list[Auxiliaries]:
    """Build the auxiliary nets, a function of the seed alone, and put those of blocks wanted on a device."""
    choice = recipe.method.estimator
    assert choice is not None
    count = len(cuts) + 1
    found = [Auxiliaries()] * count
    if not _uses_auxiliaries(choice, num_blocks=count):
        return found

    def built(purpose: str) -> list[AuxiliaryNet]:
        torch.manual_seed(derive_seed(recipe.run.seed, purpose))
        return _build(recipe, units, costs, cuts=cuts, classes=classes)

    learning = built("auxiliary")
    guessing = built("guessing") if choice.guessing_auxiliary else []
    for j in wanted:
        if j == count - 1:
            continue
        nets = (
            learning[j] if choice.wants_auxiliary(j, num_blocks=count) else None,
            guessing[j] if guessing else None,
        )
        for net in nets:
            if net is not None:
                net.to(device).to(memory_format=memory_format(recipe))
        found[j] = Auxiliaries(*nets)
    return found


class AuxiliaryPart(nn.Module):
    """The learning auxiliary nets of some blocks, under their names in checkpoints: auxiliary.<unit>...."""

    def __init__(self, auxiliaries: Sequence[Auxiliaries], *, cuts: Sequence[int], num_units: int) -> None:
        super().__init__()
        bounds = stage_bounds(cuts, num_units=num_units)
        self.auxiliary = nn.ModuleDict(
            {
                auxiliary_name(end - 1).partition(".")[2]: nets.learning
                for (_, end), nets in zip(bounds, auxiliaries, strict=True)
                if nets.learning is not None
            }
        )


_MIN_SAMPLES = 2


def _uses_auxiliaries(choice: Estimator, *, num_blocks: int) -> bool:
    learning = any(choice.wants_auxiliary(j, num_blocks=num_blocks) for j in range(num_blocks))
    return learning or (choice.guessing_auxiliary and num_blocks > 1)


def _build(
    recipe: Recipe,
    units: Sequence[nn.Module],
    costs: Sequence[UnitCost],
    *,
    cuts: Sequence[int],
    classes: int,
) -> list[AuxiliaryNet]:
    return build_auxiliaries(
        recipe.auxiliary.name,
        units=units,
        shapes=[cost.output_shapes for cost in costs],
        cuts=cuts,
        classes=classes,
        width=recipe.auxiliary.width,
        arguments=recipe.auxiliary.arguments,
    )


def _has_batch_norm(net: nn.Module) -> bool:
    return any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in net.modules())
