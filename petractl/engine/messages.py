"""What neighbours send each other: the only way in which stages touch.

Messages carry the index of their microbatch within the epoch. Labels travel with the activations to the last
stage.
"""

from dataclasses import dataclass

from torch import Tensor

from petractl.models.units import Streams


@dataclass(frozen=True, slots=True)
class Activation:
    """Upwards: the streams of one microbatch, and its labels (n,).

    `cut` says whether the run is saved after this microbatch's backward (see `engine.cut`): who passes it on
    has been told in time.
    """

    microbatch: int
    streams: Streams
    labels: Tensor
    cut: int = 0


@dataclass(frozen=True, slots=True)
class Gradient:
    """Downwards: the gradients at a cut, and its streams too if the unit below rebuilds its input."""

    microbatch: int
    streams: Streams | None
    gradients: Streams
