"""Normalization Propagation as pure functions on tensors.

A layer computes ``o = (f(gain * (w x) / ||w|| + bias) - c2) / c1``. Written like that it costs several passes over the
activations. The functions here move everything that is linear into the weight and the bias, so that what remains of
size *activation* is the linear map, the activation function and at most one shift.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from normprop.fused import VARIANCE_FLOOR, LiveReLU, NormalizeFilters, at_least_float32
from normprop.fused_layer import ScaledReLU, available
from normprop.moments import Activation, Moments, Rule, resolve

MomentKind = Literal["fixed", "live"]


def normalize_weight(
    weight: Tensor, scale: Tensor, *, center: bool = False, groups: int = 1, transposed: bool = False
) -> Tensor:
    r"""Give every filter the length ``scale``: :math:`s_i (W_i - m_i) / \|W_i - m_i\|`, with m the mean or 0.

    Computed in float32 or better; zero filters (constant ones with ``center``) give zeros and finite gradients.

    Args:
        weight: (out, in / groups, *kernel), or (in, out / groups, *kernel) of a transposed convolution.
        scale: length of every filter, (out,).
        center: subtract every filter's mean first.
        groups: number of groups of the convolution.
        transposed: whether the layout is that of a transposed convolution.

    Returns:
        Normalised weight, same shape; float32 for half-precision weights.

    Source:
        Arpit et al. 2016, equations 9 and 11; centring: Qiao et al. 2019 (weight standardisation).

    Example:
        >>> normalize_weight(torch.tensor([[3.0, 4.0]]), torch.tensor([10.0]))
        tensor([[6., 8.]])
    """
    weight = at_least_float32(weight)
    normalized: Tensor = NormalizeFilters.apply(weight, scale.to(weight.dtype), center, groups, transposed)[0]
    return normalized


class Normalization(NamedTuple):
    """What a layer does around its linear map: ``f(scale * w x / ||w|| + shift)``, then :func:`activate`.

    ``scale`` and ``shift`` are (out,) tensors; ``mean`` and ``reciprocal_std`` belong to what follows the linear map.
    """

    scale: Tensor
    shift: Tensor
    mean: Tensor | float
    reciprocal_std: Tensor | float


def standard_deviation(rule: Rule, moments: Moments, std: Tensor | float) -> Tensor | float:
    """Standard deviation of an activation's output, bounded below where the unit is almost always silent.

    The floor on the variance, 1e-3 times that of the input (at most 1, unless the activation is homogeneous), limits
    how far the rare outputs of a nearly dead unit are amplified, to about 30 times; at N(0, 1) no activation in use
    comes near it.

    Args:
        rule: the activation.
        moments: moments of its output.
        std: standard deviation of its input.

    Returns:
        c1 of the paper; same kind as the variance.

    Example:
        >>> standard_deviation(resolve("tanh"), Moments(mean=0.0, var=0.25), 1.0)
        0.5
    """
    if not isinstance(moments.var, Tensor):
        return math.sqrt(moments.var)
    var = torch.as_tensor(std, dtype=moments.var.dtype, device=moments.var.device).square()
    floor = var.clamp_min(1e-12) if rule.homogeneous else var.clamp(1e-12, 1.0)
    return torch.maximum(moments.var, VARIANCE_FLOOR * floor).sqrt()


def normalization(rule: Rule, gain: Tensor, bias: Tensor | None, moments: Moments | MomentKind) -> Normalization:
    """Work out what is absorbed by weight and bias, and what is left to do after the linear map.

    Args:
        rule: the activation (with the identity there is nothing to normalise after it).
        gain: gamma, (out,).
        bias: beta, (out,), or ``None``.
        moments: ``"live"`` for the moments at N(bias, gain^2); ``"fixed"`` for those at N(0, 1); or those themselves.

    Returns:
        The constants of the layer.

    Source:
        Arpit et al. 2016, equation 12.

    Example:
        >>> from normprop.moments import resolve
        >>> result = normalization(resolve("relu"), torch.ones(1), torch.zeros(1), "fixed")
        >>> round(float(result.scale), 4), round(float(result.shift), 4)
        (1.7129, -0.6833)
    """
    gain = at_least_float32(gain)
    bias = gain.new_zeros(gain.shape) if bias is None else bias.to(gain.dtype)
    if rule.name == "identity":
        return Normalization(gain, bias, 0.0, 1.0)
    mean: Tensor | float
    reciprocal: Tensor | float
    if moments == "live" and rule.name == "relu":
        scale, shift, mean = LiveReLU.apply(gain, bias)[:3]
        return Normalization(scale, shift, mean, 1.0)
    if moments == "live":
        mean, reciprocal = live_normalization(rule, gain, bias)
    else:
        known = rule.moments(0.0, 1.0, derivative=False) if isinstance(moments, str) else moments
        reciprocal = 1.0 / standard_deviation(rule, known, 1.0)
        mean = known.mean * reciprocal
    if rule.name == "relu" and isinstance(mean, float):
        return Normalization(gain * reciprocal, bias * reciprocal - mean, mean, 1.0)
    if rule.homogeneous:
        return Normalization(gain * reciprocal, bias * reciprocal, mean, 1.0)
    return Normalization(gain, bias, mean, reciprocal)


def live_normalization(rule: Rule, gain: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over standard deviation, and 1 over it, of an activation of N(bias, gain^2), elementwise.

    Args:
        rule: the activation.
        gain: gamma, (out,).
        bias: beta, (out,).

    Returns:
        What is subtracted from, and what multiplies, the activation's output.

    Example:
        >>> from normprop.moments import resolve
        >>> mean, reciprocal = live_normalization(resolve("gelu"), torch.ones(1), torch.zeros(1))
        >>> round(float(mean), 4), round(float(reciprocal), 4)
        (0.4798, 1.7009)
    """
    std = gain.abs()
    moments = rule.moments(bias, std, derivative=False)
    reciprocal = torch.as_tensor(1.0 / standard_deviation(rule, moments, std))
    return moments.mean * reciprocal, reciprocal


def per_channel(value: Tensor | float, like: Tensor, spatial_dims: int) -> Tensor | float:
    """Shape a per-channel tensor so that it broadcasts against ``like``, in its type; numbers stay as they are."""
    if isinstance(value, Tensor) and value.ndim > 0:
        return value.to(like.dtype).reshape(-1, *[1] * spatial_dims)
    return value


def activate(input: Tensor, rule: Rule, constants: Normalization, spatial_dims: int = 0) -> Tensor:
    """Apply the activation and what is left of its normalisation: ``f(x) * reciprocal_std - mean``.

    Args:
        input: pre-activation, (..., out, *space); may be overwritten (nothing else may need its values).
        rule: the activation.
        constants: what :func:`normalization` returned.
        spatial_dims: number of axes after the channels.

    Returns:
        Normalised activation, shape and dtype of ``input``.

    Example:
        >>> from normprop.moments import resolve
        >>> constants = normalization(resolve("relu"), torch.ones(2), torch.zeros(2), "fixed")
        >>> activate(torch.tensor([[-1.0, 1.0]]), resolve("relu"), constants)
        tensor([[-0.6833,  1.0000]])
    """
    if rule.name == "identity":
        return input

    # The backward of the linear map does not need its output, so ReLU may overwrite it. With a constant shift,
    # relu(z) - m = max(z - m, -m): the shift is already part of the bias and one threshold remains.
    if rule.name == "relu" and isinstance(constants.mean, float):
        return torch.threshold_(input, -constants.mean, -constants.mean)
    output = F.relu_(input) if rule.name == "relu" else rule.function(input)
    mean = per_channel(constants.mean, input, spatial_dims)
    reciprocal = per_channel(constants.reciprocal_std, input, spatial_dims)
    if not (isinstance(reciprocal, float) and reciprocal == 1.0):
        output = output * reciprocal
    return output - mean


def normalized_sum(
    inputs: Sequence[Tensor], moments: Sequence[Moments], activation: Activation = None, spatial_dims: int = 0
) -> Tensor:
    r"""Add independent inputs of known moments and return mean 0 and variance 1, through an activation or not.

    With m and :math:`\sigma^2` the sums of means and variances, :math:`s = \sum x` gives
    :math:`(f(s / \sigma) - c_2) / c_1`, where c2 and c1 belong to f(N(m / sigma, 1)).

    Args:
        inputs: tensors of one shape, (..., channels, *space).
        moments: moments of each, numbers or (channels,).
        activation: f, or ``None`` for none.
        spatial_dims: number of axes after the channels.

    Returns:
        Normalised sum.

    Source:
        Ours; the paper has no sums.

    Example:
        >>> normalized_sum([torch.ones(1, 2), torch.ones(1, 2)], [Moments(0.0, 1.0), Moments(0.0, 3.0)])
        tensor([[1., 1.]])
    """
    rule = resolve(activation)
    total = inputs[0] + inputs[1]
    for input in inputs[2:]:
        total = total + input
    mean = sum((m.mean for m in moments[1:]), moments[0].mean)
    var = sum((m.var for m in moments[1:]), moments[0].var)
    reciprocal = (var.clamp_min(1e-8) if isinstance(var, Tensor) else max(var, 1e-8)) ** -0.5
    mean = mean * reciprocal
    if rule.name == "identity":
        return total * per_channel(reciprocal, total, spatial_dims) - per_channel(mean, total, spatial_dims)
    one = torch.ones_like(mean) if isinstance(mean, Tensor) else 1.0
    if rule.name == "relu" and isinstance(mean, Tensor):
        scale, _, center = LiveReLU.apply(one, mean)[:3]
    else:
        predicted = rule.moments(mean, one, derivative=False)
        scale = 1.0 / standard_deviation(rule, predicted, one)
        center = predicted.mean * scale
    shift = per_channel(center, total, spatial_dims)
    if rule.homogeneous:
        factor = per_channel(scale * reciprocal, total, spatial_dims)
        if rule.name == "relu" and available(total):
            factor, shift = (torch.as_tensor(part, dtype=total.dtype, device=total.device) for part in (factor, shift))
            fused: Tensor = ScaledReLU.apply(total, factor, shift)
            return fused
        return rule.function(total) * factor - shift
    output = rule.function(total * per_channel(reciprocal, total, spatial_dims))
    return output * per_channel(scale, total, spatial_dims) - shift
