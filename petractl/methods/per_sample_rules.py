"""Layers whose parameters have a copy for every sample of the batch: formulas for the common ones.

From a layer's input and the gradient of its output follow the gradients dL/dp^(i) of all copies together;
from a direction g^(i) for each copy, how the layer's output moves. A convolution with copies is a grouped
convolution over the whole batch, a linear layer a product of matrices per sample, a norm's scale and shift
act on the normalised input, whose statistics the copies do not touch. Any other layer has the rule of
`per_sample_generic`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from petractl.methods.per_sample_generic import Call, GenericRule, Rule, cast_floating

Conv = _ConvNd
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


@dataclass(frozen=True, slots=True)
class LayerRule:
    """A layer of one input and one output, with a weight and perhaps a bias."""

    accepts: Callable[[Any, Tensor], bool]
    weight_gradient: Callable[[Any, Tensor, Tensor], Tensor]
    bias_gradient: Callable[[Any, Tensor, Tensor], Tensor]
    weight_tangent: Callable[[Any, Tensor, Tensor], Tensor]
    bias_tangent: Callable[[Any, Tensor, Tensor], Tensor]

    def gradient(self, call: Call, key: str, gradients: list[Tensor | None]) -> Tensor:
        """See `Rule`; computed in the parameter's dtype."""
        dtype, (g,) = call.parameters[key].dtype, gradients
        assert g is not None
        of = self.weight_gradient if key == "weight" else self.bias_gradient
        return of(call.module, cast_floating(call.input, dtype), g.to(dtype))

    def tangent(self, call: Call, key: str, direction: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        """See `Rule`; computed as the layer is, in lower precision under autocast."""
        of = self.weight_tangent if key == "weight" else self.bias_tangent
        return [of(call.module, call.input, direction)]


def rule_of(module: nn.Module) -> Rule:
    """Return the formulas for a layer, or the rule that fits any."""
    plain = set(module._parameters) <= {"weight", "bias"} and next(module.children(), None) is None
    rule = _RULES.get(type(module)) if plain else None
    return rule if rule is not None and "forward" not in vars(module) else GenericRule()


def fits(rule: Rule, call: Call) -> bool:
    """Tell whether a layer was called in the way that its formulas are for."""
    return not isinstance(rule, LayerRule) or rule.accepts(call.module, call.input)


def _sum_but(x: Tensor, kept: int) -> Tensor:
    """Sum over what stands between the batch dimension and the last `kept` ones."""
    middle = tuple(range(1, x.dim() - kept))
    return x.sum(middle) if middle else x


def _sum_positions(x: Tensor) -> Tensor:
    """Sum over what follows the channels."""
    return x.flatten(2).sum(2) if x.dim() > 2 else x


def _with_positions(g: Tensor, like: Tensor) -> Tensor:
    """Shape (n, channels) for a product with (n, channels, *positions)."""
    return g.view(*g.shape, *[1] * (like.dim() - 2))


def _before_last(g: Tensor, like: Tensor) -> Tensor:
    """Shape (n, *rest) for a product with (n, *middle, *rest)."""
    return g.view(g.shape[0], *[1] * (like.dim() - g.dim()), *g.shape[1:])


def _linear_weight_gradient(layer: nn.Linear, x: Tensor, g: Tensor) -> Tensor:
    n = len(x)
    return g.reshape(n, -1, g.shape[-1]).transpose(1, 2) @ x.reshape(n, -1, x.shape[-1])


def _linear_weight_tangent(layer: nn.Linear, x: Tensor, direction: Tensor) -> Tensor:
    moved = x.reshape(len(x), -1, x.shape[-1]) @ direction.transpose(1, 2)
    return moved.view(*x.shape[:-1], direction.shape[1])


def _as_channels(x: Tensor) -> Tensor:
    """Put the samples beside each other as channels of one: (n, c, ...) to (1, n * c, ...)."""
    return x.reshape(1, -1, *x.shape[2:])


def _padded(layer: Conv, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the input with what zeros on both sides cannot do already added, and the padding left to do."""
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return x, layer.padding
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), (0,) * len(layer.kernel_size)


def _conv_weight_gradient(layer: Conv, x: Tensor, g: Tensor) -> Tensor:
    """Return a grouped convolution's; with few positions a product with the patches, no larger than it."""
    x, padding = _padded(layer, x)
    n, shape = len(x), layer.weight.shape
    if x.dim() == 4 and layer.groups == 1 and g[0, 0].numel() <= shape[0]:
        patches = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
        return (g.flatten(2) @ patches.transpose(1, 2)).view(n, *shape)
    copies = x.new_empty(n * shape[0], *shape[1:])
    found = torch.ops.aten.convolution_backward(
        _as_channels(g), _as_channels(x), copies, None, layer.stride, padding, layer.dilation,
        False, [0] * len(padding), n * layer.groups, [False, True, False],
    )[1]  # fmt: skip
    return cast(Tensor, found.view(n, *shape))


def _conv_weight_tangent(layer: Conv, x: Tensor, direction: Tensor) -> Tensor:
    x, padding = _padded(layer, x)
    n, copies = len(x), direction.flatten(0, 1)
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
    moved = convolve(_as_channels(x), copies, None, layer.stride, padding, layer.dilation, n * layer.groups)
    return moved.view(n, -1, *moved.shape[2:])


def _batch_normalised(layer: Norm, x: Tensor) -> Tensor:
    if layer.training or layer.running_mean is None:
        return F.batch_norm(x, None, None, training=True, eps=layer.eps)
    return F.batch_norm(x, layer.running_mean, layer.running_var, training=False, eps=layer.eps)


def _layer_normalised(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, layer.normalized_shape, eps=layer.eps)


def _group_normalised(layer: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, layer.num_groups, eps=layer.eps)


def _is_plain_embedding(layer: nn.Embedding, x: Tensor) -> bool:
    return layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse


def _embedding_gradient(layer: nn.Embedding, x: Tensor, g: Tensor) -> Tensor:
    n, words = len(x), layer.num_embeddings
    sample = torch.arange(n, device=x.device).view(-1, *[1] * (x.dim() - 1))
    found = g.new_zeros(n * words, g.shape[-1])
    found.index_add_(0, (x + sample * words).flatten(), g.reshape(-1, g.shape[-1]))
    found = found.view(n, words, -1)
    if layer.padding_idx is not None:
        found[:, layer.padding_idx] = 0
    return found


def _embedding_tangent(layer: nn.Embedding, x: Tensor, direction: Tensor) -> Tensor:
    sample = torch.arange(len(x), device=x.device).view(-1, *[1] * (x.dim() - 1))
    moved = direction[sample, x]
    return moved if layer.padding_idx is None else moved * (x != layer.padding_idx).unsqueeze(-1)


def _channel_rule(normalised: Callable[[Any, Tensor], Tensor]) -> LayerRule:
    """Return the rule of a norm whose scale and shift are per channel."""
    return LayerRule(
        accepts=lambda layer, x: x.dim() > 1,
        weight_gradient=lambda layer, x, g: _sum_positions(g * normalised(layer, x)),
        bias_gradient=lambda layer, x, g: _sum_positions(g),
        weight_tangent=lambda layer, x, d: normalised(layer, x) * _with_positions(d, x),
        bias_tangent=lambda layer, x, d: _with_positions(d, x).expand_as(x),
    )


_LINEAR = LayerRule(
    accepts=lambda layer, x: x.dim() > 1,
    weight_gradient=_linear_weight_gradient,
    bias_gradient=lambda layer, x, g: _sum_but(g, 1),
    weight_tangent=_linear_weight_tangent,
    bias_tangent=lambda layer, x, d: _before_last(d, x).expand(*x.shape[:-1], -1),
)
_CONV = LayerRule(
    accepts=lambda layer, x: x.dim() == layer.weight.dim(),
    weight_gradient=_conv_weight_gradient,
    bias_gradient=lambda layer, x, g: _sum_positions(g),
    weight_tangent=_conv_weight_tangent,
    bias_tangent=lambda layer, x, d: _with_positions(d, x),
)
_LAYER_NORM = LayerRule(
    accepts=lambda layer, x: x.dim() > len(layer.normalized_shape),
    weight_gradient=lambda layer, x, g: _sum_but(
        g * _layer_normalised(layer, x), len(layer.normalized_shape)
    ),
    bias_gradient=lambda layer, x, g: _sum_but(g, len(layer.normalized_shape)),
    weight_tangent=lambda layer, x, d: _layer_normalised(layer, x) * _before_last(d, x),
    bias_tangent=lambda layer, x, d: _before_last(d, x).expand_as(x),
)
_EMBEDDING = LayerRule(
    accepts=_is_plain_embedding,
    weight_gradient=_embedding_gradient,
    bias_gradient=_embedding_gradient,
    weight_tangent=_embedding_tangent,
    bias_tangent=_embedding_tangent,
)
_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _LINEAR,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONV),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _channel_rule(_batch_normalised)),
    nn.LayerNorm: _LAYER_NORM,
    nn.GroupNorm: _channel_rule(_group_normalised),
    nn.Embedding: _EMBEDDING,
}
