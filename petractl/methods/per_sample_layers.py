"""The layers of a block that own its parameters, and what each is called with.

A parameter belongs to the layer that holds it. A layer that holds parameters itself and has other such layers
inside (attention with its projections, a unit with a scale of its own) counts as one, for what is done with
the parts is known to its `forward` alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from petractl.errors import UserError
from petractl.methods.per_sample_generic import Call, GenericRule, Rule
from petractl.methods.per_sample_rules import fits, rule_of


@dataclass(frozen=True, slots=True)
class Owner:
    """A layer that owns parameters: its rule, and the place in the block of each parameter in it."""

    name: str
    module: nn.Module
    rule: Rule
    positions: Mapping[str, int]

    def __str__(self) -> str:
        return f"layer {self.name} ({type(self.module).__name__})"


def trained_parameters(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return the parameters that require gradients, module after module, named `<module>.<name>`."""
    return {
        f"{n}.{name}": p
        for n, module in enumerate(modules)
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def find_owners(modules: Sequence[nn.Module]) -> list[Owner]:
    """Return the layers that own parameters; one inside another that owns some itself counts as its part."""
    owners: dict[int, Owner] = {}
    offset = 0
    for n, module in enumerate(modules):
        trained = [p for p in module.parameters() if p.requires_grad]
        places = {id(p): offset + k for k, p in enumerate(trained)}
        offset += len(trained)
        for name, layer in _topmost(module, str(n)):
            named = layer.named_parameters(remove_duplicate=False)
            positions = {key: places[id(p)] for key, p in named if id(p) in places}
            owners.setdefault(id(layer), Owner(name, layer, rule_of(layer), positions))
    return list(owners.values())


def _topmost(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if any(p is not None and p.requires_grad for p in module._parameters.values()):
        yield name, module
        return
    for key, child in module.named_children():
        yield from _topmost(child, f"{name}.{key}")


def impossible(what: str) -> UserError:
    """Return the error of a net whose parameters cannot have a copy per sample."""
    return UserError(what, where="method.space", hint='set method.space = "batch-weight" or "activation"')


def check_rows(owner: Owner, shapes: Sequence[Sequence[int]], *, size: int) -> None:
    """Require that tensors of these shapes have a row for each sample.

    Raises:
        UserError: they have not.
    """
    for shape in shapes:
        if not shape or shape[0] != size:
            raise impossible(
                f"{owner} has a tensor of shape {tuple(shape)} where the first dimension should be the"
                f" batch's {size} samples"
            )


def call_of(owner: Owner, args: tuple[Any, ...], options: Mapping[str, Any]) -> Call:
    """Return one call, with the parameters that the layer has now."""
    return Call(owner.module, args, options, dict(owner.module.named_parameters(remove_duplicate=False)))


def tensors_in(call: Call) -> list[Tensor]:
    """Return the tensors that a layer is called with."""
    return [x for x in (*call.args, *call.options.values()) if isinstance(x, Tensor)]


def rule_for(owner: Owner, call: Call) -> Rule:
    """Return the layer's formulas, or the rule that fits any if it was called in another way than theirs."""
    return owner.rule if fits(owner.rule, call) else GenericRule()


def refused(owner: Owner, error: Exception) -> UserError:
    """Return the error of a layer that PyTorch does not evaluate sample by sample."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return impossible(f"{owner} cannot be evaluated one sample at a time: {lines[0]}")
