"""A net of constant width whose blocks are all reversible: nothing between the stem and the head shrinks.

The stem gives two streams, `depth` couplings keep their shape, the head pools. Whatever the depth, only the
stem's input has to be kept between forward and backward.
"""

from torch import nn

from petractl.models.registry import BuiltModel, ModelShape, register_model
from petractl.models.resnet import initialise
from petractl.models.revnet import BasicFunction, RevNetHead, RevNetStem
from petractl.models.units import Coupling


@register_model
def revnet_iso(shape: ModelShape) -> BuiltModel:
    """RevNet of constant width, depth + 2 units, of which depth reversible."""
    units: list[nn.Module] = [RevNetStem(shape.in_channels, shape.width, shape.stem)]
    units += [Coupling(BasicFunction(shape.width)) for _ in range(shape.depth)]
    units.append(RevNetHead(shape.width, shape.classes))
    initialise(units)
    blocks = [f"block{index}" for index in range(1, shape.depth + 1)]
    return BuiltModel(units, ("stem", *blocks, "head"))
