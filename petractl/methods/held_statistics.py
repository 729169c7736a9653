"""Batch norm with its batch statistics held constant in the derivative.

A training batch norm couples the samples of a batch: what one sample's loss is for another's activation does
not vanish. With the statistics held, each sample's loss depends on that sample alone, and one pass gives a
derivative for every sample. The values are the same; the derivative is another (docs/forward_gradient.md).
`petractl.methods.dual` does this in forward mode; here it is done for graphs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextmanager
def held_statistics(held: bool = True) -> Iterator[None]:
    """Have every training batch norm evaluated inside normalise by constants; running statistics stay."""
    if not held:
        yield
        return
    with _Held():
        yield


class _Held(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    values = input.detach()
    values = values if values.dtype == torch.float64 else values.float()
    var, mean = torch.var_mean(values, [0, *range(2, input.dim())], correction=0)
    return F.batch_norm(input, mean, var, weight, bias, False, momentum, eps)
