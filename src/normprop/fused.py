"""The two inner loops of a NormProp layer as autograd functions: few passes forward, few backward.

Both are ordinary differentiable functions, higher derivatives, vmap, compile and export included.
"""

import math
from typing import Any

import torch
from torch import Tensor

VARIANCE_FLOOR = 1e-3
"""Smallest variance that a live activation is taken to have, relative to its input's: see ``standard_deviation``."""


def filter_statistics(rows: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """Mean (0 without ``center``) and reciprocal norm of every filter; a zero filter has reciprocal norm 0.

    Args:
        rows: weight as seen by :func:`normprop.functional.filters`, with one filter along the axes 1 and 3.
        center: whether the norm is taken after subtracting the filter's mean.

    Returns:
        Mean and reciprocal norm, each (groups, 1, filters per group, 1).

    Example:
        >>> rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]]).reshape(2, 2, 1, 1)
        >>> mean, inverse = filter_statistics(rows, center=False)
        >>> inverse.flatten()
        tensor([0.2000, 0.0000])
    """
    mean = rows.mean((1, 3), keepdim=True) if center else rows.new_zeros(())
    centered = rows - mean if center else rows
    norm = torch.linalg.vector_norm(centered, dim=(1, 3), keepdim=True)
    # A constant filter may keep a rounding error of its mean: that is zero, not a direction.
    negligible = norm <= 8 * torch.finfo(rows.dtype).eps * mean.abs() * (rows.shape[1] * rows.shape[3]) ** 0.5
    # The inner where keeps the gradient finite for zero filters.
    return mean, torch.where(negligible, 0.0, 1.0 / torch.where(negligible, 1.0, norm))


class NormalizeFilters(torch.autograd.Function):
    """``factor * (rows - mean)`` with factor = scale / norm: two passes over the weight forward, four backward.

    With w the unit filter and G the incoming gradient (centred when the filters are),
    dL/dW = factor (G - w <w, G>) and dL/dscale = <w, G>. The backward recomputes the statistics where it is itself
    being differentiated, so higher derivatives are right.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, scale: Tensor, center: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normalised rows and, for the backward, their mean and reciprocal norm."""
        mean, inverse = filter_statistics(rows, center)
        factor = inverse * scale
        return torch.addcmul(-mean * factor, rows, factor) if center else rows * factor, mean, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep what the backward needs."""
        rows, scale, ctx.center = inputs
        ctx.mark_non_differentiable(output[1], output[2])
        ctx.save_for_backward(rows, scale, output[1], output[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of rows and scale."""
        rows, scale, mean, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():
            mean, inverse = filter_statistics(rows, ctx.center)
        inner = (grad * rows).sum((1, 3), keepdim=True)
        if ctx.center:
            total = grad.sum((1, 3), keepdim=True)
            inner = inner - mean * total
        inner = inner * inverse  # <w, G>
        factor = inverse * scale
        slope = -factor * inverse * inner
        if not ctx.center:
            return torch.addcmul(rows * slope, grad, factor), inner, None
        offset = -slope * mean - factor * total / (rows.shape[1] * rows.shape[3])
        return torch.addcmul(torch.addcmul(offset, rows, slope), grad, factor), inner, None


class LiveReLU(torch.autograd.Function):
    r"""What surrounds the linear map of a ReLU layer with live moments: scale, shift and mean.

    With :math:`a = b / |g|` the ReLU of N(b, g^2) has mean |g| h and variance g^2 v, where
    :math:`h = a \Phi + \varphi` and :math:`v = (a^2 + 1) \Phi + a \varphi - h^2`; so, with :math:`r = v^{-1/2}`,
    the scale is sign(g) r, the shift a r and the mean h r: functions of a alone. h' is :math:`\Phi` and v' is
    :math:`2 h (1 - \Phi)`.
    """

    generate_vmap_rule = True

    @staticmethod
    def _terms(gain: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        """Return |g|, a, Phi, 1 - Phi, h, r and dr/da."""
        size = gain.abs().clamp_min(1e-12)
        a = bias / size
        below = 0.5 * torch.erfc(a * math.sqrt(0.5))  # 1 - Phi, without cancellation
        above = 0.5 * torch.erfc(a * -math.sqrt(0.5))
        density = torch.exp(a.square() * -0.5) * (1 / math.sqrt(2 * math.pi))
        h = torch.addcmul(density, a, above)
        # v rewritten as Phi + a (phi + h) (1 - Phi) - phi (a Phi + h), which does not cancel where a is large.
        v = torch.addcmul(above, a * below, h) - density * h
        floored = v.clamp_min(VARIANCE_FLOOR)
        r = floored.rsqrt()
        slope = torch.where(v > VARIANCE_FLOOR, -r / floored * h * below, 0.0)
        return size, a, above, below, h, r, slope

    @staticmethod
    def forward(gain: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scale, shift and mean, each (out,)."""
        _, a, _, _, h, r, _ = LiveReLU._terms(gain, bias)
        return gain.sign() * r, a * r, h * r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep the inputs; the terms are cheap."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, scale: Tensor, shift: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of gain and bias."""
        gain, bias = ctx.saved_tensors
        size, a, above, _, h, r, slope = LiveReLU._terms(gain, bias)
        sign = gain.sign()
        by_a = (shift + mean * above) * r + (scale * sign + shift * a + mean * h) * slope
        by_bias = by_a / size
        return -by_bias * a * sign, by_bias
