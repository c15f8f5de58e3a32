r"""What a layer's statistics should be, given the layer before it: the predictions of Kalman Normalization.

The pre-activations of the layer before are taken as independent Gaussians with a mean and a variance per channel. Their
activation has moments :math:`\mu = E[f(z)]` and :math:`\sigma^2 = Var[f(z)]`, which a linear map W with zero padding
turns into a mean and a variance at each position q of its output,

.. math:: \mu_o(q) = \sum_{c, t \in q} W_{oct} \mu_c, \qquad \sigma_o^2(q) = \sum_{c, t \in q} W_{oct}^2 \sigma_c^2,

where taps t that fall on the padding are left out. What a norm measures over the map is then the mean of
:math:`\mu_o(q)`, and the mean of :math:`\sigma_o^2(q)` plus the variance of :math:`\mu_o(q)` over q. Without padding
that is :math:`W \mu` and :math:`W^2 \sigma^2`, summed over taps; strides only choose positions.

:func:`closed` computes this; :func:`sampled` draws one Gaussian map instead and measures it.

Source:
    Wang et al. 2018 and its public code (the sampled form); the closed form, with padding, is ours.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from normprop.fused import at_least_float32
from normprop.moments import Activation, resolve
from normprop.moments.rule import widened

_CONV = (F.conv1d, F.conv2d, F.conv3d)


class Gaussian(NamedTuple):
    """Mean and variance per channel, each (G, C) for G groups of samples."""

    mean: Tensor
    var: Tensor


def activated(belief: Gaussian, activation: Activation) -> Gaussian:
    """Moments of an activation of Gaussians.

    Args:
        belief: mean and variance of the pre-activations.
        activation: f, see :func:`normprop.moments.resolve`.

    Returns:
        Mean and variance of f, same shapes.

    Example:
        >>> activated(Gaussian(torch.zeros(1), torch.ones(1)), "relu").mean
        tensor([0.3989])
    """
    moments = resolve(activation).moments(belief.mean, deviation(belief.var), derivative=False)
    return Gaussian(torch.as_tensor(moments.mean), torch.as_tensor(moments.var))


def deviation(var: Tensor) -> Tensor:
    """Root of a variance; one that is zero, where the root has no slope, passes no gradient.

    Example:
        >>> deviation(torch.tensor(4.0))
        tensor(2.)
    """
    return var.clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def measured(values: Tensor) -> Gaussian:
    """Mean and variance over the last axis; of no values at all, without torch's warning, nothing.

    Example:
        >>> measured(torch.tensor([[1.0, 3.0]]))
        Gaussian(mean=tensor([2.]), var=tensor([1.]))
    """
    if values.numel() == 0:
        return Gaussian(values.sum(-1), values.sum(-1))
    var, mean = torch.var_mean(values, -1, correction=0)
    return Gaussian(mean, var)


def closed(
    belief: Gaussian, activation: Activation, weight: Tensor, space: tuple[int, ...] = (), groups: int = 1, **conv: Any
) -> Gaussian:
    r"""Predict the statistics of a linear map of activated Gaussians in closed form.

    Args:
        belief: pre-activations of the layer before, (G, C_in) each.
        activation: f of the layer before.
        weight: (C_out, C_in / groups, \*kernel).
        space: size of the input map; ``()`` for a linear layer.
        groups: groups of the convolution.
        conv: ``stride``, ``padding`` and ``dilation`` of the convolution, as torch takes them.

    Returns:
        Mean and variance over the positions of the output, (G, C_out) each.

    Example:
        >>> before = Gaussian(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 4.0]]))
        >>> closed(before, None, torch.tensor([[2.0, -1.0]]))
        Gaussian(mean=tensor([[5.]]), var=tensor([[8.]]))
    """
    mean, var = activated(belief, activation)
    rows = at_least_float32(weight).reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    mean, var = (part.to(rows.dtype).unflatten(1, (groups, weight.shape[1])) for part in (mean, var))
    seen = _seen(rows, weight.shape[2:], space, conv)
    mean, spread = measured(torch.einsum("goit,bgi->bgot", rows, mean) @ seen)
    within = torch.einsum("goi,bgi->bgo", rows.square() @ seen.mean(-1), var)
    return Gaussian(mean.flatten(1), (within + spread).flatten(1))


def _seen(rows: Tensor, kernel: tuple[int, ...], space: tuple[int, ...], conv: dict[str, Any]) -> Tensor:
    """One where a tap of the kernel falls on the map, zero where on its padding: (taps, positions)."""
    taps = rows.shape[-1]
    if not kernel:
        return rows.new_ones(1, 1)
    probes = torch.eye(taps, dtype=rows.dtype, device=rows.device).reshape(taps, 1, *kernel)
    return _CONV[len(kernel) - 1](rows.new_ones(1, 1, *space), probes, **conv)[0].flatten(1)


def sampled(
    belief: Gaussian, activation: Activation, weight: Tensor, space: tuple[int, ...] = (), groups: int = 1, **conv: Any
) -> Gaussian:
    r"""Estimate what :func:`closed` predicts from one Gaussian map per group of samples.

    The map has the size of the layer's input and the statistics are over space alone, so that the estimate is as noisy
    as the output is small.

    Args:
        belief: pre-activations of the layer before, (G, C_in) each.
        activation: f of the layer before.
        weight: (C_out, C_in / groups, \*kernel).
        space: size of the input map.
        groups: groups of the convolution.
        conv: ``stride``, ``padding`` and ``dilation`` of the convolution, as torch takes them.

    Returns:
        Mean and variance over the positions of the output, (G, C_out) each.

    Raises:
        ValueError: if the output has fewer than two positions, as that of a linear layer.

    Source:
        The public code of Wang et al. 2018.

    Example:
        >>> sampled(Gaussian(torch.zeros(1, 2), torch.ones(1, 2)), "relu", torch.ones(3, 2, 1, 1), (5, 5)).mean.shape
        torch.Size([1, 3])
    """
    weight = at_least_float32(weight)
    mean, std = torch.broadcast_tensors(belief.mean, deviation(belief.var))
    noise = torch.randn(*std.shape, *space, dtype=std.dtype, device=std.device)
    mean, std = (part.reshape(*part.shape, *[1] * len(space)) for part in (mean, std))
    drawn = widened(resolve(activation).function)(torch.addcmul(mean, std, noise)).to(weight.dtype)
    output = _CONV[len(space) - 1](drawn, weight, groups=groups, **conv).flatten(2) if space else drawn[..., None]
    if output.shape[-1] < 2:
        raise ValueError("norms.kalman: a sampled prior needs outputs of two or more positions; use prior='closed'")
    return measured(output)
