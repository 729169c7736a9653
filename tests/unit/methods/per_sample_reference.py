"""What per-sample gradients mean, spelled out: a net in which every sample really has its own parameters."""

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from petractl.models.units import Streams, as_streams


def with_copies(
    units: Sequence[nn.Module], *, n: int, held: bool = False
) -> tuple[Callable[..., Streams], list[Tensor]]:
    """Return a function of the block's inputs, and the copies (n, *shape) of its parameters that it uses."""
    own = [copy.deepcopy(unit) for unit in units]
    copies: list[Tensor] = []
    for unit in own:
        found: dict[int, Tensor] = {}
        for p in unit.parameters():
            found[id(p)] = p.detach().expand(n, *p.shape).clone().requires_grad_()
        copies += found.values()
        for module in _topmost(unit):
            tensors = {key: found[id(p)] for key, p in module.named_parameters()}
            module.forward = _forward(module, tensors, held)

    def block(*streams: Tensor) -> Streams:
        for unit in own:
            streams = as_streams(unit(*streams))
        return streams

    return block, copies


def _topmost(module: nn.Module) -> Iterator[nn.Module]:
    if module._parameters:
        yield module
    else:
        for child in module.children():
            yield from _topmost(child)


def _forward(module: nn.Module, copies: dict[str, Tensor], held: bool) -> Callable[..., Tensor]:
    plain = copy.copy(module)  # with the forward of its class

    def one_by_one(x: Tensor, *rest, **options):
        rows = []
        for i in range(len(x)):
            values = {key: p[i] for key, p in copies.items()}
            ours = tuple(z[i : i + 1] for z in (x, *rest))
            y = torch.func.functional_call(plain, values, ours, options)
            rows.append(y if isinstance(y, Tensor) else y[0])
        joined = torch.cat(rows)
        return joined if isinstance(y, Tensor) else (joined, None)

    def batch_norm(x: Tensor) -> Tensor:
        dims = [0, *range(2, x.dim())]
        shape = [-1, *[1] * (x.dim() - 2)]
        mean, variance = x.mean(dims), x.var(dims, unbiased=False)
        if not module.training:
            mean, variance = module.running_mean, module.running_var
        elif held:
            mean, variance = mean.detach(), variance.detach()
        normal = (x - mean.view(shape)) / (variance.view(shape) + module.eps).sqrt()
        scale, shift = (copies[key].view(len(x), *shape) for key in ("weight", "bias"))
        return normal * scale + shift

    return batch_norm if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) else one_by_one


def directional(block: Callable[..., Streams], inputs: Streams, copied: Tensor, direction: Tensor) -> Streams:
    """Return how the outputs move along a direction of some of their leaves, by two backwards."""
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have one derivative
        outputs = block(*(x.clone().requires_grad_() for x in inputs))
    seeds = [torch.zeros_like(y, requires_grad=True) for y in outputs]
    (pulled,) = torch.autograd.grad(outputs, copied, seeds, create_graph=True)
    found = torch.autograd.grad(pulled, seeds, direction, allow_unused=True)
    return tuple(torch.zeros_like(y) if t is None else t for t, y in zip(found, seeds, strict=True))


def loss_gradients(outputs: Streams) -> Streams:
    """Return fixed numbers of the outputs' shapes, as gradients of a mean over the batch."""
    generator = torch.Generator().manual_seed(5)
    return tuple(
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) / len(y) for y in outputs
    )
