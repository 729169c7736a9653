"""The true gradient of one microbatch: plain backpropagation at given parameters, beside the training.

It is what estimates are compared with, and must leave no trace: other tensors stand in the places of the
parameters, running statistics, other buffers and `.grad` stay as they are, units draw the random numbers of
the microbatch, and the generators go on where they were. Only the inputs of the units are kept on the way up;
on the way down each unit is evaluated once more, so that never more than one unit's graph exists.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from petractl.methods.evaluation import Evaluator
from petractl.models.units import Streams

MeanLoss = Callable[[Tensor, Tensor], Tensor]
"""(output of the last unit, labels) -> mean loss over the samples."""

Snapshot = Sequence[Sequence[Tensor]]
"""Values of the parameters of a row of units, as in `Evaluator.parameters`."""


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """Gradients of a microbatch's mean loss: of every unit's parameters, and of some units' outputs."""

    parameters: Sequence[Sequence[Tensor | None]]
    outputs: Mapping[int, Streams]


def end_to_end(
    evaluators: Sequence[Evaluator],
    snapshot: Snapshot,
    images: Streams,
    labels: Tensor,
    *,
    loss: MeanLoss,
    microbatch: int,
    outputs_of: Collection[int] = (),
) -> EndToEnd:
    """Return the gradients at the snapshot, also at the outputs of the units in `outputs_of`.

    `microbatch` is the place in training, for the random numbers.
    """
    device = labels.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        inputs = [images]
        for evaluator, values in zip(evaluators, snapshot, strict=True):
            inputs.append(evaluator.plain(inputs[-1], microbatch=microbatch, live=False, parameters=values))
        logits = inputs.pop()[0].requires_grad_()
        with torch.enable_grad():
            gradients: Streams = torch.autograd.grad(loss(logits, labels), [logits])
        found, outputs = [], {}
        for n in range(len(evaluators) - 1, -1, -1):
            again = evaluators[n].linearize(
                inputs.pop(),
                microbatch=microbatch,
                live=False,
                parameters=[value.requires_grad_() for value in snapshot[n]],
                input_gradient=n > 0,
            )
            if n in outputs_of:
                outputs[n] = gradients
            gradients, of_parameters = again.vjp(gradients)
            found.append(of_parameters)
    return EndToEnd(found[::-1], outputs)


def snapshot_of(evaluators: Sequence[Evaluator]) -> list[list[Tensor]]:
    """Return copies of the parameters as they are now."""
    return [[p.detach().clone() for p in evaluator.parameters] for evaluator in evaluators]
