"""A stage's update: one call, with the gradients in place, the delay and the position in training.

The rate comes from the stage's own counter of updates, so it is the same whatever the speed of the other
stages. The delay is handed in so that a correction for staleness can be written here without touching the
engine.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LearningRate = Callable[[int], float]
"""The rate of update n, counted from 0."""


class Updater:
    """Clips a stage's gradient, sets the rate and steps the optimiser."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        learning_rate: LearningRate,
        clip: Callable[[Sequence[Tensor]], Tensor] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.rate = 0.0
        """The rate of the last update."""
        self._clip = clip

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained here."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self, *, delay: int, position: int) -> None:
        """Apply the gradients held by the parameters.

        `delay`: updates that this stage made between the forward and the backward of the group's last
        microbatch. `position`: updates made before this one since the start of training.
        """
        assert delay >= 0
        if self._clip is not None:
            grads = [p.grad for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
            if grads:
                self._clip(grads)
        self.rate = self.learning_rate(position)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def skip(self, *, position: int) -> None:
        """Leave an update out: its gradients are dropped, and the rate moves on."""
        self.rate = self.learning_rate(position)
        self.optimizer.zero_grad(set_to_none=True)
